//! The consumer: one OS thread that polls, handles and stores offsets in turn. Rebalance callbacks run only inside `poll`, when
//! nothing is in hand, so there is nothing to drain and nothing to race with. Scale by more consumers, not by threads per
//! partition.
//!
//! What is stored is the offset of the next record, and only after the effects are durable; librdkafka commits what is stored
//! each second, on a revoke and on shutdown.

mod assignment;
mod batch;
mod placement;
mod start;

use std::collections::{BTreeMap, BTreeSet};
use std::sync::atomic::Ordering::Relaxed;
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use rdkafka::consumer::{BaseConsumer, CommitMode, Consumer as _};
use rdkafka::error::{KafkaError, RDKafkaErrorCode};
use rdkafka::message::{Message, OwnedMessage};
use rdkafka::{Offset, TopicPartitionList};
use tokio::runtime::Handle as Runtime;
use tokio::time::timeout;

use super::dead_letters::DeadLetters;
use super::{Failure, Handler};
use crate::fault;
use crate::service::metrics;
use assignment::Assignment;
pub(crate) use start::Consumer;

/// Records per batch.
pub(super) const BATCH_RECORDS: usize = 500;
/// Bytes after which a batch takes no further record. A record has 1 MiB at most, so this and one more is the bound.
pub(super) const BATCH_BYTES: usize = 4 * 1024 * 1024;
/// How long an empty hand waits for a first record; also how soon a stop is noticed.
const IDLE_POLL: Duration = Duration::from_millis(100);
/// How long a started batch waits for more.
const LINGER: Duration = Duration::from_millis(2);
/// How often [`Handler::caught_up`] is told while nothing comes.
const CAUGHT_UP_INTERVAL: Duration = Duration::from_secs(1);
const KAFKA_TIMEOUT: Duration = Duration::from_secs(3);
const MIN_BACKOFF: Duration = Duration::from_millis(100);
const MAX_BACKOFF: Duration = Duration::from_secs(5);

/// A partition's next try, and how long to wait after it.
struct Retry {
    due: Instant,
    backoff: Duration,
}

struct Running<H> {
    setup: Consumer<H>,
    client: BaseConsumer<Assignment>,
    runtime: Runtime,
    dead_letters: DeadLetters,
    /// In hand: polled, not yet handled.
    batch: Vec<OwnedMessage>,
    /// Per placed partition the position up to which the handler has everything.
    reached: BTreeMap<i32, i64>,
    /// The partitions behind whose last handled record there was nothing.
    at_end: BTreeSet<i32>,
    /// When `caught_up` was last told; `None` when there is something new to tell.
    told_at: Option<Instant>,
    /// Not before this are unplaced partitions looked at.
    place_at: Instant,
    /// Set while a dependency is down. Every partition is paused then, but polling goes on, so the group keeps us.
    retry: Option<Retry>,
}

impl<H: Handler> Running<H> {
    /// Crash anywhere: what was not stored, or stored and not committed, comes again.
    fn run(mut self) -> anyhow::Result<()> {
        while !self.setup.stop.is_cancelled() {
            if self.retry.is_none() {
                self.place();
            }
            self.collect()?;
            if self.retry.as_ref().is_none_or(|retry| retry.due <= Instant::now()) {
                let result = self.work();
                self.conclude(result)?;
            }
        }
        // Not an error when there is nothing to commit, or when the automatic commit was faster.
        let _ = self.client.commit_consumer_state(CommitMode::Sync);
        Ok(())
    }

    /// Polls until the batch is full or nothing more comes at once. While a batch is put off it polls all the same, else the
    /// group would think us dead; everything is paused then, so what comes is no more than news of the group.
    fn collect(&mut self) -> anyhow::Result<()> {
        let mut wait = IDLE_POLL;
        let mut bytes = 0;
        while self.retry.is_some() || (self.batch.len() < BATCH_RECORDS && bytes < BATCH_BYTES) {
            match self.client.poll(wait) {
                None => break,
                Some(Ok(message)) => {
                    self.at_end.remove(&message.partition());
                    bytes += message.payload_len() + message.key_len();
                    self.batch.push(message.detach());
                    wait = LINGER;
                }
                Some(Err(KafkaError::PartitionEOF(partition))) => {
                    self.at_end.insert(partition);
                    self.told_at = None;
                    wait = Duration::ZERO;
                }
                Some(Err(error)) => {
                    self.survive(error)?;
                    break;
                }
            }
        }
        if !self.batch.is_empty() {
            fault::point("consumer.after_poll");
        }
        for partition in self.client.context().take_revoked() {
            self.at_end.remove(&partition);
            self.reached.remove(&partition);
        }
        // What was polled before a revoke belongs to another consumer now, and what has no start yet is not for us to read.
        self.batch.retain(|message| self.reached.contains_key(&message.partition()));
        Ok(())
    }

