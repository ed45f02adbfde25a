//! Topics as an operator's mistake would leave them.

use rdkafka::ClientConfig;
use rdkafka::admin::{AdminClient, AdminOptions, NewTopic, TopicReplication};
use rdkafka::client::DefaultClientContext;

use crate::System;

impl System {
    /// Creates a topic (its name without the prefix) before its owner does.
    pub async fn create_topic(&self, topic: &str, partitions: i32, settings: &[(&str, &str)]) {
        let admin: AdminClient<DefaultClientContext> =
            ClientConfig::new().set("bootstrap.servers", &self.kafka).create().unwrap();
        let name = self.prefixed(topic);
        let mut new = NewTopic::new(&name, partitions, TopicReplication::Fixed(1));
        new.config = settings.to_vec();
        admin.create_topics([&new], &AdminOptions::new()).await.unwrap()[0].as_ref().unwrap();
    }
}
