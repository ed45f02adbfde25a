//! Topics as an operator's mistake would leave them.

use rdkafka::admin::{AdminClient, AdminOptions, NewTopic, TopicReplication};
use rdkafka::client::DefaultClientContext;
use rdkafka::error::RDKafkaErrorCode;
use rdkafka::{ClientConfig, Offset, TopicPartitionList};

use crate::System;

impl System {
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

    pub async fn delete_topic(&self, topic: &str) {
        let name = self.prefixed(topic);
        self.admin().delete_topics(&[&name], &AdminOptions::new()).await.unwrap()[0].as_ref().unwrap();
    }

    /// Deletes the records of a partition that stand before an offset, as retention does.
    pub async fn delete_records(&self, topic: &str, partition: i32, before: i64) {
        let mut offsets = TopicPartitionList::new();
        offsets.add_partition_offset(&self.prefixed(topic), partition, Offset::Offset(before)).unwrap();
        let deleted = self.admin().delete_records(&offsets, &AdminOptions::new()).await.unwrap();
        deleted.elements()[0].error().unwrap();
    }

    fn admin(&self) -> AdminClient<DefaultClientContext> {
        let mut client = ClientConfig::new();
        client.set("bootstrap.servers", &self.kafka).set("broker.address.family", "v4").create().unwrap()
    }
}
