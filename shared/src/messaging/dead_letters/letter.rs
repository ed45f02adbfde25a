//! A dead letter, and how it is written.

use anyhow::Context;
use futures::future::try_join_all;
use rdkafka::message::{Header, Message, OwnedHeaders, OwnedMessage};
use rdkafka::producer::FutureRecord;

use crate::events::Kind;
use crate::fault;
use crate::messaging::acknowledged::AcknowledgedWriter;
use crate::messaging::kafka::{KafkaConfig, LETTER_MAX_BYTES};
use crate::messaging::record::{self, Coordinates};
use crate::messaging::topics::Declared;

/// The settings of the topic that holds the letters.
const SETTINGS: &[(&str, &str)] = &[
    ("cleanup.policy", "compact"),
    ("max.message.bytes", LETTER_MAX_BYTES),
    // As for every other topic: the broker would reject letters of a consumer whose clock is ahead.
    ("message.timestamp.type", "LogAppendTime"),
    ("unclean.leader.election.enable", "false"),
];
/// After this many attempts a letter is parked: it is kept and counted, and tried only when it is
/// named.
const MAX_ATTEMPTS: u32 = 5;

/// One dead-lettered record, and the reason.
#[derive(Clone)]
pub struct DeadLetter {
    pub coordinates: Coordinates,
    pub reason: String,
    /// How often the record was tried.
    pub attempts: u32,
    /// When it was first dead-lettered, by the broker's clock, in milliseconds since 1970. `None`:
    /// now.
    pub since: Option<i64>,
    /// The record, or the letter that contains it. For a record of a compacted topic only the key
    /// is written to the letter: a copy would remain after the original is erased.
    pub message: OwnedMessage,
}

impl DeadLetter {
    /// Reads what [`DeadLetterWriter::write`] wrote. Another client may have written the letter, with
    /// any headers. Then its reason says so, and an operator can redrive or discard it as any other.
    pub fn read(coordinates: Coordinates, letter: OwnedMessage) -> Self {
        let text = |name| header(&letter, name).and_then(|value| std::str::from_utf8(value).ok());
        let since = text("dlq-since").and_then(|since| since.parse().ok()).or_else(|| letter.timestamp().to_millis());
        let reason =
            text("dlq-reason").unwrap_or("the letter has no valid reason: another program wrote it").to_owned();
        let attempts = text("dlq-attempts").and_then(|attempts| attempts.parse().ok()).unwrap_or(0);
        Self { coordinates, reason, attempts, since, message: letter }
    }

    pub fn is_parked(&self) -> bool {
        self.attempts >= MAX_ATTEMPTS
    }

    /// The key of the dead-lettered record, as its letter holds it.
    pub fn record_key(&self) -> Option<&[u8]> {
        header(&self.message, "dlq-key")
    }

    /// The event type of the dead-lettered record, if its letter has a copy of it.
    pub fn record_kind(&self) -> Option<&str> {
        std::str::from_utf8(header(&self.message, "ce_type")?).ok()
    }

    /// Appends the letter's own headers.
    fn append_headers(&self, mut headers: OwnedHeaders) -> OwnedHeaders {
        let own = [
            ("dlq-topic", self.coordinates.topic.clone()),
            ("dlq-partition", self.coordinates.partition.to_string()),
            ("dlq-offset", self.coordinates.offset.to_string()),
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
}

/// The value of a header of a letter. If several headers have the name, it is the last one, which
/// the writer of the letter appended.
fn header<'a>(letter: &'a OwnedMessage, name: &str) -> Option<&'a [u8]> {
    record::headers(letter).flatten().filter(|header| header.key == name).last()?.value
}

/// The topic that holds a group's letters, as the group declares it.
pub fn declared_topic(kafka: &KafkaConfig, group: &str) -> Declared {
    Declared { name: topic(kafka, group), partitions: 1, may_grow: false, settings: SETTINGS }
}

/// The name of the topic that holds a group's letters.
pub fn topic(kafka: &KafkaConfig, group: &str) -> String {
    kafka.prefixed(&format!("{group}.dlq"))
}

/// Writes the dead letters of one group. A letter that is written twice is one letter.
pub struct DeadLetterWriter {
    writer: AcknowledgedWriter,
    /// What the records' topic holds.
    kind: Kind,
}

impl DeadLetterWriter {
    pub fn new(kafka: &KafkaConfig, group: &str, kind: Kind) -> Self {
        Self { writer: AcknowledgedWriter::new(topic(kafka, group), kafka.letters()), kind }
    }

    pub fn topic(&self) -> &str {
        self.writer.topic()
    }

    /// Writes the letter, and returns when Kafka has acknowledged it. Only then may the record's
    /// offset be stored. Crash in between: the record comes again and its letter is written again,
    /// with the same key.
    ///
    /// # Errors
    /// Kafka did not accept the letter, or not in time: the topic is missing, this service may not
    /// write to it, or it does not accept a record of this size. The batch is retried, so nothing
    /// is lost and no offset is stored.
    pub async fn write(&self, letter: &DeadLetter) -> anyhow::Result<()> {
        let message = &letter.message;
        // A letter that is written again already has `dlq-` headers. They are replaced; all other
        // headers are kept.
        let mut headers = OwnedHeaders::new();
        if self.kind == Kind::Facts {
            for kept in record::headers(message).flatten().filter(|header| !header.key.starts_with("dlq-")) {
                headers = headers.insert(kept);
            }
        }
        // The topic decides, because another client's record may have any headers.
        let is_letter = message.topic() == self.topic();
        let key = if is_letter { letter.record_key() } else { message.key() };
        // A malformed key may contain personal data. So for a compacted topic the key is kept only
        // if it is a UUID.
        let key = key.filter(|key| self.kind == Kind::Facts || uuid::Uuid::try_parse_ascii(key).is_ok());
        if key.is_some() {
            headers = headers.insert(Header { key: "dlq-key", value: key });
        }
        let headers = letter.append_headers(headers);
        fault::point("dead_letters.before_write");
        let id = letter.coordinates.to_string();
        let copy = if self.kind == Kind::Facts { message.payload() } else { None };
        // Never without a value: compaction takes such a record for a tombstone, and deletes it after
        // `delete.retention.ms`, with the letter still open.
        let record = FutureRecord::to(self.topic()).key(&id).headers(headers).payload(copy.unwrap_or_default());
        self.send(record).await
    }

    /// Marks the letters as settled.
    pub async fn tombstone(&self, letters: &[Coordinates]) -> anyhow::Result<()> {
        let keys: Vec<String> = letters.iter().map(ToString::to_string).collect();
        try_join_all(keys.iter().map(|key| self.send(FutureRecord::to(self.topic()).key(key)))).await?;
        Ok(())
    }

    async fn send(&self, record: FutureRecord<'_, String, [u8]>) -> anyhow::Result<()> {
        self.writer.send(record).await.context("cannot write to the dead letters")
    }
}
