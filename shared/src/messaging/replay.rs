//! Replay: a topic from its beginning into a second copy of a read model, beside the group that keeps the live one. It joins no
//! group, commits nothing and writes to no topic: its position lives in memory, so a replay that dies leaves nothing that
//! could disagree with its tables, and the next one starts over.

use std::collections::{BTreeMap, BTreeSet};
use std::slice;
use std::time::{Duration, Instant};

use anyhow::{Context, bail, ensure};
use rdkafka::consumer::{BaseConsumer, Consumer};
use rdkafka::error::{KafkaError, RDKafkaErrorCode};
use rdkafka::message::{Message, OwnedMessage};
use rdkafka::{Offset, TopicPartitionList};
use sqlx::PgConnection;
use tokio::task::block_in_place;

use super::consumer::{BATCH_BYTES, BATCH_RECORDS};
use super::{Failure, Inbox, Projection, Record, Source, handler, inbox};
use crate::events::Event;
use crate::fault;
use crate::service::{KafkaConfig, telemetry};

const KAFKA_TIMEOUT: Duration = Duration::from_secs(5);
const POLL: Duration = Duration::from_millis(100);
/// A replay that hears nothing for so long gives up.
const SILENCE: Duration = Duration::from_secs(10);

/// The next offset per partition.
type Positions = BTreeMap<i32, i64>;

/// Which events are applied.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Take {
    All,
    /// Those that the live model has.
    Known,
}

/// One topic, on its way into the copy.
pub struct Replay<P> {
    consumer: BaseConsumer,
    topic: String,
    /// The group of the live model, and the name of both inboxes.
    group: String,
    copy: Inbox<P>,
    /// For one batch.
    limit: Duration,
    beginning: Positions,
    /// Before these the copy has every event that it can take.
    reached: Positions,
}

impl<P: Projection> Replay<P> {
    /// `group` keeps the live model; `copy` is an inbox of that name on the tables to be filled, which are empty.
    ///
    /// # Errors
    /// Kafka does not answer.
    pub fn new(kafka: &KafkaConfig, group: &str, copy: Inbox<P>) -> anyhow::Result<Self> {
        telemetry::hide_panic_messages();
        let consumer: BaseConsumer = kafka
            .client()
            .set("group.id", kafka.prefixed(group)) // never joined: it is asked what it has committed
            .set("enable.auto.commit", "false")
            .set("enable.auto.offset.store", "false")
            .set("isolation.level", "read_committed")
            .set("auto.offset.reset", "error")
            .set("enable.partition.eof", "true")
            .set("queued.max.messages.kbytes", "16384")
            .set("fetch.wait.max.ms", "20") // an empty partition says so only after this time
            .create()
            .context("the Kafka settings are wrong")?;
        let topic = kafka.prefixed(P::Event::TOPIC.name);
        let (beginning, reached) = (Positions::new(), Positions::new());
        let (group, limit) = (group.to_owned(), kafka.handle_timeout());
        let mut replay = Self { consumer, topic, group, copy, limit, beginning, reached };
        for partition in 0..P::Event::TOPIC.partitions {
            replay.beginning.insert(partition, replay.watermarks(partition)?.0);
        }
        replay.reached.clone_from(&replay.beginning);
        Ok(replay)
    }

    pub fn topic(&self) -> &str {
        &self.topic
    }

    /// How many offsets at the topic's beginning Kafka does not have any more.
    pub fn truncated(&self) -> i64 {
        self.beginning.values().sum()
    }

    /// Brings the copy to the present end of the topic. Records that cannot be decoded, or are of a type that this release does
    /// not know, are left out, as the live model left them out.
    ///
    /// # Errors
    /// Kafka is silent, the copy's database is down, or the copy rejects an event that the live model has.
    pub async fn advance(&mut self, live: &mut PgConnection) -> anyhow::Result<()> {
        let ends = self.ends()?;
        self.read(live, &ends, Take::All).await?;
        self.reached = ends;
        Ok(())
    }

    /// Applies, of what came behind the copy's position, the events that the live model has; the position stays. The caller
    /// keeps the live model from changing, so afterwards the copy has every event that the live one has.
    ///
    /// # Errors
    /// As [`Replay::advance`].
    pub async fn complete(&self, live: &mut PgConnection) -> anyhow::Result<()> {
        let ends = self.ends()?;
        self.read(live, &ends, Take::Known).await
    }

    /// How many offsets the live group is behind the copy's position. Before the position there is nothing that it will still
    /// read when this is 0.
    pub fn live_is_behind(&self) -> anyhow::Result<i64> {
        let mut list = TopicPartitionList::new();
        for partition in self.reached.keys() {
            list.add_partition(&self.topic, *partition);
        }
        let committed = block_in_place(|| self.consumer.committed_offsets(list, KAFKA_TIMEOUT))
            .with_context(|| format!("Kafka does not say what {} has committed", self.group))?;
        let mut behind = 0;
        for element in committed.elements() {
            element.error()?;
            // Nothing is committed where nothing was ever read.
            let committed = if let Offset::Offset(offset) = element.offset() { offset } else { 0 };
            behind += (self.reached[&element.partition()] - committed).max(0);
        }
        Ok(behind)
    }

