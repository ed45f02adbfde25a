//! Topics as an operator's mistake would leave them.

use rdkafka::ClientConfig;
use rdkafka::admin::{AdminClient, AdminOptions, NewTopic, TopicReplication};
use rdkafka::client::DefaultClientContext;

use crate::{DEADLINE, System, eventually};

impl System {
    /// Creates a topic (its name without the prefix) before its owner does.
    pub async fn create_topic(&self, topic: &str, partitions: i32, settings: &[(&str, &str)]) {
        let name = self.prefixed(topic);
        let mut new = NewTopic::new(&name, partitions, TopicReplication::Fixed(1));
        new.config = settings.to_vec();
        self.admin().create_topics([&new], &AdminOptions::new()).await.unwrap()[0].as_ref().unwrap();
    }
    /// Deletes a topic, with all that is in it, and waits until Kafka does not know it any more.
    pub async fn delete_topic(&self, topic: &str) {
        let (admin, name) = (self.admin(), self.prefixed(topic));
        admin.delete_topics(&[&name], &AdminOptions::new()).await.unwrap()[0].as_ref().unwrap();
        eventually("the topic is gone", async || {
            let metadata = admin.inner().fetch_metadata(Some(&name), DEADLINE).unwrap();
            metadata.topics()[0].partitions().is_empty().then_some(())
        })
        .await;
    }

    fn admin(&self) -> AdminClient<DefaultClientContext> {
        let mut client = ClientConfig::new();
        client.set("bootstrap.servers", &self.kafka).set("broker.address.family", "v4").create().unwrap()
    }
}
