//! One record in full.

use std::sync::Arc;
use std::time::Instant;

use anyhow::{Context, ensure};
use rdkafka::consumer::{BaseConsumer, Consumer};
use rdkafka::error::KafkaError;
use rdkafka::message::{BorrowedMessage, Message};
use rdkafka::{Offset, TopicPartitionList};
use serde_json::Value;
use shared::events::{Kind, Topic};
use shared::messaging::{Coordinates, KafkaConfig, headers};
use tokio::sync::Semaphore;
use tokio::task::spawn_blocking;

use super::{ANSWER_LIMIT, GROUP, topics};

/// How many records are read at the same time. Each needs a client.
const READS: usize = 2;
/// Bytes that are shown of a key, of a header, and of a value that is not JSON. JSON is shown in
/// full.
const SHOWN_BYTES: usize = 64 * 1024;

/// Reads single records. Clones share the limit.
#[derive(Clone)]
pub struct Reader {
    pub(super) kafka: KafkaConfig,
    pub(super) places: Arc<Semaphore>,
}

/// The result of reading one offset.
pub enum Found {
    Record(Content),
    /// Compaction or retention has deleted the record, or there never was one. Transactions leave
    /// gaps.
    Nothing,
}

/// A record as text. Bytes that are not UTF-8 are replaced.
pub struct Content {
    /// The broker's time, in milliseconds since 1970.
    pub time: Option<i64>,
    pub key: String,
    pub headers: Vec<(String, String)>,
    /// `None`: a tombstone.
    pub value: Option<String>,
    /// Whether the value has personal data, which is left out.
    pub is_hidden: bool,
}

impl Reader {
    pub fn new(kafka: KafkaConfig) -> Self {
        Self { kafka, places: Arc::new(Semaphore::new(READS)) }
    }

    /// The record's name on the broker, where topics may have a prefix.
    pub fn name_on_broker(&self, Coordinates { topic, partition, offset }: &Coordinates) -> String {
        let topic = self.kafka.prefixed(topic);
        Coordinates { topic, partition: *partition, offset: *offset }.to_string()
    }

    /// # Errors
    /// The topic is not one of Waybill's, or Kafka does not answer.
    pub async fn read(&self, coordinates: Coordinates) -> anyhow::Result<Found> {
        let topic = Topic::named(&coordinates.topic).filter(|topic| topics().contains(&topic.name));
        let topic = topic.with_context(|| format!("no topic {}", coordinates.topic))?;
        let _place = self.places.acquire().await?;
        let kafka = self.kafka.clone();
        spawn_blocking(move || read(&kafka, topic, &coordinates)).await?
    }
}

fn read(kafka: &KafkaConfig, topic: Topic, coordinates: &Coordinates) -> anyhow::Result<Found> {
    let consumer: BaseConsumer = kafka.reader(GROUP).create()?;
    let name = kafka.prefixed(topic.name);
    let (first, next) = consumer
        .fetch_watermarks(&name, coordinates.partition, ANSWER_LIMIT)
        .with_context(|| format!("Kafka does not say what partition {} has", coordinates.partition))?;
    if !(first..next).contains(&coordinates.offset) {
        return Ok(Found::Nothing);
    }
    let mut start = TopicPartitionList::new();
    start.add_partition_offset(&name, coordinates.partition, Offset::Offset(coordinates.offset))?;
    consumer.assign(&start)?;
    let deadline = Instant::now() + ANSWER_LIMIT;
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        ensure!(!left.is_zero(), "Kafka does not answer");
        match consumer.poll(left) {
            Some(Ok(message)) if message.offset() == coordinates.offset => {
                return Ok(Found::Record(content(topic, &message)));
            }
            // The next record of the partition, or its end.
            Some(Ok(_) | Err(KafkaError::PartitionEOF(_))) => return Ok(Found::Nothing),
            Some(Err(error)) => return Err(error.into()),
            None => {}
        }
    }
}

/// Values of states have personal data. Keys and facts have ids only.
fn content(topic: Topic, message: &BorrowedMessage<'_>) -> Content {
    let is_hidden = topic.kind == Kind::State && message.payload().is_some();
    let headers = headers(message).map(|header| match header {
        Ok(header) => (header.key.to_owned(), header.value.map(text).unwrap_or_default()),
        Err(error) => ("(unreadable)".to_owned(), error.to_string()),
    });
    Content {
        time: message.timestamp().to_millis(),
        key: message.key().map(text).unwrap_or_default(),
        headers: headers.collect(),
        value: message.payload().map(|value| if is_hidden { hidden(value) } else { shown(value) }),
        is_hidden,
    }
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(&bytes[..bytes.len().min(SHOWN_BYTES)]).into_owned()
}

/// JSON is indented. Other values are shown as they are.
fn shown(value: &[u8]) -> String {
    let json = serde_json::from_slice::<Value>(value).ok();
    json.and_then(|json| serde_json::to_string_pretty(&json).ok()).unwrap_or_else(|| text(value))
}

/// The names of the fields, without their values.
fn hidden(value: &[u8]) -> String {
    match serde_json::from_slice::<Value>(value) {
        Ok(mut json) => {
            hide(&mut json);
            serde_json::to_string_pretty(&json).unwrap_or_default()
        }
        Err(_) => format!("{} bytes that are not JSON", value.len()),
    }
}

fn hide(json: &mut Value) {
    match json {
        Value::Object(fields) => fields.values_mut().for_each(hide),
        Value::Array(items) => items.iter_mut().for_each(hide),
        Value::Null => {}
        other => *other = Value::String("hidden".to_owned()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hidden_values_keep_the_names_of_their_fields() {
        let hidden = hidden(br#"{"email":"ada@example.com","tags":["Ada",1],"owner":null}"#);
        assert!(!hidden.contains("ada") && !hidden.contains("Ada") && !hidden.contains('1'), "{hidden}");
        assert!(hidden.contains("email") && hidden.contains("owner"), "{hidden}");
        assert_eq!(super::hidden(b"ada@example.com"), "15 bytes that are not JSON");
    }
}
