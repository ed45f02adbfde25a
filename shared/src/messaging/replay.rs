//! Replay: applies a topic from its beginning to a second copy of a read model, while the group of
//! the live model runs. A replay joins no group, commits nothing and writes to no topic. It keeps
//! its position only in memory: a replay that dies leaves no stored position, and the next one
//! starts from the beginning with empty tables.

use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, Instant};

use anyhow::{Context, anyhow, bail, ensure};
use rdkafka::consumer::{BaseConsumer, Consumer};
use rdkafka::error::{KafkaError, RDKafkaErrorCode};
use rdkafka::message::{Message, OwnedMessage};
use rdkafka::{Offset, TopicPartitionList};
use sqlx::PgConnection;
use tokio::task::block_in_place;
use uuid::Uuid;

use super::consumer::{BATCH_BYTES, BATCH_RECORDS};
use super::errors::{Class, class};
use super::handler::{self, Delivery, Failure, Recorded};
use super::kafka::{KafkaConfig, create};
use super::record::{Coordinates, Record};
use crate::events::Event;
use crate::fault;
use crate::platform::telemetry;

const KAFKA_TIMEOUT: Duration = Duration::from_secs(5);
const POLL_INTERVAL: Duration = Duration::from_millis(100);
/// A replay gives up when Kafka has sent nothing for this long.
const SILENCE_LIMIT: Duration = Duration::from_secs(10);

/// The next offset per partition.
type Offsets = BTreeMap<i32, i64>;

/// Which events are applied.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Events {
    All,
    /// Only those that the live model contains.
    OfLiveModel,
}

/// The replay of one topic into a copy of a read model.
pub struct Replay<H> {
    consumer: BaseConsumer,
    topic: String,
    copy: H,
    /// The time limit for one batch.
    limit: Duration,
    /// The first offset that Kafka still has, per partition.
    beginning: Offsets,
    /// The next offset to apply, per partition. The copy contains every earlier event that its
    /// handler accepts.
    next_offsets: Offsets,
}

impl<H: Recorded> Replay<H> {
    /// `copy` handles events with the tables to fill, which are empty.
    ///
    /// # Errors
    /// Kafka does not answer.
    pub fn new(kafka: &KafkaConfig, copy: H) -> anyhow::Result<Self> {
        telemetry::hide_panic_messages();
        // The group's own name, because the group is asked for its committed offsets.
        let mut replay = Self {
            consumer: create(&kafka.replay(H::GROUP))?,
            topic: kafka.prefixed(H::Event::TOPIC.name),
            copy,
            limit: kafka.handle_timeout(),
            beginning: Offsets::new(),
            next_offsets: Offsets::new(),
        };
        for partition in 0..replay.partitions()? {
            replay.beginning.insert(partition, replay.watermarks(partition)?.0);
        }
        replay.next_offsets.clone_from(&replay.beginning);
        Ok(replay)
    }

    pub fn topic(&self) -> &str {
        &self.topic
    }

    /// How many offsets at the beginning of the topic Kafka has deleted.
    pub fn truncated(&self) -> i64 {
        self.beginning.values().sum()
    }

    /// Applies everything up to the present end of the topic. Leaves out records that cannot be
    /// decoded or whose type this release does not know, as the live model's consumer does.
    ///
    /// # Errors
    /// Kafka does not answer, the copy's database is down, or the copy rejects an event that the
    /// live model contains.
    pub async fn advance(&mut self, live: &mut PgConnection) -> anyhow::Result<()> {
        let ends = self.ends()?;
        self.read(live, &ends, Events::All).await?;
        self.next_offsets = ends;
        Ok(())
    }

    /// Applies the later events that the live model already has. Does not advance the position. The
    /// caller keeps the live model from changing, so afterwards the copy contains every event that
    /// the live model contains.
    ///
    /// # Errors
    /// As [`Replay::advance`].
    pub async fn complete(&self, live: &mut PgConnection) -> anyhow::Result<()> {
        let ends = self.ends()?;
        self.read(live, &ends, Events::OfLiveModel).await
    }

