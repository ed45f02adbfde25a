//! The facet `kafka`: topics, records, consumer groups and brokers, as other clients and operators
//! of Kafka see them. A topic or group is named without the prefix of the test.

mod brokers;
mod dead_letters;
mod group_leader;
mod groups;
mod topics;
mod wire;

use std::collections::BTreeSet;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use futures::future::join_all;
use rdkafka::consumer::{BaseConsumer, Consumer};
use rdkafka::error::{KafkaError, RDKafkaErrorCode};
use rdkafka::message::{Header, Headers, Message, OwnedHeaders};
use rdkafka::producer::{FutureProducer, FutureRecord, Producer};
use rdkafka::{ClientConfig, Offset, TopicPartitionList};
use uuid::Uuid;

use crate::record::{Draft, Record};

pub use group_leader::GroupLeader;
pub use wire::append_at;

const TIMEOUT: Duration = Duration::from_secs(10);
/// A bound above every test's largest record.
const LARGEST_RECORD: &str = "2000000";
/// How long a read waits at the end of an empty partition before Kafka reports the end.
const FETCH_WAIT_MS: &str = "20";
/// How long a read waits for the markers of transactions.
const MARKERS: Duration = Duration::from_secs(1);
const MARKER_POLL: Duration = Duration::from_millis(10);

pub struct Kafka {
    /// The bootstrap servers.
    pub address: String,
    prefix: String,
    /// The ids of the events that the test wrote.
    written: Mutex<BTreeSet<Uuid>>,
    compacted: AtomicBool,
}

impl Kafka {
    pub(crate) fn new(address: String, prefix: String) -> Self {
        Self { address, prefix, written: Mutex::default(), compacted: AtomicBool::new(false) }
    }

    /// The name of a topic or group on the broker.
    pub fn prefixed(&self, name: &str) -> String {
        format!("{}{name}", self.prefix)
    }

    /// Every committed record of a topic, partition by partition, from the beginning to the end at
    /// the time of the call. A topic that does not exist is empty.
    pub fn read(&self, topic: &str) -> Vec<Record> {
        let name = self.prefixed(topic);
        let consumer: BaseConsumer = self
            .client()
            .set("group.id", "reader")
            .set("enable.auto.commit", "false")
            .set("isolation.level", "read_committed")
            .set("enable.partition.eof", "true")
            .set("fetch.wait.max.ms", FETCH_WAIT_MS)
            .create()
            .unwrap();
        let metadata = consumer.fetch_metadata(Some(&name), TIMEOUT).unwrap();
        let partitions = i32::try_from(metadata.topics()[0].partitions().len()).unwrap();
        self.until_marked(&consumer, &name, partitions);
        let mut records = vec![];
        for partition in 0..partitions {
            let mut start = TopicPartitionList::new();
            start.add_partition_offset(&name, partition, Offset::Beginning).unwrap();
            consumer.assign(&start).unwrap();
            loop {
                match consumer.poll(TIMEOUT) {
                    Some(Ok(message)) => records.push(record(&message)),
                    Some(Err(KafkaError::PartitionEOF(_))) => break,
                    // One of several brokers is down. The client asks the others.
                    Some(Err(KafkaError::MessageConsumption(
                        RDKafkaErrorCode::BrokerTransportFailure
                        | RDKafkaErrorCode::AllBrokersDown
                        | RDKafkaErrorCode::Resolve,
                    ))) => {}
                    other => panic!("cannot read {name}: {other:?}"),
                }
            }
        }
        records
    }

    /// Waits until the transactions that are committed by now are visible in every partition. Kafka
    /// acknowledges a commit before it writes the markers that make its records visible. Gives up
    /// after a second: a test may keep a transaction open, or a broker is down.
    fn until_marked(&self, committed: &BaseConsumer, name: &str, partitions: i32) {
        let all: BaseConsumer =
            self.client().set("group.id", "reader").set("isolation.level", "read_uncommitted").create().unwrap();
        let end = |consumer: &BaseConsumer, partition| consumer.fetch_watermarks(name, partition, MARKERS).ok();
        let deadline = Instant::now() + MARKERS;
        for partition in 0..partitions {
            if Instant::now() >= deadline {
                return;
            }
            let Some((_, written)) = end(&all, partition) else { continue };
            while end(committed, partition).is_some_and(|(_, visible)| visible < written) && Instant::now() < deadline {
                thread::sleep(MARKER_POLL);
            }
        }
    }

    /// The committed records of one key, in the order of the topic.
    pub fn read_key(&self, topic: &str, key: Uuid) -> Vec<Record> {
        self.read(topic).into_iter().filter(|record| record.key_text() == key.to_string()).collect()
    }

