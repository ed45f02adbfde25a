//! Reads topics at chosen offsets: dead letters, the records that they point to, and the actions of
//! operators.

use std::ops::{ControlFlow, Deref};
use std::time::{Duration, Instant};

use anyhow::{Context, bail, ensure};
use rdkafka::ClientConfig;
use rdkafka::consumer::{BaseConsumer, Consumer};
use rdkafka::error::{KafkaError, RDKafkaErrorCode};
use rdkafka::message::{Message, OwnedMessage};
use rdkafka::{Offset, TopicPartitionList};
use tokio::task::block_in_place;

use super::errors::{Class, class};
use super::kafka::{KafkaConfig, create};
use super::record::Coordinates;

/// A reader gives up when Kafka has sent nothing for this long.
const READ_TIMEOUT: Duration = Duration::from_secs(10);
const POLL_INTERVAL: Duration = Duration::from_millis(100);

/// A client that blocks no worker of the runtime when it is dropped: it then closes its connections
/// and waits for its threads.
struct Client(Option<BaseConsumer>);

impl Client {
    fn new(config: &ClientConfig) -> anyhow::Result<Self> {
        create(config).map(Some).map(Self)
    }
}

impl Deref for Client {
    type Target = BaseConsumer;

    fn deref(&self) -> &BaseConsumer {
        self.0.as_ref().expect("only `drop` takes the client")
    }
}

impl Drop for Client {
    fn drop(&mut self) {
        let client = self.0.take();
        block_in_place(|| drop(client));
    }
}

/// Reads the first partition of topics. All calls block the calling thread.
pub struct TopicReader {
    client: Client,
    /// Topic and offset of the next record that the client returns. `None` after an error.
    position: Option<(String, i64)>,
}

impl TopicReader {
    /// `group` is any consumer group of this service.
    ///
    /// # Errors
    /// The Kafka settings are invalid.
    pub fn new(kafka: &KafkaConfig, group: &str) -> anyhow::Result<Self> {
        Ok(Self { client: Client::new(&kafka.reader(group))?, position: None })
    }

    /// The offset after the last record.
    ///
    /// # Errors
    /// Kafka does not answer, or the topic does not exist.
    pub fn end(&self, topic: &str) -> anyhow::Result<i64> {
        match self.client.fetch_watermarks(topic, 0, READ_TIMEOUT) {
            Ok((_, end)) => Ok(end),
            Err(error) if is_unknown(&error) => {
                bail!("cannot read {topic}: the topic does not exist; was it deleted, or has its owner never run?")
            }
            Err(error) => Err(error).with_context(|| format!("cannot read {topic}")),
        }
    }

    /// Calls `on_record` with each record from `from` on and before `end`, until it breaks. Returns
    /// the offset to continue at: `end` if there is no further record before it.
    ///
    /// # Errors
    /// Kafka refuses or does not answer.
    pub fn scan(
        &mut self,
        topic: &str,
        from: i64,
        end: i64,
        mut on_record: impl FnMut(OwnedMessage) -> ControlFlow<()>,
    ) -> anyhow::Result<i64> {
        if from >= end {
            return Ok(end);
        }
        let at = (topic.to_owned(), from);
        if self.position.take() != Some(at) {
            assign(&self.client, topic, 0, from)?;
        }
        let mut last_record = Instant::now();
        while last_record.elapsed() < READ_TIMEOUT {
            match self.client.poll(POLL_INTERVAL) {
                Some(Ok(message)) => {
                    last_record = Instant::now();
                    let next = message.offset() + 1;
                    if next > end {
                        return Ok(end);
                    }
                    let flow = on_record(message.detach());
                    self.position = Some((topic.to_owned(), next));
                    if flow.is_break() || next == end {
                        return Ok(next);
                    }
                }
                // The records up to the end were compacted away.
                Some(Err(KafkaError::PartitionEOF(_))) => return Ok(end),
                Some(Err(error)) if class(&error) != Class::Transport => {
                    return Err(error).with_context(|| format!("Kafka refuses to send {topic}"));
                }
                Some(Err(error)) => tracing::debug!(topic, %error, "cannot read the topic; will retry"),
                None => {}
            }
        }
        bail!("Kafka sent nothing of {topic} within {READ_TIMEOUT:?}")
    }

    /// The record at this offset. `None`: it was compacted away.
    ///
    /// # Errors
    /// As [`TopicReader::scan`].
    pub fn at(&mut self, topic: &str, offset: i64) -> anyhow::Result<Option<OwnedMessage>> {
        let mut found = None;
        let end = self.end(topic)?;
        ensure!(offset < end, "{topic} has no offset {offset} yet: was the topic created again?");
        self.scan(topic, offset, end, |message| {
            found = Some(message).filter(|message| message.offset() == offset);
            ControlFlow::Break(())
        })?;
        Ok(found)
    }
}

/// Reads the records that pointers name.
pub struct RecordReader(Client);

impl RecordReader {
    /// # Errors
    /// The Kafka settings are invalid.
    pub fn new(kafka: &KafkaConfig, group: &str) -> anyhow::Result<Self> {
        Ok(Self(Client::new(&kafka.redriver(group))?))
    }

    /// `None`: the record was compacted away. Blocks the calling thread.
    ///
    /// # Errors
    /// Kafka refuses or does not answer.
    pub fn read(&self, coordinates: &Coordinates) -> anyhow::Result<Option<OwnedMessage>> {
        assign(&self.0, &coordinates.topic, coordinates.partition, coordinates.offset)?;
        let deadline = Instant::now() + READ_TIMEOUT;
        while Instant::now() < deadline {
            match self.0.poll(POLL_INTERVAL) {
                Some(Ok(message)) => return Ok((message.offset() == coordinates.offset).then(|| message.detach())),
                Some(Err(KafkaError::PartitionEOF(_))) => return Ok(None),
                Some(Err(error)) if class(&error) != Class::Transport => {
                    bail!("Kafka refuses to send the record at {coordinates}: {error}")
                }
                Some(Err(error)) => tracing::debug!(%coordinates, %error, "cannot read the record; will retry"),
                None => {}
            }
        }
        bail!("Kafka did not send the record at {coordinates} within {READ_TIMEOUT:?}")
    }
}

fn assign(client: &BaseConsumer, topic: &str, partition: i32, offset: i64) -> anyhow::Result<()> {
    let mut start = TopicPartitionList::new();
    start.add_partition_offset(topic, partition, Offset::Offset(offset))?;
    Ok(client.assign(&start)?)
}

fn is_unknown(error: &KafkaError) -> bool {
    use RDKafkaErrorCode::{UnknownPartition, UnknownTopic, UnknownTopicOrPartition};
    matches!(error.rdkafka_error_code(), Some(UnknownPartition | UnknownTopic | UnknownTopicOrPartition))
}
