//! Reads of the view for requests. Requests that come at the same time share one transaction of the
//! store, and so also its checks: while one transaction is in progress, further requests wait, and
//! the next transaction reads the users of all of them.

use anyhow::Context;
use redis::RedisResult;
use shared::platform::batching::{Caller, Calls, batching};
use uuid::Uuid;

use crate::view::{Lookup, Stored, View};

/// Users in one transaction, which then takes the server less than a millisecond.
const USERS: usize = 128;

/// Clones share the transactions.
#[derive(Clone)]
pub struct Reads(Caller<Uuid, RedisResult<Stored>>);

/// The reads that wait.
pub struct Waiting(Calls<Uuid, RedisResult<Stored>>);

pub fn reads() -> (Reads, Waiting) {
    let (caller, calls) = batching(USERS);
    (Reads(caller), Waiting(calls))
}

impl Reads {
    /// # Errors
    /// As [`View::find`].
    pub async fn find(&self, id: Uuid) -> anyhow::Result<Lookup> {
        let stored = self.0.call(id).await.context("the reads of the view have ended")?;
        Ok(stored?.try_into()?)
    }
}

impl Waiting {
    /// Runs until every [`Reads`] was dropped, so that a stopping process still answers the
    /// requests in progress.
    pub async fn run(self, view: View) -> anyhow::Result<()> {
        let Self(mut calls) = self;
        while let Some((users, answers)) = calls.next().await {
            match view.find_all(&users).await {
                Ok(found) => answers.send(found.into_iter().map(Ok)),
                Err(error) => answers.send_to_all(|| Err(error.clone())),
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use futures::future::join_all;
    use redis::Client;
    use shared::events::{Profile, UserState, mint_id};
    use shared::messaging::{Handler, Record};

    use super::*;

    /// Requests that share a transaction do not get each other's users.
    #[tokio::test]
    async fn each_request_gets_its_own_user() {
        let client = Client::open(testbed::testing::stack().valkey.as_str()).unwrap();
        let view = View::new(client, &testbed::testing::prefix());
        let users: Vec<Uuid> = (0..2 * USERS + 7).map(|_| mint_id()).collect();
        // Every third user is unknown.
        let known = users.iter().enumerate().filter(|(number, _)| number % 3 > 0);
        let states = known.map(|(number, user)| {
            let profile = Profile { email: format!("{user}@example.com"), display_name: "Ada".to_owned(), owner: None };
            Record::sample(*user, number as i64, UserState::Current(profile))
        });
        view.handle(&states.collect::<Vec<_>>()).await.unwrap();
        let (reads, waiting) = reads();
        let requests = async {
            let found = join_all(users.iter().map(|user| reads.find(*user))).await;
            drop(reads);
            found
        };
        let (found, ended) = tokio::join!(requests, waiting.run(view));
        ended.unwrap();
        for (number, (user, found)) in users.iter().zip(found).enumerate() {
            let found = found.unwrap();
            let expected = (number % 3 > 0).then(|| format!("{user}@example.com"));
            assert_eq!(found.version, if expected.is_some() { number as i64 } else { 0 });
            assert_eq!(found.profile.map(|profile| profile.email), expected);
        }
    }
}
