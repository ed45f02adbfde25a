//! Kafka, as other people's clients see it: the raw log of a topic, records of any shape, offsets of groups.

use std::collections::BTreeMap;
use std::time::Duration;

use futures::future::join_all;
use rdkafka::admin::{AdminClient, AdminOptions, AlterConfig, ResourceSpecifier};
use rdkafka::client::DefaultClientContext;
use rdkafka::consumer::{BaseConsumer, CommitMode, Consumer};
use rdkafka::message::{Header, Headers, Message, OwnedHeaders};
use rdkafka::producer::{FutureProducer, FutureRecord, Producer};
use rdkafka::{ClientConfig, Offset, TopicPartitionList};
use time::OffsetDateTime;
use time::format_description::well_known::Rfc3339;
use uuid::Uuid;

use crate::System;

const TIMEOUT: Duration = Duration::from_secs(10);

/// The consumer groups of the whole system, with the topic that each reads.
pub const GROUPS: [(&str, &str); 5] = [
    ("email.welcome", "user.events.v1"),
    ("email.recipients", "user.state.v1"),
    ("analytics.users", "user.events.v1"),
    ("analytics.emails", "email.events.v1"),
    ("cache.profiles", "user.state.v1"),
];

/// A record as it stands in the log.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Raw {
    pub partition: i32,
    pub offset: i64,
    pub key: Option<Vec<u8>>,
    pub value: Option<Vec<u8>>,
    pub headers: Vec<(String, Option<Vec<u8>>)>,
}

impl Raw {
    /// The first header of this name, as text.
    pub fn header(&self, name: &str) -> Option<&str> {
        let (_, value) = self.headers.iter().find(|(key, _)| key == name)?;
        std::str::from_utf8(value.as_deref()?).ok()
    }

    pub fn key_text(&self) -> String {
        String::from_utf8_lossy(self.key.as_deref().unwrap_or_default()).into_owned()
    }

    pub fn version(&self) -> i64 {
        self.header("ce_sequence").and_then(|version| version.parse().ok()).expect("an event has a version")
    }

    /// Everything in it as text, to search for what must not be there.
    pub fn text(&self) -> String {
        let bytes =
            |bytes: &Option<Vec<u8>>| String::from_utf8_lossy(bytes.as_deref().unwrap_or_default()).into_owned();
        let headers = self.headers.iter().map(|(key, value)| format!("{key}: {}", bytes(value)));
        format!("{} {} {}", self.key_text(), bytes(&self.value), headers.collect::<Vec<_>>().join(" "))
    }
}

/// A record to be written by hand.
#[derive(Clone, Debug, Default)]
pub struct Draft {
    pub partition: Option<i32>,
    pub key: Option<Vec<u8>>,
    pub value: Option<Vec<u8>>,
    pub headers: Vec<(String, Option<Vec<u8>>)>,
}

impl Draft {
    /// A well-formed fact about `user`, as the user service would have written it.
    pub fn user_event(kind: &str, user: Uuid, version: i64) -> Self {
        let value = format!(r#"{{"user_id":"{user}"}}"#).into_bytes();
        Self { value: Some(value), ..Self::envelope(kind, user, version) }
    }

    /// The envelope alone: key and headers, no value. It happened now: an old event is another thing.
    pub fn envelope(kind: &str, key: Uuid, version: i64) -> Self {
        let headers = [
            ("ce_specversion", "1.0".to_owned()),
            ("ce_id", Uuid::now_v7().to_string()),
            ("ce_type", kind.to_owned()),
            ("ce_source", "/test".to_owned()),
            ("ce_subject", key.to_string()),
            ("ce_time", OffsetDateTime::now_utc().format(&Rfc3339).unwrap()),
            ("ce_dataschema", format!("urn:waybill:{kind}:1")),
            ("ce_sequence", version.to_string()),
            ("content-type", "application/json".to_owned()),
        ];
        let headers = headers.map(|(key, value)| (key.to_owned(), Some(value.into_bytes())));
        Self { partition: None, key: Some(key.to_string().into_bytes()), value: None, headers: headers.into() }
    }

    fn record<'a>(&'a self, topic: &'a str) -> FutureRecord<'a, [u8], [u8]> {
        let headers = self.headers.iter();
        let headers = headers
            .fold(OwnedHeaders::new(), |headers, (key, value)| headers.insert(Header { key, value: value.as_ref() }));
        let mut record = FutureRecord::to(topic).headers(headers);
        (record.partition, record.key, record.payload) = (self.partition, self.key.as_deref(), self.value.as_deref());
        record
    }

    pub fn without(mut self, header: &str) -> Self {
        self.headers.retain(|(name, _)| name != header);
        self
    }

    pub fn with(mut self, header: &str, value: &[u8]) -> Self {
        self.headers.push((header.to_owned(), Some(value.to_vec())));
        self
    }
}

impl System {
    pub(crate) fn client(&self) -> ClientConfig {
        let mut client = ClientConfig::new();
        client.set("bootstrap.servers", &self.kafka).set("broker.address.family", "v4");
        client
    }

