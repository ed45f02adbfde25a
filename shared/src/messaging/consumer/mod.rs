//! The consumer: one OS thread that polls, handles and stores offsets in turn. Rebalance callbacks run only inside `poll`, when
//! nothing is in hand, so there is nothing to drain and nothing to race with. Scale by more consumers, not by threads per
//! partition.
//!
//! What is stored is the offset of the next record, and only after the effects are durable; librdkafka commits what is stored
//! each second, on a revoke and on shutdown.

mod assignment;
mod batch;
mod breaker;
mod pause;
mod placement;
mod start;

use std::collections::{BTreeMap, BTreeSet};
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
use assignment::Assignment;
use batch::Done;
use breaker::Breaker;
use pause::{Halt, Pause};
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

struct Running<H> {
    setup: Consumer<H>,
    client: BaseConsumer<Assignment>,
    runtime: Runtime,
    dead_letters: DeadLetters,
    /// In hand: polled, not yet handled.
    batch: Vec<OwnedMessage>,
    /// What of it is handled, if it was put off in the middle.
    done: Done,
    /// Partition and offset of what was in hand when the handler was found to stand elsewhere.
    dropped: BTreeSet<(i32, i64)>,
    breaker: Breaker,
    /// Per placed partition the position up to which the handler has everything.
    reached: BTreeMap<i32, i64>,
    /// The partitions behind whose last handled record there was nothing.
    at_end: BTreeSet<i32>,
    /// When `caught_up` was last told; `None` when there is something new to tell.
    told_at: Option<Instant>,
    /// Not before this are unplaced partitions looked at.
    place_at: Instant,
    /// Set while every partition is paused. Polling goes on, so the group keeps us.
    pause: Option<Pause>,
}

impl<H: Handler> Running<H> {
    /// Crash anywhere: what was not stored, or stored and not committed, comes again.
    fn run(mut self) -> anyhow::Result<()> {
        while !self.setup.stop.is_cancelled() {
            if self.pause.is_none() {
                self.place();
            }
            self.collect()?;
            if self.may_work() {
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
        while self.pause.is_some() || (self.batch.len() < BATCH_RECORDS && bytes < BATCH_BYTES) {
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
        let idle = self.client.context().idle();
        if !idle.is_empty() && self.pause.is_none() {
            tracing::warn!(group = self.setup.group, partitions = ?idle, "the client does not read them: starting them anew");
            self.unplace(&idle)?;
        }
        if !self.batch.is_empty() {
            fault::point("consumer.after_poll");
        }
        for partition in self.client.context().take_revoked() {
            self.at_end.remove(&partition);
            self.reached.remove(&partition);
            self.dropped.retain(|(of, _)| *of != partition);
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
    fn work(&mut self) -> Result<(), Halt> {
        if !self.batch.is_empty() {
            batch::handle(self)?;
            fault::point("consumer.after_effect");
            let handled = self.batch.iter().map(|message| (message.partition(), message.offset() + 1));
            self.store_offsets(handled.collect())?;
            fault::point("consumer.after_store");
            self.batch.clear();
        }
        batch::count(self); // also where the last records of a batch were taken away while it was put off
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
}
