//! Why a consumer waits, and how it goes on. While it waits every partition is paused, also those assigned meanwhile, and
//! polling goes on, so the group keeps it. Nothing is stored: the offsets stay where they were.

use std::collections::BTreeSet;
use std::sync::atomic::Ordering::Relaxed;
use std::time::{Duration, Instant};

use rdkafka::Message;
use rdkafka::consumer::Consumer as _;

use super::{KAFKA_TIMEOUT, Running, batch};
use crate::messaging::{Failure, Handler};
use crate::service::metrics::Group;

const MIN_BACKOFF: Duration = Duration::from_millis(100);
const MAX_BACKOFF: Duration = Duration::from_secs(5);

/// Why a batch did not end.
pub(super) enum Halt {
    /// The handler, or Kafka, said so.
    Failure(Failure),
    /// A dead letter could not be written.
    Unwritten(anyhow::Error),
    /// The next dead letter would be one too many: `rejected` of the last `of` records, this one for `reason`.
    Breaker { rejected: usize, of: usize, reason: String },
}

impl<E: Into<Failure>> From<E> for Halt {
    fn from(failure: E) -> Self {
        Self::Failure(failure.into())
    }
}

/// Until when everything is paused.
pub(super) enum Pause {
    /// What is needed is down: the batch is tried again when it is due.
    Retry { due: Instant, backoff: Duration },
    /// The breaker is open: until an operator says so. Meanwhile the lag is measured.
    Breaker { measure_at: Instant },
}

impl<H: Handler> Running<H> {
    /// Whether the batch in hand may be tried now.
    pub(super) fn may_work(&mut self) -> bool {
        match self.pause {
            None => true,
            Some(Pause::Retry { due, .. }) => due <= Instant::now(),
            // An error: nobody can say it any more, because the process ends.
            Some(Pause::Breaker { .. }) if self.setup.resumed.has_changed().unwrap_or(false) => {
                self.close_breaker();
                true
            }
            Some(Pause::Breaker { measure_at }) => {
                if measure_at <= Instant::now() {
                    self.measure_lag();
                    self.pause = Some(Pause::Breaker { measure_at: Instant::now() + MAX_BACKOFF });
                }
                false
            }
        }
    }

    /// Draws the consequence of a turn's result.
    pub(super) fn conclude(&mut self, result: Result<(), Halt>) -> anyhow::Result<()> {
        match result {
            Ok(()) => {
                if self.pause.take().is_some() {
                    self.setup.health.ready(&self.setup.part("dependency"));
                    tracing::info!(group = self.setup.group, "goes on");
                    self.client.context().paused.store(false, Relaxed);
                    self.client.resume(&self.list(&self.reached.keys().copied().collect::<Vec<_>>()))?;
                }
                Ok(())
            }
            Err(Halt::Failure(Failure::Resume)) => {
                let partitions: BTreeSet<i32> = self.batch.iter().map(|message| message.partition()).collect();
                tracing::info!(group = self.setup.group, ?partitions, "the stored position differs: starting there");
                batch::drop_unfinished(self);
                self.unplace(&partitions.into_iter().collect::<Vec<_>>())?;
                self.conclude(Ok(()))
            }
            Err(Halt::Failure(Failure::Retry(error))) => self.put_off(&error, "what its handler needs to work again"),
            Err(Halt::Failure(Failure::Reject(reason))) => {
                self.put_off(&anyhow::anyhow!("rejected without a record: {reason}"), "its handler to work again")
            }
            Err(Halt::Unwritten(error)) => {
                let what =
                    format!("Kafka to take a dead letter into {}: look at that topic", self.dead_letters.topic());
                self.put_off(&error, &what)
            }
            Err(Halt::Breaker { rejected, of, reason }) => self.open_breaker(rejected, of, &reason),
        }
    }

    fn put_off(&mut self, error: &anyhow::Error, what: &str) -> anyhow::Result<()> {
        let backoff = longer(match self.pause {
            Some(Pause::Retry { backoff, .. }) => Some(backoff),
            _ => None,
        });
        self.stop_fetching()?;
        self.setup.health.waiting(&self.setup.part("dependency"), what);
        tracing::warn!(group = self.setup.group, error = %format!("{error:#}"), "paused: will try again");
        self.setup.metrics.consumer_retries.get_or_create(&self.label()).inc();
        // Half of it is chance, so that consumers of one dependency do not come back in step.
        let due = Instant::now() + backoff.mul_f64(0.5 + fastrand::f64() / 2.0);
        self.pause = Some(Pause::Retry { due, backoff });
        self.measure_lag();
        Ok(())
    }

    /// The batch stays in hand, and the record that was one too many is not set aside: it is tried again when somebody says so.
    /// Crash or restart: the batch comes again from Kafka, and the letters that it wrote are the same letters.
    fn open_breaker(&mut self, rejected: usize, of: usize, reason: &str) -> anyhow::Result<()> {
        self.stop_fetching()?;
        self.setup.resumed.mark_unchanged(); // what was said before is not about this
        let group = &self.setup.group;
        tracing::error!(
            group,
            reason,
            rejected,
            of,
            "the breaker is open: paused, since {rejected} of the last {of} records were rejected. Mend the cause, then send \
             this process SIGUSR1, or restart it"
        );
        let what =
            format!("an operator: {rejected} of the last {of} records were rejected; mend the cause, then SIGUSR1");
        self.setup.health.waiting(&self.setup.part("breaker"), what);
        self.setup.health.ready(&self.setup.part("dependency"));
        self.setup.metrics.consumer_breaker_open.get_or_create(&self.label()).inc();
        self.pause = Some(Pause::Breaker { measure_at: Instant::now() });
        Ok(())
    }

    /// Everything stays paused until the batch in hand has ended.
    fn close_breaker(&mut self) {
        tracing::info!(group = self.setup.group, "the breaker is closed: trying again");
        self.breaker.close();
        self.setup.health.ready(&self.setup.part("breaker"));
        self.setup.metrics.consumer_breaker_open.get_or_create(&self.label()).dec();
    }

    fn stop_fetching(&self) -> anyhow::Result<()> {
        self.client.context().paused.store(true, Relaxed);
        Ok(self.client.pause(&self.list(&self.reached.keys().copied().collect::<Vec<_>>()))?)
    }

    /// The lag of what is paused, so that it is seen to grow. Unknown where Kafka does not answer either.
    fn measure_lag(&self) {
        for (partition, reached) in &self.reached {
            let Ok((_, end)) = self.client.fetch_watermarks(&self.setup.topic(), *partition, KAFKA_TIMEOUT) else {
                return;
            };
            self.client.context().measured_lag(*partition, end - reached);
        }
    }

    fn label(&self) -> Group {
        Group { group: self.setup.group.clone() }
    }
}

/// The wait after the one before it, if there was one.
fn longer(before: Option<Duration>) -> Duration {
    before.map_or(MIN_BACKOFF, |before| (before * 2).min(MAX_BACKOFF))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A dependency that is down is asked less and less often, but never less than every five seconds.
    #[test]
    fn each_wait_is_twice_the_last_up_to_a_bound() {
        let waits = std::iter::successors(Some(longer(None)), |before| Some(longer(Some(*before))));
        let waits: Vec<u128> = waits.take(8).map(|wait| wait.as_millis()).collect();
        assert_eq!(waits, [100, 200, 400, 800, 1600, 3200, 5000, 5000]);
    }
}
