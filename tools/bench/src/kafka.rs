//! Clients of Kafka: they write backlogs for the services and read back what the services wrote.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, ensure};
use rdkafka::admin::{AdminClient, AdminOptions, NewTopic, TopicReplication};
use rdkafka::client::DefaultClientContext;
use rdkafka::consumer::{BaseConsumer, Consumer};
use rdkafka::error::{KafkaError, RDKafkaErrorCode};
use rdkafka::message::{Header, OwnedHeaders};
use rdkafka::producer::{BaseRecord, DeliveryResult, Producer, ProducerContext, ThreadedProducer};
use rdkafka::{ClientConfig, ClientContext, Message, Offset, TopicPartitionList};
use shared::events::{Envelope, Event};

use crate::bed::Bed;

const TIMEOUT: Duration = Duration::from_secs(30);
const QUEUE_FULL_PAUSE: Duration = Duration::from_micros(500);
const POLL: Duration = Duration::from_micros(200);

fn client(bed: &Bed) -> ClientConfig {
    let mut client = ClientConfig::new();
    client.set("bootstrap.servers", bed.stack.kafka_addresses()).set("allow.auto.create.topics", "false");
    client
}

pub fn admin(bed: &Bed) -> Result<AdminClient<DefaultClientContext>> {
    Ok(client(bed).create()?)
}

/// Creates a topic with as many partitions as ours.
pub async fn create_topic(bed: &Bed, name: &str, partitions: i32) -> Result<()> {
    let new = NewTopic::new(name, partitions, TopicReplication::Fixed(1));
    let created = admin(bed)?.create_topics([&new], &AdminOptions::new()).await?;
    match created.into_iter().next() {
        Some(Ok(_) | Err((_, RDKafkaErrorCode::TopicAlreadyExists))) => Ok(()),
        other => Err(anyhow!("cannot create the topic {name}: {other:?}")),
    }
}

/// A producer with the settings of the relay's, which counts the records that Kafka rejects.
pub struct Writer {
    producer: ThreadedProducer<Rejections>,
    rejected: Arc<AtomicU64>,
}

struct Rejections(Arc<AtomicU64>);

impl ClientContext for Rejections {}

impl ProducerContext for Rejections {
    type DeliveryOpaque = ();

    fn delivery(&self, result: &DeliveryResult<'_>, (): ()) {
        if result.is_err() {
            self.0.fetch_add(1, Ordering::Relaxed);
        }
    }
}

impl Writer {
    /// Without transactions.
    pub fn new(bed: &Bed) -> Result<Self> {
        let mut config = client(bed);
        config.set("linger.ms", "5");
        Self::with(config)
    }

    /// Sends each record at once.
    pub fn without_linger(bed: &Bed) -> Result<Self> {
        let mut config = client(bed);
        config.set("linger.ms", "0");
        Self::with(config)
    }

    /// With transactions, so that readers see a whole backlog at one moment.
    pub fn transactional(bed: &Bed, id: &str) -> Result<Self> {
        let mut config = client(bed);
        config.set("transactional.id", id).set("transaction.timeout.ms", "300000").set("linger.ms", "5");
        let writer = Self::with(config)?;
        writer.producer.init_transactions(TIMEOUT)?;
        Ok(writer)
    }

    fn with(mut config: ClientConfig) -> Result<Self> {
        config
            .set("enable.idempotence", "true")
            .set("acks", "all")
            .set("compression.type", "zstd")
            .set("partitioner", "murmur2_random")
            .set("queue.buffering.max.messages", "500000");
        let rejected: Arc<AtomicU64> = Arc::default();
        let producer = config.create_with_context(Rejections(Arc::clone(&rejected)))?;
        Ok(Self { producer, rejected })
    }

    /// Hands a record to the client, and waits while its queue is full.
    pub fn send(&self, topic: &str, key: &[u8], headers: OwnedHeaders, payload: Option<&[u8]>) -> Result<()> {
        let mut record = BaseRecord::to(topic).key(key).headers(headers);
        if let Some(payload) = payload {
            record = record.payload(payload);
        }
        loop {
            record = match self.producer.send(record) {
                Ok(()) => return Ok(()),
                Err((KafkaError::MessageProduction(RDKafkaErrorCode::QueueFull), unsent)) => {
                    std::thread::sleep(QUEUE_FULL_PAUSE);
                    unsent
                }
                Err((error, _)) => return Err(error).context("cannot write a record"),
            };
        }
    }