    /// Every committed record of a topic (its name without the prefix), partition by partition, from the beginning to where it
    /// ended when this was called. A topic that does not exist is empty.
    pub fn read(&self, topic: &str) -> Vec<Raw> {
        let name = self.prefixed(topic);
        let consumer: BaseConsumer = self
            .client()
            .set("group.id", "reader")
            .set("enable.auto.commit", "false")
            .set("isolation.level", "read_committed")
            .set("enable.partition.eof", "true")
            .set("fetch.wait.max.ms", "20") // an empty partition says so only after this time
            .create()
            .unwrap();
        let metadata = consumer.fetch_metadata(Some(&name), TIMEOUT).unwrap();
        let partitions = metadata.topics()[0].partitions().len();
        let mut records = vec![];
        for partition in 0..i32::try_from(partitions).unwrap() {
            let mut start = TopicPartitionList::new();
            start.add_partition_offset(&name, partition, Offset::Beginning).unwrap();
            consumer.assign(&start).unwrap();
            loop {
                match consumer.poll(TIMEOUT) {
                    Some(Ok(message)) => records.push(raw(&message)),
                    Some(Err(rdkafka::error::KafkaError::PartitionEOF(_))) => break,
                    other => panic!("cannot read {name}: {other:?}"),
                }
            }
        }
        records
    }

    /// Writes a record by hand, as any client could, and waits for Kafka's answer: partition and offset.
    pub async fn write(&self, topic: &str, draft: &Draft) -> (i32, i64) {
        self.write_all(topic, std::slice::from_ref(draft)).await[0]
    }

    /// The same for many at once, in this order.
    pub async fn write_all(&self, topic: &str, drafts: &[Draft]) -> Vec<(i32, i64)> {
        let producer: FutureProducer =
            self.client().set("partitioner", "murmur2_random").set("message.max.bytes", "2000000").create().unwrap();
        let name = self.prefixed(topic);
        let sent = drafts.iter().map(|draft| {
            self.note_by_hand(draft);
            let delivery = producer.send_result(draft.record(&name)).unwrap();
            async { delivery.await.unwrap().unwrap() }
        });
        let deliveries = join_all(sent).await;
        deliveries.into_iter().map(|delivery| (delivery.partition, delivery.offset)).collect()
    }

    /// Writes a record in a transaction that is given up, as a relay that dies in its round leaves it.
    pub async fn write_and_abort(&self, topic: &str, draft: &Draft) {
        self.note_by_hand(draft);
        let id = self.prefixed("aborting");
        let producer: FutureProducer = self.client().set("transactional.id", id).create().unwrap();
        producer.init_transactions(TIMEOUT).unwrap();
        producer.begin_transaction().unwrap();
        producer.send(draft.record(&self.prefixed(topic)), TIMEOUT).await.unwrap();
        producer.abort_transaction(TIMEOUT).unwrap();
    }

    /// The records that a group has not committed yet, per partition that has such; the transaction markers count too.
    pub fn lag_of(&self, group: &str, topic: &str) -> Vec<String> {
        let name = self.prefixed(topic);
        let consumer: BaseConsumer = self.client().set("group.id", self.prefixed(group)).create().unwrap();
        let Some(committed) = committed(&consumer, &name) else { return vec![format!("{group}: unknown")] };
        let behind = committed.into_iter().filter_map(|(partition, committed)| {
            let (_, end) = consumer.fetch_watermarks(&name, partition, TIMEOUT).unwrap();
            let committed = committed.unwrap_or(0);
            (committed < end).then(|| format!("{group} {partition}: {committed} of {end}"))
        });
        behind.collect()
    }

