//! The brokers of a cluster: which of them leads a partition, and which replicas are in sync.

use std::time::Duration;

use rdkafka::consumer::{BaseConsumer, Consumer};
use rdkafka::metadata::Metadata;

use super::Kafka;
use crate::waiting::{eventually, eventually_eq};

/// How long one broker may take to answer before the request is repeated.
const METADATA_LIMIT: Duration = Duration::from_secs(5);

impl Kafka {
    /// The id of the broker that leads the partition.
    pub async fn leader_of(&self, topic: &str, partition: i32) -> i32 {
        self.leader_other_than(0, topic, partition).await
    }

    /// Waits until a broker other than `lost` leads the partition, and returns its id.
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

    /// Waits until no broker leads the partition.
    pub async fn until_no_leader(&self, topic: &str, partition: i32) {
        let name = self.prefixed(topic);
        eventually(&format!("{topic} {partition} has no leader"), async || {
            let metadata = self.metadata()?;
            let topic = metadata.topics().iter().find(|known| known.name() == name)?;
            let leader = topic.partitions().iter().find(|known| known.id() == partition)?.leader();
            (leader < 0).then_some(())
        })
        .await;
    }

    /// Waits until every replica of every partition is in sync, including Kafka's own topics.
    pub async fn until_in_sync(&self) {
        eventually_eq("partitions with a replica that is not in sync", Some(vec![]), async || {
            let metadata = self.metadata()?;
            let partitions = metadata.topics().iter().flat_map(|topic| {
                let lagging = topic.partitions().iter().filter(|known| known.isr().len() < known.replicas().len());
                lagging.map(move |partition| format!("{} {}", topic.name(), partition.id()))
            });
            Some(partitions.collect::<Vec<_>>())
        })
        .await;
    }

    /// `None` if no broker answers in time. The client is new each time, so it asks a broker that
    /// is up.
    fn metadata(&self) -> Option<Metadata> {
        let client: BaseConsumer = self.client().create().unwrap();
        tokio::task::block_in_place(|| client.fetch_metadata(None, METADATA_LIMIT)).ok()
    }
}
