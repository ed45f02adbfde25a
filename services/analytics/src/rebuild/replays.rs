//! The replays of the rebuild: one for each consumer group, from the beginning of its topic to the
//! point where the live model can be swapped.

use std::time::{Duration, Instant};

use anyhow::{Context, ensure};
use shared::messaging::{Inbox, KafkaConfig, Replay};
use sqlx::{PgConnection, PgPool};

use super::options::{Rebuild, print_line};
use crate::audit::Audit;
use crate::projections::{Mailed, Registered};

/// How many offsets may remain to be read while the live model is locked. Reading them takes a few
/// tenths of a second.
const REMAINDER: i64 = 5_000;
const POLL_INTERVAL: Duration = Duration::from_millis(100);

/// The replays into the rebuilt model.
pub struct Replays {
    users: Replay<Inbox<Registered>>,
    emails: Replay<Inbox<Mailed>>,
    audit: Replay<Audit>,
}

impl Replays {
    /// `rebuilt` is a pool on the tables to fill, which are empty.
    pub fn new(kafka: &KafkaConfig, rebuilt: PgPool) -> anyhow::Result<Self> {
        Ok(Self {
            users: Replay::new(kafka, Inbox::new(rebuilt.clone(), Registered))?,
            emails: Replay::new(kafka, Inbox::new(rebuilt.clone(), Mailed))?,
            audit: Replay::new(kafka, Audit { db: rebuilt })?,
        })
    }

    /// Checks that Kafka still has the whole history: a rebuild cannot fold deleted events.
    pub fn require_history(&self, options: &Rebuild) -> anyhow::Result<()> {
        let topics = [(self.users.topic(), self.users.truncated()), (self.emails.topic(), self.emails.truncated())];
        for (topic, truncated) in topics {
            if truncated == 0 {
                continue;
            }
            ensure!(
                options.accept_lost_history,
                "Kafka has deleted the first {truncated} offsets of {topic}: a rebuild would lose their effects. Find out what \
                 deleted them (facts have retention.ms=-1). --accept-lost-history rebuilds from the remaining events"
            );
            print_line(&format!(
                "warning: Kafka has deleted {truncated} offsets of {topic}; the rebuilt model lacks their effects"
            ));
        }
        Ok(())
    }

    /// Replays the topics until few events are left to apply. Then the rebuilt model has read the
    /// topics up to a fixed point, and the live model has passed that point. If the live model
    /// lacks an event before the point, it skipped the event: the event is a dead letter, or the
    /// release did not know its type. The rebuilt model contains such an event if its projections
    /// accept it.
    pub async fn catch_up(&mut self, live: &mut PgConnection, wait: Duration) -> anyhow::Result<()> {
        loop {
            self.users.advance(live).await?;
            self.emails.advance(live).await?;
            self.audit.advance(live).await?;
            let deadline = Instant::now() + wait;
            loop {
                let lag = self.users.live_lag()? + self.emails.live_lag()? + self.audit.live_lag()?;
                if lag == 0 {
                    break;
                }
                ensure!(
                    Instant::now() < deadline,
                    "the live model did not reach the rebuilt one within {wait:?}, {lag} offsets are left: is the service \
                     running? Let it catch up and run this again, or allow more time with --wait-seconds"
                );
                tokio::time::sleep(POLL_INTERVAL).await;
                // Prevents the session's idle time-out, which would release the lock, and detects a
                // lost session.
                sqlx::query("select 1").execute(&mut *live).await.context("the live database does not answer")?;
            }
            if self.few_are_left()? {
                return Ok(());
            }
        }
    }

    /// Whether the events after the last catch-up can be applied while the live model is locked.
    pub fn few_are_left(&self) -> anyhow::Result<bool> {
        Ok(self.users.remaining()? + self.emails.remaining()? + self.audit.remaining()? <= REMAINDER)
    }

    /// Applies the events that the live model has applied since the last catch-up.
    pub async fn complete(&self, live: &mut PgConnection) -> anyhow::Result<()> {
        self.users.complete(live).await?;
        self.emails.complete(live).await?;
        self.audit.complete(live).await
    }
}
