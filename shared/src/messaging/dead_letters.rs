//! Dead letters: records that a consumer group could not handle, kept until a [redrive](super::redrive) settles them.
//!
//! `<group>.dlq` is a table, not a queue: compacted, keyed by the source's coordinates, so the same record is one letter
//! however often it is set aside, and a settled letter is a tombstone.

use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, Instant};

use anyhow::{Context, ensure};
use rdkafka::consumer::{BaseConsumer, Consumer};
use rdkafka::error::KafkaError;
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
            .set("message.max.bytes", MAX_BYTES)
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
    /// Kafka did not take it in time. The batch is put off, so nothing is lost and nothing moves on.
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

    /// The letter is settled.
    pub async fn tombstone(&self, source: &Source) -> anyhow::Result<()> {
        self.send(FutureRecord::to(&self.topic).key(&source.to_string())).await
    }

    async fn send(&self, record: FutureRecord<'_, String, [u8]>) -> anyhow::Result<()> {
        let sent = self.producer.send(record, Duration::from_secs(10)).await;
        sent.map(|_| ()).map_err(|(error, _)| error).context("cannot write to the dead letters")
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
    follow(kafka, group, |change, caught_up| {
        match change {
            Some((key, Some(letter))) => drop(table.insert(key, letter)),
            Some((key, None)) => drop(table.remove(&key)),
            None => {
                complete = caught_up;
                return !complete && heard.elapsed() < SILENCE;
            }
        }
        heard = Instant::now();
        true
    })?;
    ensure!(complete, "cannot read the dead letters of {group}: nothing came from Kafka for {SILENCE:?}");
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
            Some((key, Some(_))) => drop(open.insert(key)),
            Some((key, None)) => drop(open.remove(&key)),
            None if caught_up => drop(gauge.set(open.len() as i64)),
            None => {}
        }
        !stop.is_cancelled()
    })
}

/// A key of the table and its letter; no letter where it was settled.
type Change = (Vec<u8>, Option<OwnedMessage>);

/// Reads the table from its beginning for as long as `go_on` says so. It is told each change, and at each pause whether the end was
/// reached.
fn follow(kafka: &KafkaConfig, group: &str, mut go_on: impl FnMut(Option<Change>, bool) -> bool) -> anyhow::Result<()> {
    let consumer: BaseConsumer = kafka
        .client()
        .set("group.id", kafka.prefixed(&format!("{group}.dlq"))) // never joined: the client asks for a name
        .set("enable.auto.commit", "false")
        .set("enable.partition.eof", "true")
        .set("auto.offset.reset", "earliest")
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
                Some((key, message.headers().is_some().then(|| message.detach())))
            }
            Some(Err(KafkaError::PartitionEOF(_))) => {
                caught_up = true;
                None
            }
            Some(Err(error)) => {
                tracing::debug!(group, %error, "cannot read the dead letters yet");
                None
            }
            None => None,
        };
        if !go_on(change, caught_up) {
            return Ok(());
        }
    }
}
