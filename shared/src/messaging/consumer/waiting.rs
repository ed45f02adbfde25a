//! Why a consumer waits, and when it resumes. While it waits all partitions are paused, including
//! those assigned in the meantime, and it polls, so the group keeps it. It stores no offsets.

use std::time::{Duration, Instant};

use tokio::sync::watch;

use super::backoff::next_backoff;
use super::batch::TooManyRejections;
use super::breaker::Breaker;
use super::partitions::Partitions;
use super::start::ConsumerSetup;
use crate::messaging::handler::{Failure, Handler};

/// After this many failures of a batch in a row, its records are tried one by one, if the
/// dependency works.
const SUSPICIOUS_FAILURES: u32 = 4;
/// How often the lag is measured while the breaker is open, or while an operator has paused the
/// consumer.
const MEASURE_INTERVAL: Duration = Duration::from_secs(5);

/// Why and until when a consumer waits.
pub(super) struct Waiting {
    /// Why the consumer waits before it handles its batch again. `None`: it does not wait.
    pause: Option<Pause>,
    /// When the lag is measured next while an operator has paused the consumers of the process.
    /// `None`: no operator has. This pause is independent of the other one.
    held: Option<Instant>,
    paused: watch::Receiver<Option<String>>,
    pub(super) breaker: Breaker,
    /// Changes when an operator resumes the consumers whose breaker is open.
    resumed: watch::Receiver<()>,
}

enum Pause {
    /// A dependency is down. The batch is retried when it is due. `record_failures` counts the
    /// failures in a row that may be the fault of a record.
    Retry { due: Instant, backoff: Duration, record_failures: u32 },
    /// The breaker is open until an operator closes it.
    Breaker { measure_at: Instant },
}

impl Waiting {
    pub fn new(breaker: Breaker, resumed: watch::Receiver<()>, paused: watch::Receiver<Option<String>>) -> Self {
        Self { pause: None, held: None, paused, breaker, resumed }
    }

    /// Whether all partitions are paused.
    pub fn is_paused(&self) -> bool {
        self.pause.is_some() || self.held.is_some()
    }

    /// Pauses or resumes all partitions as an operator has ordered. Called between two batches. A
    /// batch that was polled is kept, and is handled when the consumer resumes. A crash ends the
    /// pause.
    pub fn follow_operator<H: Handler>(
        &mut self,
        setup: &ConsumerSetup<H>,
        partitions: &Partitions<'_>,
    ) -> anyhow::Result<()> {
        let ordered = self.paused.borrow().clone();
        let component = setup.component("paused");
        match (self.held, ordered) {
            (None, Some(reason)) => {
                partitions.pause()?;
                tracing::warn!(group = H::GROUP, reason, "consumer paused by an operator");
                setup.health.report(&component, format!("an operator to resume it. Paused by {reason}"));
                setup.metrics.consumer_paused.get_or_create(&setup.labels()).inc();
                self.held = Some(Instant::now());
            }
            (Some(_), None) => {
                self.held = None;
                tracing::info!(group = H::GROUP, "consumer resumed by an operator");
                setup.health.resolved(&component);
                setup.metrics.consumer_paused.get_or_create(&setup.labels()).dec();
                if self.pause.is_none() {
                    partitions.resume()?;
                }
            }
            (Some(measure_at), Some(_)) if measure_at <= Instant::now() => {
                partitions.measure_lag(partitions.next_offsets.keys().copied());
                self.held = Some(Instant::now() + MEASURE_INTERVAL);
            }
            (Some(_), Some(_)) | (None, None) => {}
        }
        Ok(())
    }

    /// Whether the batch has failed so often that one of its records may be the cause.
    pub fn suspects_a_record(&self) -> bool {
        matches!(self.pause, Some(Pause::Retry { record_failures, .. }) if record_failures >= SUSPICIOUS_FAILURES)
    }

