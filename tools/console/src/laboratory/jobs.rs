//! Jobs that take longer than a request: bursts of registrations, and faulty records that need a
//! user first. One job runs at a time.

use anyhow::{Context, Result};
use futures::future::join_all;
use shared::messaging::Coordinates;
use tokio::sync::mpsc;
use tokio::time::{Duration, Instant, sleep};
use topology::USER;
use uuid::Uuid;

use super::Laboratory;
use super::apis::Accepted;
use super::commands;
use super::fates::Place;
use super::registrations::Registration;

/// Registrations of a burst that are in progress at the same time.
const AT_ONCE: u32 = 4;
/// How long a record may take from its command until the console has seen it.
const RECORD_LIMIT: Duration = Duration::from_secs(20);
const POLL_INTERVAL: Duration = Duration::from_millis(100);
/// The domain of the users. It is reserved for examples (RFC 2606), so no mail reaches a person.
const DOMAIN: &str = "laboratory.example";

pub enum Job {
    Burst(u32),
    /// Writes the fact about the newest registration again.
    Again,
    /// Registers a user, renames it, and then writes its first state again.
    OldState,
}

impl Job {
    pub fn begun(&self) -> String {
        match self {
            Self::Burst(users) => format!("a burst of {users} registrations begins"),
            Self::Again => "the last record will be written again".to_owned(),
            Self::OldState => "a user will be registered and renamed, then its first state written again".to_owned(),
        }
    }
}

/// Runs the jobs one after another. Never ends.
pub async fn run_jobs(laboratory: Laboratory, mut jobs: mpsc::Receiver<Job>) -> Result<()> {
    while let Some(job) = jobs.recv().await {
        let done = match job {
            Job::Burst(users) => Ok(laboratory.burst(users).await),
            Job::Again => laboratory.again().await,
            Job::OldState => laboratory.old_state().await,
        };
        laboratory.registrations().note(done.unwrap_or_else(|error| format!("failed: {error:#}")));
    }
    anyhow::bail!("bug: the queue of laboratory jobs is closed")
}

impl Laboratory {
    async fn burst(&self, users: u32) -> String {
        let mut outcomes: Vec<Result<Accepted>> = vec![];
        while (outcomes.len() as u32) < users {
            let next = AT_ONCE.min(users - outcomes.len() as u32);
            outcomes.extend(join_all((0..next).map(|_| self.register())).await);
        }
        let accepted = outcomes.iter().filter(|outcome| outcome.is_ok()).count();
        let refused = outcomes.into_iter().find_map(Result::err);
        let refused = refused.map_or(String::new(), |error| format!("; the others were not accepted: {error:#}"));
        format!("{accepted} of {users} registrations were accepted{refused}")
    }

    /// Registers one user, who is watched from then on.
    async fn register(&self) -> Result<Accepted> {
        let email = format!("lab-{}@{DOMAIN}", Uuid::new_v4().simple());
        let registered = self.apis.register(&email).await;
        let mut registrations = self.registrations();
        match &registered {
            Ok(accepted) => registrations.accept(accepted.id, email, accepted.version),
            Err(_) => registrations.refused += 1,
        }
        registered
    }

    async fn again(&self) -> Result<String> {
        let [facts, _] = USER.writes else { anyhow::bail!("the user service does not write two topics") };
        let published = |registration: &&Registration| registration.registered.places.contains_key(facts);
        let newest = self.registrations().all().rev().find(published).map(|registration| registration.user);
        let user = match newest {
            Some(user) => user,
            None => self.register().await?.id,
        };
        let place = self.until_published(user, facts).await?;
        let done = self.write_again(facts, place).await?;
        Ok(format!("{done} Its consumers must recognise the duplicate."))
    }

    /// The state of the first version arrives after that of the second one.
    async fn old_state(&self) -> Result<String> {
        let [_, states] = USER.writes else { anyhow::bail!("the user service does not write two topics") };
        let user = self.register().await?.id;
        let place = self.until_published(user, states).await?;
        let renamed = self.apis.rename(user).await?;
        self.registrations().set_version(user, renamed.version);
        let done = self.write_again(states, place).await?;
        let version = renamed.version;
        Ok(format!("{done} It has version 1 of user {user}. The cache must keep version {version}."))
    }

    /// Writes a record again through the control port. Without one, returns the command for it.
    async fn write_again(&self, topic: &'static str, (partition, offset): Place) -> Result<String> {
        let record = Coordinates { topic: topic.to_owned(), partition, offset };
        match &self.control {
            Some(control) => Ok(format!("{}.", control.again(&record).await?)),
            None => Ok(format!("run this command: `{}`.", commands::again(&record))),
        }
    }

    /// Waits until the console has seen a record of the user.
    async fn until_published(&self, user: Uuid, topic: &'static str) -> Result<Place> {
        let deadline = Instant::now() + RECORD_LIMIT;
        loop {
            let place = self.registrations().find(user).and_then(|found| found.registered.places.get(topic).copied());
            if let Some(place) = place {
                return Ok(place);
            }
            (Instant::now() < deadline)
                .then_some(())
                .with_context(|| format!("no record arrived in {topic}: is Kafka or the user service down?"))?;
            sleep(POLL_INTERVAL).await;
        }
    }
}
