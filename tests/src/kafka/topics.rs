//! Topics, as an operator creates, changes and deletes them.

use std::collections::BTreeMap;
use std::sync::atomic::Ordering;

use rdkafka::admin::{
    AdminClient, AdminOptions, AlterConfig, ConfigSource, NewPartitions, NewTopic, ResourceSpecifier, TopicReplication,
};
use rdkafka::client::DefaultClientContext;
use rdkafka::error::RDKafkaErrorCode;
use rdkafka::producer::{FutureProducer, FutureRecord};
use rdkafka::{Offset, TopicPartitionList};
use uuid::Uuid;

use super::{Kafka, TIMEOUT};
use crate::record::Draft;
use crate::services::USER_STATE;
use crate::waiting::{DEADLINE, eventually};

/// The number of partitions of `user.state.v1`.
const PARTITIONS: i32 = 6;

impl Kafka {
    pub(super) fn admin(&self) -> AdminClient<DefaultClientContext> {
        self.client().create().unwrap()
    }

    pub async fn create_topic(&self, topic: &str, partitions: i32, settings: &[(&str, &str)]) {
        self.try_create_topic(topic, partitions, settings).await.unwrap();
    }

    /// As [`Kafka::create_topic`], for a topic that Kafka may not accept yet.
    pub async fn try_create_topic(
        &self,
        topic: &str,
        partitions: i32,
        settings: &[(&str, &str)],
    ) -> Result<(), RDKafkaErrorCode> {
        let name = self.prefixed(topic);
        let mut new = NewTopic::new(&name, partitions, TopicReplication::Fixed(1));
        new.config = settings.to_vec();
        let created = self.admin().create_topics([&new], &AdminOptions::new()).await.unwrap().remove(0);
        created.map(drop).map_err(|(_, code)| code)
    }

    /// The settings that are not Kafka's defaults, and the number of replicas.
    pub async fn topic_settings(&self, topic: &str) -> (BTreeMap<String, String>, usize) {
        let name = self.prefixed(topic);
        let admin = self.admin();
        let described = admin.describe_configs([&ResourceSpecifier::Topic(&name)], &AdminOptions::new()).await;
        let entries = described.unwrap().remove(0).unwrap().entries.into_iter();
        let own = entries.filter(|entry| entry.source == ConfigSource::DynamicTopic);
        let settings = own.map(|entry| (entry.name, entry.value.unwrap_or_default())).collect();
        let metadata = admin.inner().fetch_metadata(Some(&name), DEADLINE).unwrap();
        (settings, metadata.topics()[0].partitions()[0].replicas().len())
    }

    /// Changes a topic's number of partitions.
    pub async fn set_partitions(&self, topic: &str, partitions: usize) {
        let name = self.prefixed(topic);
        let new = [NewPartitions::new(&name, partitions)];
        self.admin().create_partitions(&new, &AdminOptions::new()).await.unwrap().remove(0).unwrap();
    }

    /// Sets a topic's settings. The settings that are not named return to Kafka's defaults.
    pub async fn alter_topic(&self, topic: &str, settings: &[(&str, &str)]) {
        let name = self.prefixed(topic);
        let mut change = AlterConfig::new(ResourceSpecifier::Topic(&name));
        for (key, value) in settings {
            change = change.set(key, value);
        }
        self.admin().alter_configs([&change], &AdminOptions::new()).await.unwrap()[0].as_ref().unwrap();
    }

    /// Deletes a topic with its records, and waits until Kafka does not list it.
    pub async fn delete_topic(&self, topic: &str) {
        let name = self.prefixed(topic);
        let admin = self.admin();
        admin.delete_topics(&[&name], &AdminOptions::new()).await.unwrap()[0].as_ref().unwrap();
        eventually("the topic is deleted", async || {
            let metadata = admin.inner().fetch_metadata(Some(&name), DEADLINE).unwrap();
            metadata.topics()[0].partitions().is_empty().then_some(())
        })
        .await;
    }

    /// Deletes the records of a partition before an offset, as retention does.
    pub async fn delete_records(&self, topic: &str, partition: i32, before: i64) {
        let mut offsets = TopicPartitionList::new();
        offsets.add_partition_offset(&self.prefixed(topic), partition, Offset::Offset(before)).unwrap();
        let deleted = self.admin().delete_records(&offsets, &AdminOptions::new()).await.unwrap();
        deleted.elements()[0].error().unwrap();
    }

    /// Lets Kafka compact `user.state.v1` as soon as [`Kafka::roll_states`] has closed its
    /// segments.
    pub async fn force_compaction(&self) {
        self.compacted.store(true, Ordering::Relaxed);
        let settings = [
            ("cleanup.policy", "compact"),
            ("segment.ms", "100"),
            ("min.cleanable.dirty.ratio", "0.001"),
            ("max.compaction.lag.ms", "100"),
            ("delete.retention.ms", "100"),
        ];
        self.alter_topic(USER_STATE, &settings).await;
    }

    /// Writes a tombstone of an unknown user to each partition of `user.state.v1`. Only an append
    /// closes a segment, and only a closed segment is compacted. Call it repeatedly: the broker may
    /// not know the settings of [`Kafka::force_compaction`] yet.
    pub async fn roll_states(&self) {
        let tombstone = |partition| Draft::user_state(Uuid::now_v7(), 1, None).on(partition);
        self.write_all(USER_STATE, &(0..PARTITIONS).map(tombstone).collect::<Vec<_>>()).await;
    }

    /// Whether Kafka refuses a record of this size. A record that it accepts has no headers, so it
    /// is no dead letter.
    pub async fn refuses(&self, topic: &str, bytes: usize) -> bool {
        let producer: FutureProducer = self.client().create().unwrap();
        let name = self.prefixed(topic);
        let value = vec![0; bytes];
        producer.send(FutureRecord::to(&name).key("size").payload(&value), TIMEOUT).await.is_err()
    }
}