    /// Whether the consumer may work on its batch now.
    pub fn may_work<H: Handler>(&mut self, setup: &ConsumerSetup<H>, partitions: &Partitions<'_>) -> bool {
        match self.pause {
            _ if self.held.is_some() => false,
            None => true,
            Some(Pause::Retry { due, .. }) => due <= Instant::now(),
            // `has_changed` fails only after the sender is dropped, that is, during shutdown.
            Some(Pause::Breaker { .. }) if self.resumed.has_changed().unwrap_or(false) => {
                self.close_breaker(setup);
                true
            }
            Some(Pause::Breaker { measure_at }) => {
                if measure_at <= Instant::now() {
                    partitions.measure_lag(partitions.next_offsets.keys().copied());
                    self.pause = Some(Pause::Breaker { measure_at: Instant::now() + MEASURE_INTERVAL });
                }
                false
            }
        }
    }

    /// Pauses all partitions until the batch is due again. `what` is what the consumer waits for,
    /// as `/status` shows it.
    pub fn retry_later<H: Handler>(
        &mut self,
        setup: &ConsumerSetup<H>,
        partitions: &Partitions<'_>,
        failure: &Failure,
        what: &str,
    ) -> anyhow::Result<()> {
        let (previous, record_failures) = match self.pause {
            Some(Pause::Retry { backoff, record_failures, .. }) => (Some(backoff), record_failures),
            Some(Pause::Breaker { .. }) | None => (None, 0),
        };
        let backoff = next_backoff(previous);
        let record_failures = if failure.is_outage() { 0 } else { record_failures + 1 };
        partitions.pause()?;
        setup.health.report(&setup.component("dependency"), what);
        tracing::warn!(group = H::GROUP, error = failure.describe(), "batch failed; consumer paused, will retry");
        setup.metrics.consumer_retries.get_or_create(&setup.labels()).inc();
        // Half of the wait is random, so that consumers of one dependency do not all retry at the
        // same time.
        let due = Instant::now() + backoff.mul_f64(0.5 + fastrand::f64() / 2.0);
        self.pause = Some(Pause::Retry { due, backoff, record_failures });
        partitions.measure_lag(partitions.next_offsets.keys().copied());
        Ok(())
    }

    /// Pauses all partitions until an operator resumes the consumer. The batch is kept, and the
    /// record that would be one too many gets no dead letter: it is tried again. Crash or restart:
    /// the batch comes again from Kafka, and its dead letters are written again with the same keys.
    pub fn open_breaker<H: Handler>(
        &mut self,
        setup: &ConsumerSetup<H>,
        partitions: &Partitions<'_>,
        rejections: &TooManyRejections,
    ) -> anyhow::Result<()> {
        let TooManyRejections { rejected, of, reason } = rejections;
        partitions.pause()?;
        self.resumed.mark_unchanged(); // earlier signals do not count
        tracing::error!(
            group = H::GROUP,
            reason,
            rejected,
            of,
            "breaker opened: too many of the last records were rejected, consumer paused. Fix the cause, then run \
             close-breakers, send SIGUSR1 to this process, or restart it"
        );
        let what = format!(
            "an operator: {rejected} of the last {of} records were rejected; fix the cause, then run close-breakers or send SIGUSR1"
        );
        setup.health.report(&setup.component("breaker"), what);
        setup.health.resolved(&setup.component("dependency"));
        setup.metrics.consumer_breaker_open.get_or_create(&setup.labels()).inc();
        self.pause = Some(Pause::Breaker { measure_at: Instant::now() });
        Ok(())
    }

    /// The partitions stay paused until the batch has been handled.
    fn close_breaker<H: Handler>(&mut self, setup: &ConsumerSetup<H>) {
        tracing::info!(group = H::GROUP, "breaker closed by an operator: retrying the batch");
        self.breaker.close();
        setup.health.resolved(&setup.component("breaker"));
        setup.metrics.consumer_breaker_open.get_or_create(&setup.labels()).dec();
    }

    /// Resumes the partitions if they are paused.
    pub fn end<H: Handler>(&mut self, setup: &ConsumerSetup<H>, partitions: &Partitions<'_>) -> anyhow::Result<()> {
        if self.pause.take().is_some() {
            setup.health.resolved(&setup.component("dependency"));
            tracing::info!(group = H::GROUP, "the consumer handles records again; its partitions are resumed");
            partitions.resume()?;
        }
        Ok(())
    }
}
