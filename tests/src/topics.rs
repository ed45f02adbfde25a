//! Topics and groups as an operator, or an operator's mistake, would leave them.

use std::collections::BTreeMap;

use rdkafka::admin::{AdminClient, AdminOptions, ConfigSource, NewTopic, ResourceSpecifier, TopicReplication};
use rdkafka::client::DefaultClientContext;
use rdkafka::error::RDKafkaErrorCode;
use rdkafka::{ClientConfig, Offset, TopicPartitionList};

use crate::{System, eventually};

impl System {
    fn admin(&self) -> AdminClient<DefaultClientContext> {
        ClientConfig::new().set("bootstrap.servers", &self.kafka).create().unwrap()
    }

    /// Creates a topic (its name without the prefix) before its owner does.
    pub async fn create_topic(&self, topic: &str, partitions: i32, settings: &[(&str, &str)]) {
        self.try_create_topic(topic, partitions, settings).await.unwrap();
    }

    /// The same where it may not be possible yet.
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

    /// The settings that a topic has of its own, and how many copies.
    pub async fn topic_settings(&self, topic: &str) -> (BTreeMap<String, String>, usize) {
        let (name, admin) = (self.prefixed(topic), self.admin());
        let described = admin.describe_configs([&ResourceSpecifier::Topic(&name)], &AdminOptions::new()).await;
        let entries = described.unwrap().remove(0).unwrap().entries.into_iter();
        let own = entries.filter(|entry| entry.source == ConfigSource::DynamicTopic);
        let settings = own.map(|entry| (entry.name, entry.value.unwrap_or_default())).collect();
        let metadata = admin.inner().fetch_metadata(Some(&name), crate::DEADLINE).unwrap();
        (settings, metadata.topics()[0].partitions()[0].replicas().len())
    }

    /// Deletes a topic with all that is in it, and waits until Kafka does not know it any more.
    pub async fn delete_topic(&self, topic: &str) {
        let (name, admin) = (self.prefixed(topic), self.admin());
        admin.delete_topics(&[&name], &AdminOptions::new()).await.unwrap()[0].as_ref().unwrap();
        eventually("the topic is gone", async || {
            let metadata = admin.inner().fetch_metadata(Some(&name), crate::DEADLINE).unwrap();
            metadata.topics()[0].partitions().is_empty().then_some(())
        })
        .await;
    }

    /// Resets a consumer group: what it has read is forgotten. Its members have been told to stop.
    pub async fn reset_group(&self, group: &str) {
        let (name, admin) = (self.prefixed(group), self.admin());
        eventually("the group is reset", async || {
            admin.delete_groups(&[&name], &AdminOptions::new()).await.unwrap()[0].as_ref().ok().map(|_| ())
        })
        .await;
    }

    /// Deletes the records of a partition that stand before an offset, as retention does.
    pub async fn delete_records(&self, topic: &str, partition: i32, before: i64) {
        let mut offsets = TopicPartitionList::new();
        offsets.add_partition_offset(&self.prefixed(topic), partition, Offset::Offset(before)).unwrap();
        let deleted = self.admin().delete_records(&offsets, &AdminOptions::new()).await.unwrap();
        deleted.elements()[0].error().unwrap();
    }
}