    /// An error of the client: most mend themselves while we keep polling, and `/readyz` follows the statistics.
    fn survive(&self, error: KafkaError) -> anyhow::Result<()> {
        if let Some((code, reason)) = self.client.client().fatal_error() {
            bail!("the Kafka client gave up: {code}: {reason}");
        }
        if error.rdkafka_error_code() == Some(RDKafkaErrorCode::AutoOffsetReset) {
            bail!(
                "group {} stands at an offset that Kafka does not have (any more); nothing was skipped. Find out what \
                 deleted the records, then set the group's offsets by hand: {error}",
                self.setup.group
            );
        }
        tracing::debug!(group = self.setup.group, %error, "Kafka client");
        Ok(())
    }

    /// Handles what is in hand, then tells the handler where it has caught up.
    fn work(&mut self) -> Result<(), Failure> {
        if !self.batch.is_empty() {
            batch::handle(self)?;
            fault::point("consumer.after_effect");
            let handled = self.batch.iter().map(|message| (message.partition(), message.offset() + 1));
            self.store_offsets(handled.collect())?;
            fault::point("consumer.after_store");
            self.batch.clear();
        }
        if self.told_at.is_none_or(|told_at| told_at.elapsed() >= CAUGHT_UP_INTERVAL) {
            self.tell_caught_up()?;
            self.told_at = Some(Instant::now());
        }
        Ok(())
    }

    /// At the end of a partition the position lies behind the last transaction's marker, where no record will ever be: storing
    /// it makes the lag read 0.
    fn tell_caught_up(&mut self) -> Result<(), Failure> {
        let positions = self.client.position()?;
        for partition in self.at_end.clone() {
            let Some(&after) = self.reached.get(&partition) else { continue };
            let position =
                match positions.find_partition(&self.setup.topic(), partition).map(|element| element.offset()) {
                    Some(Offset::Offset(position)) => position.max(after),
                    _ => after,
                };
            let told = self.setup.handler.caught_up(partition, after, position);
            let told = self.runtime.block_on(async { timeout(self.setup.kafka.handle_timeout(), told).await })?;
            if matches!(told, Err(Failure::Resume)) {
                self.unplace(&[partition])?;
                continue;
            }
            told?;
            self.reached.insert(partition, position);
            self.store_offsets(BTreeMap::from([(partition, position)]))?;
        }
        Ok(())
    }

    /// The next offset per partition, as it is: the other calls of this family add one.
    fn store_offsets(&self, next: BTreeMap<i32, i64>) -> anyhow::Result<()> {
        let topic = self.setup.topic();
        let mut offsets = TopicPartitionList::new();
        for (partition, offset) in next {
            offsets.add_partition_offset(&topic, partition, Offset::Offset(offset))?;
        }
        self.client.store_offsets(&offsets).context("cannot store offsets")
    }

    /// Draws the consequence of a turn's result.
    fn conclude(&mut self, result: Result<(), Failure>) -> anyhow::Result<()> {
        match result {
            Ok(()) => {
                if self.retry.take().is_some() {
                    self.setup.health.ready(&self.setup.part("dependency"));
                    tracing::info!(group = self.setup.group, "goes on");
                    self.client.context().paused.store(false, Relaxed);
                    self.client.resume(&self.list(&self.reached.keys().copied().collect::<Vec<_>>()))?;
                }
                Ok(())
            }
            Err(Failure::Resume) => {
                let partitions: BTreeSet<i32> = self.batch.drain(..).map(|message| message.partition()).collect();
                tracing::info!(group = self.setup.group, ?partitions, "the stored position differs: starting there");
                self.unplace(&partitions.into_iter().collect::<Vec<_>>())?;
                self.conclude(Ok(()))
            }
            Err(Failure::Retry(error)) => self.put_off(&error),
            Err(Failure::Reject(reason)) => self.put_off(&anyhow::anyhow!("rejected without a record: {reason}")),
        }
    }

    fn put_off(&mut self, error: &anyhow::Error) -> anyhow::Result<()> {
        let backoff = match &self.retry {
            None => {
                self.client.context().paused.store(true, Relaxed);
                self.client.pause(&self.list(&self.reached.keys().copied().collect::<Vec<_>>()))?;
                self.setup.health.waiting(&self.setup.part("dependency"), "what its handler needs to work again");
                MIN_BACKOFF
            }
            Some(retry) => (retry.backoff * 2).min(MAX_BACKOFF),
        };
        tracing::warn!(group = self.setup.group, error = %format!("{error:#}"), "paused: will try again");
        let group = metrics::Group { group: self.setup.group.clone() };
        self.setup.metrics.consumer_retries.get_or_create(&group).inc();
        // Half of it is chance, so that consumers of one dependency do not come back in step.
        let due = Instant::now() + backoff.mul_f64(0.5 + fastrand::f64() / 2.0);
        self.retry = Some(Retry { due, backoff });
        self.measure_lag();
        Ok(())
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
}