    /// How many offsets the live group still has to read to reach the copy's position.
    pub fn live_lag(&self) -> anyhow::Result<i64> {
        let mut list = TopicPartitionList::new();
        for partition in self.next_offsets.keys() {
            list.add_partition(&self.topic, *partition);
        }
        let committed = block_in_place(|| self.consumer.committed_offsets(list, KAFKA_TIMEOUT))
            .with_context(|| format!("cannot get the committed offsets of the group {} from Kafka", H::GROUP))?;
        let mut lag = 0;
        for element in committed.elements() {
            element.error()?;
            // A group that never read the partition has no committed offset.
            let committed = if let Offset::Offset(offset) = element.offset() { offset } else { 0 };
            lag += (self.next_offsets[&element.partition()] - committed).max(0);
        }
        Ok(lag)
    }

    /// How many offsets the topic has after the copy's position.
    pub fn remaining(&self) -> anyhow::Result<i64> {
        let ends = self.ends()?;
        Ok(ends.iter().map(|(partition, end)| end - self.next_offsets[partition]).sum())
    }

    /// The end of each partition. Transaction markers count.
    fn ends(&self) -> anyhow::Result<Offsets> {
        self.beginning.keys().map(|partition| Ok((*partition, self.watermarks(*partition)?.1))).collect()
    }

    /// How many partitions the topic has. A topic of facts may have more than declared.
    fn partitions(&self) -> anyhow::Result<i32> {
        let metadata = block_in_place(|| self.consumer.fetch_metadata(Some(&self.topic), KAFKA_TIMEOUT));
        let metadata = metadata.with_context(|| format!("cannot get the partitions of {} from Kafka", self.topic))?;
        let topic = metadata.topics().first().context("Kafka sent no metadata of the topic")?;
        let partitions = topic.partitions().len();
        ensure!(partitions > 0, "the topic {} does not exist, or this service may not read it", self.topic);
        Ok(i32::try_from(partitions)?)
    }

    fn watermarks(&self, partition: i32) -> anyhow::Result<(i64, i64)> {
        block_in_place(|| self.consumer.fetch_watermarks(&self.topic, partition, KAFKA_TIMEOUT))
            .with_context(|| format!("cannot get the first and last offset of {} from Kafka", self.topic))
    }

    async fn read(&self, live: &mut PgConnection, until: &Offsets, events: Events) -> anyhow::Result<()> {
        let mut unfinished = BTreeSet::new();
        let mut start = TopicPartitionList::new();
        for (partition, next_offset) in &self.next_offsets {
            if *next_offset < until[partition] {
                start.add_partition_offset(&self.topic, *partition, Offset::Offset(*next_offset))?;
                unfinished.insert(*partition);
            }
        }
        self.consumer.assign(&start)?;
        while !unfinished.is_empty() {
            let batch = block_in_place(|| self.collect(until, &mut unfinished))?;
            self.apply(live, &batch, events).await?;
            fault::point("replay.after_batch");
        }
        Ok(self.consumer.unassign()?)
    }

