//! Consumer groups: their members and their committed offsets.

use std::collections::BTreeMap;

use rdkafka::admin::AdminOptions;
use rdkafka::consumer::{BaseConsumer, CommitMode, Consumer};
use rdkafka::{Offset, TopicPartitionList};

use super::{Kafka, TIMEOUT};
use crate::services::topic_of;
use crate::waiting::{eventually, eventually_eq};

impl Kafka {
    /// The member ids of a group, sorted. They stay the same until a member joins or leaves.
    pub fn members(&self, group: &str) -> Vec<String> {
        let consumer: BaseConsumer = self.client().create().unwrap();
        let groups = consumer.fetch_group_list(Some(&self.prefixed(group)), TIMEOUT).unwrap();
        let members = groups.groups().iter().flat_map(|group| group.members());
        let mut ids: Vec<String> = members.map(|member| member.id().to_owned()).collect();
        ids.sort();
        ids
    }

    /// Whether Kafka has distributed the partitions among this number of members. A member that
    /// does not poll may not know its share yet.
    pub fn has_distributed(&self, group: &str, members: usize) -> bool {
        let consumer: BaseConsumer = self.client().create().unwrap();
        let groups = consumer.fetch_group_list(Some(&self.prefixed(group)), TIMEOUT).unwrap();
        groups.groups().iter().any(|group| group.state() == "Stable" && group.members().len() == members)
    }

    /// A line for each partition whose committed offset is not its end. An offset after the end
    /// would skip records that are yet to be written. Transaction markers have offsets too.
    pub fn lag(&self, group: &str) -> Vec<String> {
        let name = self.prefixed(topic_of(group));
        let consumer = self.member(group);
        let Some(committed) = committed(&consumer, &name) else { return vec![format!("{group}: unknown")] };
        let lags = committed.into_iter().filter_map(|(partition, committed)| {
            let (_, end) = consumer.fetch_watermarks(&name, partition, TIMEOUT).unwrap();
            let committed = committed.unwrap_or(0);
            (committed != end).then(|| format!("{group} {partition}: {committed} of {end}"))
        });
        lags.collect()
    }

    /// Waits until a group has committed the end of its topic.
    pub async fn until_caught_up(&self, group: &str) {
        eventually_eq(&format!("the lag of {group}"), vec![], async || self.lag(group)).await;
    }

    /// The offsets that a group has committed, by partition.
    pub fn committed(&self, group: &str) -> BTreeMap<i32, i64> {
        let committed = committed(&self.member(group), &self.prefixed(topic_of(group))).unwrap_or_default();
        committed.into_iter().filter_map(|(partition, offset)| Some((partition, offset?))).collect()
    }

    /// The offset after the last record or transaction marker of each partition that a group reads.
    pub fn ends(&self, group: &str) -> BTreeMap<i32, i64> {
        let name = self.prefixed(topic_of(group));
        let consumer = self.member(group);
        let end = |partition| consumer.fetch_watermarks(&name, partition, TIMEOUT).unwrap().1;
        self.committed(group).into_keys().map(|partition| (partition, end(partition))).collect()
    }

    /// Sets the committed offset of a group without members, as an operator does.
    pub fn commit(&self, group: &str, partition: i32, offset: i64) {
        let mut offsets = TopicPartitionList::new();
        offsets.add_partition_offset(&self.prefixed(topic_of(group)), partition, Offset::Offset(offset)).unwrap();
        self.member(group).commit(&offsets, CommitMode::Sync).unwrap();
    }

    /// Deletes a group and its committed offsets. Its members must have been stopped.
    pub async fn reset_group(&self, group: &str) {
        let name = self.prefixed(group);
        let admin = self.admin();
        eventually(&format!("the group {group} is deleted"), async || {
            admin.delete_groups(&[&name], &AdminOptions::new()).await.unwrap()[0].as_ref().ok().map(|_| ())
        })
        .await;
    }

    fn member(&self, group: &str) -> BaseConsumer {
        self.client().set("group.id", self.prefixed(group)).create().unwrap()
    }
}

/// The committed offset of each partition, if there is one. `None` if Kafka does not answer.
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
