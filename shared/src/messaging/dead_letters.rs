//! Dead letters: records that a consumer group could not handle, kept until a [redrive](super::redrive) settles them.
//!
//! `<group>.dlq` is a table, not a queue: compacted, keyed by the source's coordinates, so the same record is one letter
//! however often it is set aside, and a settled letter is a tombstone.

use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, Instant};

use anyhow::{Context, ensure};
use futures::future::try_join_all;
use rdkafka::consumer::{BaseConsumer, Consumer};
use rdkafka::error::{KafkaError, RDKafkaErrorCode};
use rdkafka::message::{Header, Message, OwnedHeaders, OwnedMessage};
use rdkafka::producer::{FutureProducer, FutureRecord};
use rdkafka::{Offset, TopicPartitionList};
use tokio_util::sync::CancellationToken;

use super::{Source, record};
use crate::events::Kind;
use crate::fault;
use crate::service::KafkaConfig;
use crate::service::metrics::{Group, Metrics};

/// The largest record that a source topic takes by default is 1 MiB; its letter has some headers more.
const MAX_BYTES: &str = "2097152";
pub(super) const SETTINGS: &[(&str, &str)] = &[
    ("cleanup.policy", "compact"),
    ("max.message.bytes", MAX_BYTES),
    // As with every other topic: a consumer whose clock is fast can write letters too.
    ("message.timestamp.type", "LogAppendTime"),
];
/// After so many attempts a letter is parked: kept and counted, tried only when named.
const MAX_ATTEMPTS: u32 = 5;
const ACK_TIMEOUT_MS: &str = "10000";
/// So soon a topic that is not there is said to be missing. The client's own 30 s are for topics that were made a moment ago.
const MISSING_TOPIC_MS: &str = "2000";
const POLL: Duration = Duration::from_millis(200);
/// A redrive that hears nothing for so long gives up.
const SILENCE: Duration = Duration::from_secs(10);

/// One record set aside, and why.
#[derive(Clone)]
pub(super) struct DeadLetter {
    pub source: Source,
    pub reason: String,
    /// How often the record was tried.
    pub attempts: u32,
    /// When it was first set aside, by the broker's clock, in milliseconds since 1970. `None`: now.
    pub since: Option<i64>,
    /// The record itself. Of a compacted source only the key is written: a copy would outlive the erasure of its original.
    pub message: OwnedMessage,
}

impl DeadLetter {
    pub fn parked(&self) -> bool {
        self.attempts >= MAX_ATTEMPTS
    }

    /// The headers of the letter, without those of the source record.
    fn headers(&self, mut headers: OwnedHeaders) -> OwnedHeaders {
        let own = [
            ("dlq-topic", self.source.topic.clone()),
            ("dlq-partition", self.source.partition.to_string()),
            ("dlq-offset", self.source.offset.to_string()),
            ("dlq-reason", self.reason.clone()),
            ("dlq-attempts", self.attempts.to_string()),
        ];
        for (key, value) in &own {
            headers = headers.insert(Header { key, value: Some(value) });
        }
        if let Some(since) = self.since {
            headers = headers.insert(Header { key: "dlq-since", value: Some(&since.to_string()) });
        }
        headers
    }

    /// Reads what [`DeadLetters::write`] wrote. `None`: not one of ours.
    fn parse(letter: &OwnedMessage) -> Option<Self> {
        let text = |name| header(letter, name).and_then(|value| std::str::from_utf8(value).ok());
        Some(Self {
            source: Source {
                topic: text("dlq-topic")?.to_owned(),
                partition: text("dlq-partition")?.parse().ok()?,
                offset: text("dlq-offset")?.parse().ok()?,
            },
            reason: text("dlq-reason")?.to_owned(),
            attempts: text("dlq-attempts")?.parse().ok()?,
            since: text("dlq-since").and_then(|since| since.parse().ok()).or_else(|| letter.timestamp().to_millis()),
            message: letter.clone(),
        })
    }
}

/// The source record's key as its dead letter keeps it.
pub(super) fn source_key(letter: &OwnedMessage) -> Option<&[u8]> {
    header(letter, "dlq-key")
}