    /// Reads a batch of records before `until`. Removes partitions from `unfinished` that have no
    /// more of them.
    fn collect(&self, until: &Offsets, unfinished: &mut BTreeSet<i32>) -> anyhow::Result<Vec<OwnedMessage>> {
        let mut batch = Vec::new();
        let mut bytes = 0;
        let deadline = Instant::now() + SILENCE_LIMIT;
        while !unfinished.is_empty() && batch.len() < BATCH_RECORDS.into() && bytes < BATCH_BYTES {
            match self.consumer.poll(POLL_INTERVAL) {
                Some(Ok(message)) => {
                    let end = until[&message.partition()];
                    if message.offset() + 1 >= end {
                        unfinished.remove(&message.partition());
                    }
                    if message.offset() < end {
                        bytes += message.payload_len() + message.key_len();
                        batch.push(message.detach());
                    }
                    continue;
                }
                // If the last offset belongs to a transaction marker, no record shows the end.
                Some(Err(KafkaError::PartitionEOF(partition))) => {
                    unfinished.remove(&partition);
                }
                Some(Err(error)) if error.rdkafka_error_code() == Some(RDKafkaErrorCode::AutoOffsetReset) => {
                    bail!("Kafka deleted records of {} while they were read: {error}", self.topic)
                }
                Some(Err(error)) if class(&error) != Class::Transport => {
                    bail!("Kafka refuses to send records of {}: {error}", self.topic)
                }
                Some(Err(error)) => tracing::debug!(topic = self.topic, %error, "cannot read the topic; will retry"),
                None if batch.is_empty() => {}
                None => break,
            }
            ensure!(Instant::now() < deadline, "Kafka has sent nothing for {SILENCE_LIMIT:?}");
        }
        Ok(batch)
    }

    /// Queries the live model for every batch, even if the result is not needed. So a rebuild that
    /// has lost this connection, and its locks with it, stops here.
    async fn apply(&self, live: &mut PgConnection, batch: &[OwnedMessage], events: Events) -> anyhow::Result<()> {
        let decoded = batch.iter().map(|message| Record::decode(message.key(), message, Coordinates::of(message)));
        let mut records: Vec<Record<H::Event>> = decoded.filter_map(|record| record.ok().flatten()).collect();
        let ids: Vec<Uuid> = records.iter().map(|record| record.envelope.id).collect();
        let known = H::recorded(live, ids).await.context("cannot read the live model")?;
        records.retain(|record| events == Events::All || known.contains(&record.envelope.id));
        let mut delivery =
            ReplayBatch { copy: &self.copy, limit: self.limit, applied: BTreeSet::new(), rejected: vec![] };
        let delivered = handler::deliver_all(&mut delivery, &self.copy, &mut records, self.limit).await;
        delivered.map_err(|failure| match failure {
            Failure::Retry(error) => error.context("cannot write to the copy's database"),
            Failure::Reject(_) | Failure::Resume => {
                anyhow!("bug: a read model neither rejects a batch nor stores a position")
            }
        })?;
        // A record that fails here and is not in the live model, because it is a dead letter or an
        // operator gave it up, stays out of it.
        for (id, coordinates, reason) in delivery.rejected {
            ensure!(
                !known.contains(&id),
                "the live model contains the event at {coordinates}, but the copy rejects it: {reason}"
            );
        }
        Ok(())
    }
}

/// One batch that is applied to the copy.
struct ReplayBatch<'a, H> {
    copy: &'a H,
    limit: Duration,
    /// Event ids.
    applied: BTreeSet<Uuid>,
    /// Event id, coordinates and reason of the records that were rejected or failed.
    rejected: Vec<(Uuid, Coordinates, String)>,
}

impl<H: Recorded> Delivery for ReplayBatch<'_, H> {
    type Event = H::Event;
    type Error = Failure;

    async fn attempt(&mut self, records: &mut [Record<H::Event>]) -> Result<(), Failure> {
        handler::call(self.copy, records, self.limit).await?;
        self.applied.extend(records.iter().map(|record| record.envelope.id));
        Ok(())
    }

    async fn reject(&mut self, record: &Record<H::Event>, reason: String) -> Result<(), Failure> {
        self.rejected.push((record.envelope.id, record.coordinates.clone(), reason));
        Ok(())
    }

    async fn fail(&mut self, record: &Record<H::Event>, failure: Failure) -> Result<(), Failure> {
        self.reject(record, failure.describe()).await
    }

    fn is_finished(&self, record: &Record<H::Event>) -> bool {
        let id = record.envelope.id;
        self.applied.contains(&id) || self.rejected.iter().any(|(rejected, ..)| *rejected == id)
    }
}
