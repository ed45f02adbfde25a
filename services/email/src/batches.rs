//! Statements that the senders of a process share. While one is in progress, further senders wait,
//! and the next one serves all of them. With a backlog most of the cost of a mail in the database
//! is the commit, and senders that share it are several times as fast.

use std::sync::Arc;

use shared::platform::batching::{Caller, Calls, batching};
use shared::platform::database::bounded;
use sqlx::PgPool;
use tokio::time::Instant;
use uuid::Uuid;

use crate::deliveries::{self, Accepted, Claim, Due, Rules};
use crate::mail;

/// The most senders of a process, and so the most that share a statement.
pub const MAX_SENDERS: u16 = 64;

/// Settings of the sessions that make these statements. Their plans are made once: by default
/// Postgres plans some of them again each time, because it does not know how long an array will be.
/// The statements find rows by an index, whatever the statistics say: these may be from a time when
/// the table was almost empty.
pub const SESSION_SETTINGS: [(&str, &str); 2] = [("plan_cache_mode", "force_generic_plan"), ("enable_seqscan", "off")];

/// An accepted mail to record, and whether the sender wants a delivery.
type Turn = (Option<Accepted>, bool);
/// Whether the record changed the state, and a delivery that was due. A claim's lease lasts at
/// least until the time.
type Next = (bool, Option<(Due, Instant)>);

/// Clones share the statements.
#[derive(Clone)]
pub struct Batches {
    turns: Caller<Turn, Result<Next, Arc<sqlx::Error>>>,
    /// The id and the token of a claim.
    checks: Caller<(Uuid, Uuid), bool>,
}

/// The calls of the senders.
pub struct Waiting {
    turns: Calls<Turn, Result<Next, Arc<sqlx::Error>>>,
    checks: Calls<(Uuid, Uuid), bool>,
}

pub fn batches() -> (Batches, Waiting) {
    let (turns, waiting_turns) = batching(MAX_SENDERS.into());
    let (checks, waiting_checks) = batching(MAX_SENDERS.into());
    (Batches { turns, checks }, Waiting { turns: waiting_turns, checks: waiting_checks })
}

impl Batches {
    /// Records a mail that was accepted, and claims a delivery if `claims`: see
    /// [`deliveries::record_and_claim`].
    ///
    /// # Errors
    /// The database does not answer, or one of the mails cannot be recorded.
    pub async fn record_and_claim(&self, accepted: Option<Accepted>, claims: bool) -> anyhow::Result<Next> {
        let answer = self.turns.call((accepted, claims)).await;
        Ok(answer.unwrap_or_else(|| Err(Arc::new(sqlx::Error::PoolClosed)))?)
    }

    /// Whether the mail may still be sent: see [`deliveries::check`]. `false` also if the database
    /// does not answer.
    pub async fn check(&self, claim: &Claim) -> bool {
        self.checks.call((claim.id, claim.token)).await.unwrap_or(false)
    }
}

impl Waiting {
    /// Runs until every sender has ended.
    pub async fn run(self, db: PgPool, rules: Rules) -> anyhow::Result<()> {
        tokio::join!(turns(self.turns, &db, &rules), checks(self.checks, &db, &rules));
        Ok(())
    }
}

async fn turns(mut calls: Calls<Turn, Result<Next, Arc<sqlx::Error>>>, db: &PgPool, rules: &Rules) {
    let templates = mail::template_names();
    while let Some((turns, answers)) = calls.next().await {
        let (accepted, claims): (Vec<_>, Vec<_>) = turns.into_iter().unzip();
        let records: Vec<bool> = accepted.iter().map(Option::is_some).collect();
        let accepted: Vec<Accepted> = accepted.into_iter().flatten().collect();
        let wanted = claims.iter().filter(|claims| **claims).count();
        // Computed before the statement, so that this process never assumes a longer lease than the
        // database.
        let until = Instant::now() + rules.lease;
        match bounded(deliveries::record_and_claim(db, &accepted, rules, &templates, wanted)).await {
            Ok((changed, due)) => {
                let mut changed = changed.into_iter();
                let mut due = due.into_iter();
                answers.send(records.iter().zip(claims).map(|(records, claims)| {
                    let changed = *records && changed.next().unwrap_or(false);
                    let due = if claims { due.next() } else { None };
                    Ok((changed, due.map(|due| (due, until))))
                }));
            }
            Err(error) => {
                let error = Arc::new(error);
                answers.send_to_all(|| Err(error.clone()));
            }
        }
    }
}

async fn checks(mut calls: Calls<(Uuid, Uuid), bool>, db: &PgPool, rules: &Rules) {
    while let Some((claims, answers)) = calls.next().await {
        match bounded(deliveries::check(db, &claims, rules)).await {
            Ok(may_send) => answers.send(may_send),
            Err(_) => answers.send_to_all(|| false),
        }
    }
}