    /// How many offsets have come behind the copy's position.
    pub fn remaining(&self) -> anyhow::Result<i64> {
        let ends = self.ends()?;
        Ok(ends.iter().map(|(partition, end)| end - self.reached[partition]).sum())
    }

    /// The ends of what is committed: behind the markers of Kafka's transactions.
    fn ends(&self) -> anyhow::Result<Positions> {
        self.beginning.keys().map(|partition| Ok((*partition, self.watermarks(*partition)?.1))).collect()
    }

    fn watermarks(&self, partition: i32) -> anyhow::Result<(i64, i64)> {
        block_in_place(|| self.consumer.fetch_watermarks(&self.topic, partition, KAFKA_TIMEOUT))
            .with_context(|| format!("Kafka does not say where {} begins and ends", self.topic))
    }

    async fn read(&self, live: &mut PgConnection, until: &Positions, take: Take) -> anyhow::Result<()> {
        let mut unfinished = BTreeSet::new();
        let mut start = TopicPartitionList::new();
        for (partition, reached) in &self.reached {
            if *reached < until[partition] {
                start.add_partition_offset(&self.topic, *partition, Offset::Offset(*reached))?;
                unfinished.insert(*partition);
            }
        }
        self.consumer.assign(&start)?;
        while !unfinished.is_empty() {
            let batch = block_in_place(|| self.collect(until, &mut unfinished))?;
            self.apply(live, &batch, take).await?;
            fault::point("replay.after_batch");
        }
        Ok(self.consumer.unassign()?)
    }

    /// A batch of records before `until`; a partition that has no more of them is finished.
    fn collect(&self, until: &Positions, unfinished: &mut BTreeSet<i32>) -> anyhow::Result<Vec<OwnedMessage>> {
        let mut batch = Vec::new();
        let mut bytes = 0;
        let deadline = Instant::now() + SILENCE;
        while !unfinished.is_empty() && batch.len() < BATCH_RECORDS && bytes < BATCH_BYTES {
            match self.consumer.poll(POLL) {
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
                // The last offset may be a transaction's marker, behind which nothing comes but this.
                Some(Err(KafkaError::PartitionEOF(partition))) => drop(unfinished.remove(&partition)),
                Some(Err(error)) if error.rdkafka_error_code() == Some(RDKafkaErrorCode::AutoOffsetReset) => {
                    bail!("{} lost records while it was read: {error}", self.topic)
                }
                Some(Err(error)) => tracing::debug!(topic = self.topic, %error, "cannot read the topic yet"),
                None if batch.is_empty() => {}
                None => break,
            }
            ensure!(Instant::now() < deadline, "nothing came from Kafka for {SILENCE:?}");
        }
        Ok(batch)
    }

    /// The live model is asked about every batch, also where its answer does not count: whoever lost that connection, and with it
    /// what it locks, is stopped here.
    async fn apply(&self, live: &mut PgConnection, batch: &[OwnedMessage], take: Take) -> anyhow::Result<()> {
        let decoded = batch.iter().map(|message| Record::decode(message.key(), message, Source::of(message)));
        let mut records: Vec<Record<P::Event>> = decoded.filter_map(|record| record.ok().flatten()).collect();
        let ids = records.iter().map(|record| record.envelope.id).collect();
        let known = inbox::known(live, &self.group, ids).await.context("cannot ask the live model")?;
        records.retain(|record| take == Take::All || known.contains(&record.envelope.id));
        if records.is_empty() || self.call(&records).await?.is_none() {
            return Ok(());
        }
        // One of them is rejected, or they are too many. What the live model set aside as well stays where it is, among the dead
        // letters.
        for record in &records {
            if let Some(reason) = self.call(slice::from_ref(record)).await?
                && known.contains(&record.envelope.id)
            {
                bail!("the live model has the event at {}, and now it is rejected: {reason}", record.source);
            }
        }
        Ok(())
    }

    /// `None`: applied. Otherwise why it was rejected.
    async fn call(&self, records: &[Record<P::Event>]) -> anyhow::Result<Option<String>> {
        let Err(failure) = handler::call(&self.copy, records, self.limit).await else { return Ok(None) };
        if records.len() > 1 && failure.took_too_long() {
            return Ok(Some("too slow together".to_owned())); // fewer at once may be quick enough
        }
        match (failure.rejection(), failure) {
            (Some(reason), _) => Ok(Some(reason)),
            (None, Failure::Retry(error)) => Err(error.context("the copy's database does not take it")),
            (None, _) => bail!("an inbox keeps no position"),
        }
    }
}