    /// Writes a record and waits for Kafka's answer: partition and offset.
    pub async fn write(&self, topic: &str, draft: &Draft) -> (i32, i64) {
        self.write_all(topic, std::slice::from_ref(draft)).await[0]
    }

    /// Writes records in this order and waits for Kafka's answers: partitions and offsets.
    pub async fn write_all(&self, topic: &str, drafts: &[Draft]) -> Vec<(i32, i64)> {
        let mut client = self.client();
        client.set("partitioner", "murmur2_random").set("message.max.bytes", LARGEST_RECORD);
        let producer: FutureProducer = client.create().unwrap();
        let name = self.prefixed(topic);
        let sent = drafts.iter().map(|draft| {
            self.note_written(draft);
            let delivery = producer.send_result(future_record(draft, &name)).unwrap();
            async { delivery.await.unwrap().unwrap() }
        });
        let deliveries = join_all(sent).await;
        deliveries.into_iter().map(|delivery| (delivery.partition, delivery.offset)).collect()
    }

    /// Writes a record in a transaction and aborts it. A relay that is killed in its round leaves
    /// such records.
    pub async fn write_aborted(&self, topic: &str, draft: &Draft) {
        self.note_written(draft);
        let id = self.prefixed("aborting");
        let producer: FutureProducer = self.client().set("transactional.id", id).create().unwrap();
        producer.init_transactions(TIMEOUT).unwrap();
        producer.begin_transaction().unwrap();
        producer.send(future_record(draft, &self.prefixed(topic)), TIMEOUT).await.unwrap();
        producer.abort_transaction(TIMEOUT).unwrap();
    }

    /// Writes a record in a transaction and leaves it open, as a program that hangs does.
    pub async fn leave_transaction_open(&self, topic: &str, draft: &Draft) -> OpenTransaction {
        self.note_written(draft);
        let mut client = self.client();
        client.set("transactional.id", self.prefixed("foreign")).set("transaction.timeout.ms", "600000");
        let producer: FutureProducer = client.create().unwrap();
        producer.init_transactions(TIMEOUT).unwrap();
        producer.begin_transaction().unwrap();
        producer.send(future_record(draft, &self.prefixed(topic)), TIMEOUT).await.unwrap();
        OpenTransaction(producer)
    }

    /// Writes a record that client libraries refuse to send, byte by byte, and waits for Kafka's
    /// answer: partition and offset. Works on a system with one broker.
    pub async fn write_bytes(
        &self,
        topic: &str,
        partition: i32,
        key: &[u8],
        value: &[u8],
        headers: &[(&[u8], &[u8])],
    ) -> (i32, i64) {
        let offset = wire::append(&self.address, &self.prefixed(topic), partition, key, value, headers).await;
        (partition, offset.unwrap_or_else(|code| panic!("Kafka refuses the record: error {code}")))
    }

    /// The ids of the events that the test wrote, without an outbox.
    pub(crate) fn written_by_test(&self) -> BTreeSet<Uuid> {
        self.written.lock().unwrap().clone()
    }

    /// Whether the test had `user.state.v1` compacted.
    pub(crate) fn was_compacted(&self) -> bool {
        self.compacted.load(Ordering::Relaxed)
    }

    fn note_written(&self, draft: &Draft) {
        self.written.lock().unwrap().extend(draft.event_id());
    }

    fn client(&self) -> ClientConfig {
        let mut client = ClientConfig::new();
        client.set("bootstrap.servers", &self.address).set("broker.address.family", "v4");
        client
    }
}

/// A transaction of another program.
pub struct OpenTransaction(FutureProducer);

impl OpenTransaction {
    pub fn commit(self) {
        self.0.commit_transaction(TIMEOUT).unwrap();
    }

    /// Readers never see its records.
    pub fn abort(self) {
        self.0.abort_transaction(TIMEOUT).unwrap();
    }
}

fn future_record<'a>(draft: &'a Draft, topic: &'a str) -> FutureRecord<'a, [u8], [u8]> {
    let mut headers = OwnedHeaders::new();
    for (key, value) in &draft.headers {
        headers = headers.insert(Header { key, value: value.as_ref() });
    }
    let mut record = FutureRecord::to(topic).headers(headers);
    record.partition = draft.partition;
    record.key = draft.key.as_deref();
    record.payload = draft.value.as_deref();
    record
}

fn record(message: &impl Message) -> Record {
    let headers = message.headers().into_iter().flat_map(|headers| headers.iter());
    Record {
        partition: message.partition(),
        offset: message.offset(),
        key: message.key().map(<[u8]>::to_vec),
        value: message.payload().map(<[u8]>::to_vec),
        headers: headers.map(|header| (header.key.to_owned(), header.value.map(<[u8]>::to_vec))).collect(),
    }
}