    /// Writes an event as the relay does.
    pub fn send_event<E: Event>(&self, topic: &str, envelope: &Envelope, event: &E) -> Result<()> {
        let headers = envelope.headers();
        let headers = headers.iter().fold(OwnedHeaders::new_with_capacity(headers.len()), |headers, (key, value)| {
            headers.insert(Header { key, value: Some(value) })
        });
        let (_, payload) = event.encode();
        self.send(topic, envelope.key.to_string().as_bytes(), headers, payload.as_deref())
    }

    /// Waits until Kafka has all records.
    pub fn wait(&self) -> Result<()> {
        let deadline = Instant::now() + TIMEOUT;
        while self.producer.in_flight_count() > 0 {
            ensure!(Instant::now() < deadline, "Kafka does not acknowledge the records");
            std::thread::sleep(POLL);
        }
        let rejected = self.rejected.load(Ordering::Relaxed);
        ensure!(rejected == 0, "Kafka rejected {rejected} records");
        Ok(())
    }

    pub fn begin(&self) -> Result<()> {
        Ok(self.producer.begin_transaction()?)
    }

    pub fn commit(&self) -> Result<()> {
        Ok(self.producer.commit_transaction(TIMEOUT)?)
    }
}

/// A reader of committed records that joins no group.
pub fn reader(bed: &Bed) -> Result<BaseConsumer> {
    isolated(bed, "read_committed")
}

fn isolated(bed: &Bed, level: &str) -> Result<BaseConsumer> {
    let mut config = client(bed);
    config
        .set("group.id", "bench")
        .set("enable.auto.commit", "false")
        .set("isolation.level", level)
        .set("enable.partition.eof", "true")
        .set("fetch.wait.max.ms", "100");
    Ok(config.create()?)
}

/// Makes a reader read all partitions of a topic from these offsets on.
pub fn assign(reader: &BaseConsumer, topic: &str, starts: &BTreeMap<i32, i64>) -> Result<()> {
    let mut assignment = TopicPartitionList::new();
    for (partition, offset) in starts {
        assignment.add_partition_offset(topic, *partition, Offset::Offset(*offset))?;
    }
    Ok(reader.assign(&assignment)?)
}

/// The end of each partition: the offset of the next record, whether a transaction is open or not.
pub fn ends(bed: &Bed, topic: &str) -> Result<BTreeMap<i32, i64>> {
    let reader = isolated(bed, "read_uncommitted")?;
    let metadata = reader.fetch_metadata(Some(topic), TIMEOUT)?;
    let partitions = metadata.topics().first().map_or(0, |topic| topic.partitions().len());
    ensure!(partitions > 0, "the topic {topic} does not exist");
    let end = |partition| Ok((partition, reader.fetch_watermarks(topic, partition, TIMEOUT)?.1));
    (0..i32::try_from(partitions)?).map(end).collect()
}

/// Waits until readers of committed records may read up to these ends. Kafka acknowledges a commit
/// before it writes the markers that make its records visible.
fn until_visible(reader: &BaseConsumer, topic: &str, ends: &BTreeMap<i32, i64>) -> Result<()> {
    let deadline = Instant::now() + TIMEOUT;
    for (partition, end) in ends {
        while reader.fetch_watermarks(topic, *partition, TIMEOUT)?.1 < *end {
            ensure!(Instant::now() < deadline, "a transaction on {topic} does not end");
            std::thread::sleep(POLL);
        }
    }
    Ok(())
}

/// Calls `each` with every committed record from these offsets to the end.
pub fn read(
    bed: &Bed,
    topic: &str,
    starts: &BTreeMap<i32, i64>,
    mut each: impl FnMut(&rdkafka::message::BorrowedMessage<'_>) -> Result<()>,
) -> Result<()> {
    let reader = reader(bed)?;
    until_visible(&reader, topic, &ends(bed, topic)?)?;
    assign(&reader, topic, starts)?;
    let mut open = starts.len();
    while open > 0 {
        match reader.poll(TIMEOUT) {
            Some(Ok(message)) => each(&message)?,
            Some(Err(KafkaError::PartitionEOF(_))) => open -= 1,
            Some(Err(error)) => return Err(error).with_context(|| format!("cannot read {topic}")),
            None => return Err(anyhow!("Kafka sends no records of {topic}")),
        }
    }
    Ok(())
}

/// A header of a record.
pub fn header<'a>(
    message: &'a impl Message<Headers = rdkafka::message::BorrowedHeaders>,
    name: &str,
) -> Option<&'a str> {
    use rdkafka::message::Headers;
    let value = message.headers()?.iter().find(|header| header.key == name)?.value?;
    std::str::from_utf8(value).ok()
}
