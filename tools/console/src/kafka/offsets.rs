//! The ends of all partitions, and how far each group has committed. Kafka is asked and not the
//! services: a group whose processes are down reports no lag.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context;
use rdkafka::consumer::{BaseConsumer, Consumer};
use rdkafka::{Offset, TopicPartitionList};
use shared::messaging::KafkaConfig;
use tokio::sync::watch;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use topology::{Group, SERVICES};

use super::{ANSWER_LIMIT, GROUP, topics};

/// The pause between two rounds of questions.
const INTERVAL: Duration = Duration::from_secs(1);

/// Offsets at one moment.
#[derive(Clone, Debug, Default)]
pub struct Offsets {
    /// First and next offset of each partition, per topic. A topic that does not exist yet has
    /// none.
    pub ends: BTreeMap<&'static str, BTreeMap<i32, (i64, i64)>>,
    /// The next offset to read, per group and partition.
    pub committed: BTreeMap<&'static str, BTreeMap<i32, i64>>,
    /// When Kafka was asked. Records that arrive later are not in the ends. `None`: it has never
    /// answered.
    pub asked: Option<Instant>,
    /// Why Kafka could not be asked.
    pub error: Option<String>,
}

impl Offsets {
    /// How many offsets of a partition a group has not handled. Transaction markers count as well,
    /// so it is a little more than the number of records. A group that has never committed has
    /// handled none. `None`: Kafka did not say.
    pub fn lag(&self, group: &Group, partition: i32) -> Option<i64> {
        let (first, next) = self.ends.get(group.topic)?.get(&partition)?;
        let committed = self.committed.get(group.name)?.get(&partition).unwrap_or(first);
        Some((next - committed).max(0))
    }

    /// The lag of all partitions of a group.
    pub fn group_lag(&self, group: &Group) -> Option<i64> {
        let partitions = self.ends.get(group.topic)?.keys();
        partitions.map(|partition| self.lag(group, *partition)).sum()
    }
}

/// Sends the offsets of every round. Runs until the stop.
pub fn watch_offsets(
    kafka: &KafkaConfig,
    offsets: &watch::Sender<Arc<Offsets>>,
    stop: &CancellationToken,
) -> anyhow::Result<()> {
    let ends: BaseConsumer = kafka.reader(GROUP).create()?;
    let groups: Vec<Group> = SERVICES.iter().flat_map(|service| service.groups).copied().collect();
    // `committed_offsets` reads the offsets of the client's own group, so each group has a client.
    let clients = groups.iter().map(|group| kafka.reader(group.name).create());
    let clients: Vec<BaseConsumer> = clients.collect::<Result<_, _>>()?;
    let mut known = Offsets::default();
    while !stop.is_cancelled() {
        let asked = ask(kafka, &ends, groups.iter().zip(&clients));
        match asked {
            Ok(asked) => known = asked,
            Err(error) => {
                let error = format!("{error:#}");
                if known.error.as_ref() != Some(&error) {
                    tracing::warn!(error, "Kafka does not answer questions about offsets; will retry");
                }
                known.error = Some(error);
            }
        }
        offsets.send_replace(Arc::new(known.clone()));
        std::thread::sleep(INTERVAL);
    }
    Ok(())
}

fn ask<'a>(
    kafka: &KafkaConfig,
    ends: &BaseConsumer,
    groups: impl Iterator<Item = (&'a Group, &'a BaseConsumer)>,
) -> anyhow::Result<Offsets> {
    let mut offsets = Offsets { asked: Some(Instant::now()), ..Offsets::default() };
    for topic in topics() {
        let name = kafka.prefixed(topic);
        let metadata = ends.fetch_metadata(Some(&name), ANSWER_LIMIT).context("Kafka does not answer")?;
        let partitions = metadata.topics().iter().flat_map(|topic| topic.partitions());
        for partition in partitions.map(|partition| partition.id()) {
            let range = ends.fetch_watermarks(&name, partition, ANSWER_LIMIT);
            let range = range.with_context(|| format!("Kafka does not say where {topic} ends"))?;
            offsets.ends.entry(topic).or_default().insert(partition, range);
        }
    }
    for (group, client) in groups {
        let Some(partitions) = offsets.ends.get(group.topic) else { continue };
        let mut asked = TopicPartitionList::new();
        for partition in partitions.keys() {
            asked.add_partition(&kafka.prefixed(group.topic), *partition);
        }
        let committed = client.committed_offsets(asked, ANSWER_LIMIT);
        let committed = committed.with_context(|| format!("Kafka does not say the offsets of {}", group.name))?;
        let known = committed.elements().into_iter().filter_map(|element| match element.offset() {
            Offset::Offset(next) => Some((element.partition(), next)),
            _ => None,
        });
        offsets.committed.insert(group.name, known.collect());
    }
    Ok(offsets)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_group_that_has_committed_nothing_lags_by_the_whole_topic() {
        let group = Group { name: "a.b", topic: "c" };
        let ends = BTreeMap::from([("c", BTreeMap::from([(0, (10, 15)), (1, (0, 3))]))]);
        let mut offsets = Offsets { ends, ..Offsets::default() };
        assert_eq!(offsets.group_lag(&group), None, "Kafka was not asked");
        offsets.committed.insert("a.b", BTreeMap::new());
        assert_eq!(offsets.group_lag(&group), Some(8));
        offsets.committed.insert("a.b", BTreeMap::from([(0, 15), (1, 1)]));
        assert_eq!(offsets.group_lag(&group), Some(2));
    }
}
