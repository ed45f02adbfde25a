//! The consumer: one OS thread that polls, handles and stores offsets in turn. Rebalance callbacks run only inside `poll`, when
//! nothing is in hand, so there is nothing to drain and nothing to race with. Scale by more consumers, not by threads per
//! partition.
//!
//! What is stored is the offset of the next record, and only after the effects are durable; librdkafka commits what is stored
//! each second, on a revoke and on shutdown.

mod assignment;
mod batch;

use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use rdkafka::consumer::{BaseConsumer, CommitMode, Consumer as _};
use rdkafka::error::{KafkaError, RDKafkaErrorCode};
use rdkafka::message::{Message, OwnedMessage};
use rdkafka::{ClientConfig, Offset, TopicPartitionList};
use tokio::runtime::Handle as Runtime;
use tokio_util::sync::CancellationToken;

use super::dead_letters::DeadLetters;
use super::topics;
use super::{Failure, Handler};
use crate::events::Event;
use crate::fault;
use crate::service::metrics::{self, Metrics};
use crate::service::{Health, KafkaConfig};
use assignment::Assignment;

/// Records per batch.
const BATCH_RECORDS: usize = 500;
/// How long an empty hand waits for a first record; also how soon a stop is noticed.
const IDLE_POLL: Duration = Duration::from_millis(100);
/// How long a started batch waits for more.
const LINGER: Duration = Duration::from_millis(2);
/// How often [`Handler::caught_up`] is told while nothing comes.
const CAUGHT_UP_INTERVAL: Duration = Duration::from_secs(1);
const KAFKA_TIMEOUT: Duration = Duration::from_secs(3);
const MIN_BACKOFF: Duration = Duration::from_millis(100);
const MAX_BACKOFF: Duration = Duration::from_secs(5);

/// A consumer before its thread starts.
pub(crate) struct Consumer<H> {
    pub group: String,
    pub number: u16,
    pub handler: H,
    pub kafka: KafkaConfig,
    pub health: Health,
    pub metrics: Metrics,
    pub stop: CancellationToken,
}

impl<H: Handler> Consumer<H> {
    /// Consumes until told to stop.
    ///
    /// # Errors
    /// What waiting cannot mend: the client's settings, an offset out of range, a topic that differs from its declaration.
    pub fn run(self) -> anyhow::Result<()> {
        let runtime = Runtime::current();
        let part = format!("{} {}", self.group, self.number);
        self.health.waiting(&part, format!("the topic {}", self.topic()));
        let dead_letters = DeadLetters::new(&self.kafka, &self.group, H::Event::TOPIC.kind)?;
        let dead_letter_topic = dead_letters.topic().to_owned();
        let ready = runtime.block_on(self.stop.run_until_cancelled(async {
            topics::ensure_one(&self.kafka, &dead_letter_topic, 1, super::dead_letters::SETTINGS).await?;
            topics::exists(&self.kafka, &self.topic(), H::Event::TOPIC.partitions).await
        }));
        let Some(ready) = ready else { return Ok(()) };
        ready?;
        let assignment = Assignment::new(self.topic(), self.group.clone(), part, &self.health, &self.metrics);
        let client: BaseConsumer<Assignment> =
            self.client().create_with_context(assignment).context("the Kafka settings are wrong")?;
        client.subscribe(&[&self.topic()]).context("cannot subscribe")?;
        let consumer = Running {
            client,
            runtime,
            dead_letters,
            batch: Vec::with_capacity(BATCH_RECORDS),
            reached: BTreeMap::new(),
            at_end: BTreeSet::new(),
            told_at: Instant::now(),
            retry: None,
            setup: self,
        };
        consumer.run()
    }

    fn topic(&self) -> String {
        self.kafka.prefixed(H::Event::TOPIC.name)
    }