fn header<'a>(message: &'a OwnedMessage, name: &str) -> Option<&'a [u8]> {
    // The last one is ours: it was appended.
    record::headers(message).flatten().filter(|header| header.key == name).last()?.value
}

/// Writes dead letters of one group. Idempotent, but not transactional: the same letter twice is one letter.
pub(super) struct DeadLetters {
    topic: String,
    kind: Kind,
    producer: FutureProducer,
}

impl DeadLetters {
    pub fn new(kafka: &KafkaConfig, group: &str, kind: Kind) -> anyhow::Result<Self> {
        let producer = kafka
            .producer()
            .set("message.timeout.ms", ACK_TIMEOUT_MS)
            .set("topic.metadata.propagation.max.ms", MISSING_TOPIC_MS)
            .set("message.max.bytes", MAX_BYTES)
            // Each letter is waited for, so there is nothing to wait with it for.
            .set("linger.ms", "0")
            .create()
            .context("the Kafka settings are wrong")?;
        Ok(Self { topic: topic(kafka, group), kind, producer })
    }

    pub fn topic(&self) -> &str {
        &self.topic
    }

    /// Returns when Kafka has the letter; only then may the source's offset be stored. Crash in between: the record comes
    /// again and its letter is written again, under the same key.
    ///
    /// # Errors
    /// Kafka did not take it, or not in time: the topic is missing, or closed to us, or takes no record of this size. The batch is
    /// put off, so nothing is lost and nothing moves on.
    pub async fn write(&self, letter: &DeadLetter) -> anyhow::Result<()> {
        let source = &letter.message;
        // A letter that is written again has these headers already; they are replaced, the rest stays as it came.
        let mut headers = OwnedHeaders::new();
        if self.kind == Kind::Facts {
            for kept in record::headers(source).flatten().filter(|header| !header.key.starts_with("dlq-")) {
                headers = headers.insert(kept);
            }
        }
        // Told by the topic: a record of somebody else's may have any headers.
        let again = source.topic() == self.topic;
        let key = if again { source_key(source) } else { source.key() };
        // A malformed key may hold anything, so of a compacted source only a UUID is kept.
        let key = key.filter(|key| self.kind == Kind::Facts || uuid::Uuid::try_parse_ascii(key).is_ok());
        if key.is_some() {
            headers = headers.insert(Header { key: "dlq-key", value: key });
        }
        let headers = letter.headers(headers);
        fault::point("dead_letters.before_write");
        let id = letter.source.to_string();
        let mut record = FutureRecord::to(&self.topic).key(&id).headers(headers);
        if let (Kind::Facts, Some(payload)) = (self.kind, source.payload()) {
            record = record.payload(payload);
        }
        self.send(record).await
    }

    /// The letters are settled.
    pub async fn tombstone(&self, sources: &[Source]) -> anyhow::Result<()> {
        let keys: Vec<String> = sources.iter().map(ToString::to_string).collect();
        try_join_all(keys.iter().map(|key| self.send(FutureRecord::to(&self.topic).key(key)))).await?;
        Ok(())
    }

    async fn send(&self, record: FutureRecord<'_, String, [u8]>) -> anyhow::Result<()> {
        let sent = self.producer.send(record, Duration::from_secs(10)).await;
        let sent = sent.map(|_| ()).map_err(|(error, _)| error);
        sent.with_context(|| format!("cannot write to the dead letters {}", self.topic))
    }
}

fn topic(kafka: &KafkaConfig, group: &str) -> String {
    kafka.prefixed(&format!("{group}.dlq"))
}