    /// The offsets that a group has committed, by partition.
    pub fn committed(&self, group: &str, topic: &str) -> BTreeMap<i32, i64> {
        let consumer: BaseConsumer = self.client().set("group.id", self.prefixed(group)).create().unwrap();
        let committed = committed(&consumer, &self.prefixed(topic)).unwrap_or_default();
        committed.into_iter().filter_map(|(partition, offset)| Some((partition, offset?))).collect()
    }

    /// Sets a group's offset, as an operator does while the group is empty.
    pub fn commit(&self, group: &str, topic: &str, partition: i32, offset: i64) {
        let consumer: BaseConsumer = self.client().set("group.id", self.prefixed(group)).create().unwrap();
        let mut offsets = TopicPartitionList::new();
        offsets.add_partition_offset(&self.prefixed(topic), partition, Offset::Offset(offset)).unwrap();
        consumer.commit(&offsets, CommitMode::Sync).unwrap();
    }

    /// Changes a topic's settings on the broker, all that are not named back to their defaults.
    pub async fn alter_topic(&self, topic: &str, settings: &[(&str, &str)]) {
        let admin: AdminClient<DefaultClientContext> = self.client().create().unwrap();
        let name = self.prefixed(topic);
        let mut change = AlterConfig::new(ResourceSpecifier::Topic(&name));
        for (key, value) in settings {
            change = change.set(key, value);
        }
        admin.alter_configs([&change], &AdminOptions::new()).await.unwrap()[0].as_ref().unwrap();
    }

    /// Lets `user.state.v1` be compacted as soon as it can be; [`System::roll_states`] makes it so.
    pub async fn force_compaction(&self) {
        self.note_compaction();
        let settings = [
            ("cleanup.policy", "compact"),
            ("segment.ms", "100"),
            ("min.cleanable.dirty.ratio", "0.001"),
            ("max.compaction.lag.ms", "100"),
            ("delete.retention.ms", "100"),
        ];
        self.alter_topic("user.state.v1", &settings).await;
    }

    /// Gives each partition one more record, since only an append rolls a segment, and only what is rolled is compacted. To be
    /// repeated: the broker may not know the settings yet. The records are tombstones of users that never were.
    pub async fn roll_states(&self) {
        let marker = |partition| Draft::envelope("user.state", Uuid::now_v7(), 1).on(partition);
        self.write_all("user.state.v1", &(0..6).map(marker).collect::<Vec<_>>()).await;
    }

    /// Whether Kafka refuses a record of this size. One that it takes has no headers, so nobody reads a letter in it.
    pub async fn is_refused(&self, topic: &str, bytes: usize) -> bool {
        let producer: FutureProducer = self.client().create().unwrap();
        let (topic, value) = (self.prefixed(topic), vec![0; bytes]);
        producer.send(FutureRecord::to(&topic).key("size").payload(&value), TIMEOUT).await.is_err()
    }
}

/// `None`: Kafka does not say. Of a partition: nothing is committed.
fn committed(consumer: &BaseConsumer, topic: &str) -> Option<Vec<(i32, Option<i64>)>> {
    let metadata = consumer.fetch_metadata(Some(topic), TIMEOUT).unwrap();
    let mut list = TopicPartitionList::new();
    for partition in metadata.topics()[0].partitions() {
        list.add_partition(topic, partition.id());
    }
    let committed = consumer.committed_offsets(list, TIMEOUT).ok()?;
    let offset = |offset: Offset| offset.to_raw().filter(|offset| *offset >= 0);
    Some(committed.elements().into_iter().map(|element| (element.partition(), offset(element.offset()))).collect())
}

fn raw(message: &impl Message) -> Raw {
    let headers = message.headers().into_iter().flat_map(|headers| headers.iter());
    Raw {
        partition: message.partition(),
        offset: message.offset(),
        key: message.key().map(<[u8]>::to_vec),
        value: message.payload().map(<[u8]>::to_vec),
        headers: headers.map(|header| (header.key.to_owned(), header.value.map(<[u8]>::to_vec))).collect(),
    }
}