    fn client(&self) -> ClientConfig {
        let mut client = self.kafka.client();
        client
            .set("group.id", self.kafka.prefixed(&self.group))
            .set("partition.assignment.strategy", "cooperative-sticky")
            .set("isolation.level", "read_committed")
            .set("enable.auto.offset.store", "false")
            .set("auto.commit.interval.ms", "1000")
            // Every partition's start is chosen by us; an offset that Kafka does not have stops us instead of skipping.
            .set("auto.offset.reset", "error")
            .set("enable.partition.eof", "true")
            .set("session.timeout.ms", "10000")
            .set("statistics.interval.ms", "500")
            .set("queued.max.messages.kbytes", "16384") // the bound on memory
            .set("fetch.wait.max.ms", "100");
        client
    }
}

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
    /// When `caught_up` was last told.
    told_at: Instant,
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

    /// Gives each newly assigned partition its start and lets it run. It came in paused; whatever fails here is asked again on
    /// the next turn, and nothing is read meanwhile: a start is never guessed.
    fn place(&mut self) {
        let unplaced = self.client.context().unplaced();
        if unplaced.is_empty() {
            return;
        }
        let part = format!("{} start", self.setup.group);
        match self.try_place(&unplaced) {
            Ok(()) => self.setup.health.ready(&part),
            Err(error) => {
                self.setup.health.waiting(&part, "its position");
                tracing::warn!(group = self.setup.group, error = %format!("{error:#}"), "cannot place partitions yet");
            }
        }
    }

    fn try_place(&mut self, unplaced: &[i32]) -> anyhow::Result<()> {
        let topic = self.setup.topic();
        let mut starts = TopicPartitionList::new();
        for partition in unplaced {
            starts.add_partition(&topic, *partition);
        }
        let committed =
            self.client.committed_offsets(starts, KAFKA_TIMEOUT).context("cannot ask for committed offsets")?;
        let mut placed = Vec::new();
        let mut starts = TopicPartitionList::new();
        for element in committed.elements() {
            element.error()?;
            let own = self.runtime.block_on(self.setup.handler.resume_at(element.partition()));
            let start = match (own.context("cannot ask the handler for its position")?, element.offset()) {
                (Some(own), _) => own,
                (None, Offset::Offset(committed)) => committed,
                (None, _) => 0,
            };
            let offset = if start == 0 { Offset::Beginning } else { Offset::Offset(start) };
            starts.add_partition_offset(&topic, element.partition(), offset)?;
            placed.push((element.partition(), start));
        }
        for sought in self.client.seek_partitions(starts, KAFKA_TIMEOUT)?.elements() {
            sought.error().context("cannot seek")?;
        }
        for (partition, start) in placed {
            self.reached.insert(partition, start);
            self.at_end.remove(&partition);
        }
        self.client.resume(&self.list(unplaced))?;
        self.client.context().placed(unplaced);
        Ok(())
    }

    /// Polls until the batch is full or nothing more comes at once.
    fn collect(&mut self) -> anyhow::Result<()> {
        let mut wait = if self.batch.is_empty() || self.retry.is_some() { IDLE_POLL } else { Duration::ZERO };
        while self.batch.len() < BATCH_RECORDS {
            match self.client.poll(wait) {
                None => break,
                Some(Ok(message)) => {
                    self.at_end.remove(&message.partition());
                    self.batch.push(message.detach());
                    wait = LINGER;
                }
                Some(Err(KafkaError::PartitionEOF(partition))) => {
                    self.at_end.insert(partition);
                    self.told_at -= CAUGHT_UP_INTERVAL;
                    wait = Duration::ZERO;
                }
                Some(Err(error)) => {
                    self.survive(error)?;
                    break;
                }
            }
        }
        fault::point("consumer.after_poll");
        // What was polled before a revoke belongs to another consumer now. What was assigned since is still paused.
        for partition in self.client.context().take_revoked() {
            self.batch.retain(|message| message.partition() != partition);
            self.at_end.remove(&partition);
            self.reached.remove(&partition);
        }
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
        if self.told_at.elapsed() >= CAUGHT_UP_INTERVAL {
            self.told_at = Instant::now();
            self.tell_caught_up()?;
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
            let told = self.runtime.block_on(self.setup.handler.caught_up(partition, after, position));
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
                    self.setup.health.ready(&self.setup.group);
                    tracing::info!(group = self.setup.group, "goes on");
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
                self.client.pause(&self.list(&self.reached.keys().copied().collect::<Vec<_>>()))?;
                self.setup.health.waiting(&self.setup.group, "a dependency of its handler");
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
        Ok(())
    }

    /// The partitions wait, paused, for [`Running::place`].
    fn unplace(&mut self, partitions: &[i32]) -> anyhow::Result<()> {
        self.client.pause(&self.list(partitions))?;
        for partition in partitions {
            self.reached.remove(partition);
            self.at_end.remove(partition);
        }
        self.client.context().unplace(partitions);
        Ok(())
    }

    fn list(&self, partitions: &[i32]) -> TopicPartitionList {
        let topic = self.setup.topic();
        let mut list = TopicPartitionList::new();
        for partition in partitions {
            list.add_partition(&topic, *partition);
        }
        list
    }
}