/// The open letters of a group, oldest coordinates first.
///
/// # Errors
/// Kafka does not answer, or the group has never run and so has no table.
pub(super) fn open(kafka: &KafkaConfig, group: &str) -> anyhow::Result<Vec<DeadLetter>> {
    let mut table = BTreeMap::new();
    let (mut complete, mut heard) = (false, Instant::now());
    let mut missing = "nothing came from Kafka in time";
    follow(kafka, group, |change, caught_up| {
        match change {
            Change::Letter(key, letter) => drop(table.insert(key, letter)),
            Change::Settled(key) => drop(table.remove(&key)),
            Change::TopicGone => {
                table.clear();
                missing = "there is no such topic: the service has never run here, or somebody deleted it";
                return heard.elapsed() < SILENCE;
            }
            Change::None => {
                complete = caught_up;
                return !complete && heard.elapsed() < SILENCE;
            }
        }
        heard = Instant::now();
        true
    })?;
    ensure!(complete, "cannot read the dead letters {}: {missing}", topic(kafka, group));
    let mut letters: Vec<_> = table.values().filter_map(DeadLetter::parse).collect();
    letters.sort_by(|a, b| a.source.cmp(&b.source));
    Ok(letters)
}

/// Keeps the metric of open letters, by following the table: it also moves when another process redrives. Only keys are held.
pub(crate) fn count_open(
    kafka: &KafkaConfig,
    group: &str,
    metrics: &Metrics,
    stop: &CancellationToken,
) -> anyhow::Result<()> {
    let gauge = metrics.dead_letters_open.get_or_create_owned(&Group { group: group.to_owned() });
    let mut open = BTreeSet::new();
    follow(kafka, group, |change, caught_up| {
        match change {
            Change::Letter(key, _) => drop(open.insert(key)),
            Change::Settled(key) => drop(open.remove(&key)),
            Change::TopicGone => open.clear(),
            Change::None if caught_up => drop(gauge.set(open.len() as i64)),
            Change::None => {}
        }
        !stop.is_cancelled()
    })
}

/// What the table's reader comes upon.
enum Change {
    Letter(Vec<u8>, OwnedMessage),
    Settled(Vec<u8>),
    /// The topic was deleted, and the table with it. It begins anew where there is one of that name again.
    TopicGone,
    /// Nothing for the moment.
    None,
}

/// Reads the table from its beginning for as long as `go_on` says so. It is told each change, and whether the end was reached.
fn follow(kafka: &KafkaConfig, group: &str, mut go_on: impl FnMut(Change, bool) -> bool) -> anyhow::Result<()> {
    let consumer: BaseConsumer = kafka
        .client()
        .set("group.id", kafka.prefixed(&format!("{group}.dlq"))) // never joined: the client asks for a name
        .set("enable.auto.commit", "false")
        .set("enable.partition.eof", "true")
        // We begin at the beginning, so an offset that Kafka does not have means that it is not the same topic any more.
        .set("auto.offset.reset", "error")
        .create()
        .context("the Kafka settings are wrong")?;
    let mut start = TopicPartitionList::new();
    start.add_partition_offset(&topic(kafka, group), 0, Offset::Beginning)?;
    consumer.assign(&start)?;
    let mut caught_up = false;
    loop {
        let change = match consumer.poll(POLL) {
            Some(Ok(message)) => {
                let key = message.key().unwrap_or_default().to_vec();
                // A pointer has no payload either, but it has headers.
                if message.headers().is_some() { Change::Letter(key, message.detach()) } else { Change::Settled(key) }
            }
            Some(Err(KafkaError::PartitionEOF(_))) => {
                caught_up = true;
                Change::None
            }
            Some(Err(error)) => {
                tracing::debug!(group, %error, "cannot read the dead letters yet");
                if topic_gone(&error) {
                    std::thread::sleep(POLL); // the client may say so without asking
                    consumer.assign(&start)?;
                    caught_up = false;
                    Change::TopicGone
                } else {
                    Change::None
                }
            }
            None => Change::None,
        };
        if !go_on(change, caught_up) {
            return Ok(());
        }
    }
}

/// It is not there, or another one has its name.
fn topic_gone(error: &KafkaError) -> bool {
    use RDKafkaErrorCode::{AutoOffsetReset, UnknownPartition, UnknownTopic, UnknownTopicOrPartition};
    let code = error.rdkafka_error_code();
    matches!(code, Some(AutoOffsetReset | UnknownPartition | UnknownTopic | UnknownTopicOrPartition))
}
