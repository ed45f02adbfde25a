//! Kafka of three brokers: who leads, and who is in sync.

use std::time::Duration;

use rdkafka::consumer::{BaseConsumer, Consumer};
use rdkafka::metadata::Metadata;
use testbed::kafka::Kafka;

use crate::{System, eventually, eventually_eq};

const TIMEOUT: Duration = Duration::from_secs(5);

impl System {
    pub fn broker(&mut self, id: i32) -> &mut Kafka {
        let mut brokers = self.stack.as_mut().expect("a system on components of its own").brokers();
        brokers.find(|broker| broker.id == id).expect("brokers are numbered from 1")
    }

    /// Who leads the partition.
    pub async fn leader_of(&self, topic: &str, partition: i32) -> i32 {
        self.leader_other_than(0, topic, partition).await
    }

    /// Waits until another broker leads the partition, and says which.
    pub async fn leader_other_than(&self, lost: i32, topic: &str, partition: i32) -> i32 {
        let name = self.prefixed(topic);
        eventually(&format!("{topic} {partition} has a leader that is not broker {lost}"), async || {
            let metadata = self.metadata()?;
            let topic = metadata.topics().iter().find(|known| known.name() == name)?;
            let leader = topic.partitions().iter().find(|known| known.id() == partition)?.leader();
            (leader > 0 && leader != lost).then_some(leader)
        })
        .await
    }

    /// Waits until every copy of every partition, of Kafka's own topics too, is in sync.
    pub async fn until_in_sync(&self) {
        eventually_eq("partitions with a copy that is not in sync", Some(vec![]), async || {
            let metadata = self.metadata()?;
            let partitions = metadata.topics().iter().flat_map(|topic| {
                let behind = topic.partitions().iter().filter(|known| known.isr().len() < known.replicas().len());
                behind.map(move |partition| format!("{} {}", topic.name(), partition.id()))
            });
            Some(partitions.collect::<Vec<_>>())
        })
        .await;
    }

    /// From a new client, which asks a broker that answers. `None`: none did in time.
    fn metadata(&self) -> Option<Metadata> {
        let client: BaseConsumer = self.client().create().unwrap();
        tokio::task::block_in_place(|| client.fetch_metadata(None, TIMEOUT)).ok()
    }
}
