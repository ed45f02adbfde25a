//! Finds partitions that no member of the group has, and joins the group again to get them.
//!
//! One member of a group, its leader, distributes the partitions. It asks any broker for them. A
//! broker that does not know a new topic yet, or only its former number of partitions, makes the
//! leader distribute too few. The client looks at the topic regularly afterwards, but it compares
//! what it sees with what it saw before it joined, not with what the leader distributed. If it had
//! already seen the whole topic, it finds no change and never joins again (librdkafka 2.12).

use std::collections::BTreeSet;
use std::time::{Duration, Instant};

use anyhow::Context;
use rdkafka::consumer::Consumer as _;
use rdkafka::groups::GroupInfo;

use super::partitions::{KAFKA_TIMEOUT, Partitions};
use super::start::ConsumerSetup;
use crate::messaging::handler::Handler;

/// How often a consumer without partitions looks.
const INTERVAL_WITHOUT_PARTITIONS: Duration = Duration::from_secs(10);
/// How often a consumer with partitions looks. Partitions are rarely added to a topic, and each
/// look makes every broker list its groups.
const INTERVAL: Duration = Duration::from_secs(60);

/// The partitions that no member of the group had when the consumer last looked.
pub(super) struct Unassigned {
    seen: BTreeSet<i32>,
    next_look: Instant,
    is_reported: bool,
}

impl Unassigned {
    pub fn new() -> Self {
        Self { seen: BTreeSet::new(), next_look: Instant::now() + INTERVAL_WITHOUT_PARTITIONS, is_reported: false }
    }

    /// Looks, if it is time. A partition that is found twice in a row is missing: a rebalance is
    /// shorter than the time between two looks. The consumer then leaves the group and joins it
    /// again, so the leader distributes all partitions from scratch.
    ///
    /// Several members may find the same partition and all join again. They end in one rebalance or
    /// in a few, and none of them finds the partition afterwards.
    pub fn look<H: Handler>(&mut self, setup: &ConsumerSetup<H>, partitions: &Partitions<'_>) -> anyhow::Result<()> {
        if Instant::now() < self.next_look {
            return Ok(());
        }
        let without = partitions.next_offsets.is_empty();
        self.next_look = Instant::now() + if without { INTERVAL_WITHOUT_PARTITIONS } else { INTERVAL };
        let found = match partitions.unassigned() {
            Ok(found) => found,
            Err(error) => {
                tracing::debug!(group = H::GROUP, error = %format!("{error:#}"), "cannot look for unassigned partitions");
                return Ok(());
            }
        };
        let missing: Vec<i32> = found.intersection(&self.seen).copied().collect();
        self.seen = found;
        let component = setup.component("unassigned");
        if !missing.is_empty() {
            tracing::warn!(
                group = H::GROUP,
                partitions = ?missing,
                "no member of the group has these partitions; joining the group again"
            );
            setup.health.report(&component, "the group to assign partitions that none of its members has");
            self.is_reported = true;
            partitions.join_again()?;
        } else if self.is_reported && self.seen.is_empty() {
            tracing::info!(group = H::GROUP, "every partition has a consumer again");
            setup.health.resolved(&component);
            self.is_reported = false;
        }
        Ok(())
    }
}

impl Partitions<'_> {
    /// The partitions of the topic that no member of the group has. Empty during a rebalance.
    fn unassigned(&self) -> anyhow::Result<BTreeSet<i32>> {
        let group = self.client.fetch_group_list(Some(&self.group_on_broker), KAFKA_TIMEOUT)?;
        let Some(group) = group.groups().first().filter(|group| group.state() == "Stable") else {
            return Ok(BTreeSet::new());
        };
        let metadata = self.client.fetch_metadata(Some(&self.topic), KAFKA_TIMEOUT)?;
        let topic = metadata.topics().first().context("Kafka sent no metadata of the topic")?;
        let mut unassigned: BTreeSet<i32> = topic.partitions().iter().map(|partition| partition.id()).collect();
        for partition in assigned(group, &self.topic)? {
            unassigned.remove(&partition);
        }
        Ok(unassigned)
    }

    /// Leaves the group and joins it again. The client revokes the partitions during the next
    /// polls.
    fn join_again(&self) -> anyhow::Result<()> {
        self.client.unsubscribe();
        self.client.subscribe(&[&self.topic]).context("cannot subscribe to the topic")
    }
}

/// The partitions of a topic that the members of a group have.
fn assigned(group: &GroupInfo, topic: &str) -> anyhow::Result<BTreeSet<i32>> {
    let mut partitions = BTreeSet::new();
    for member in group.members() {
        let Some(assignment) = member.assignment().filter(|assignment| !assignment.is_empty()) else { continue };
        partitions.extend(decode(assignment, topic).context("a member of the group has an unreadable assignment")?);
    }
    Ok(partitions)
}

/// Decodes the partitions of a topic from Kafka's `ConsumerProtocolAssignment`: a version (2
/// bytes), then a list of topics, each with its name and a list of partitions. What follows is not
/// needed. All lists begin with their length in 4 bytes, names in 2. `None`: the bytes end too
/// early.
fn decode(mut bytes: &[u8], topic: &str) -> Option<Vec<i32>> {
    let mut partitions = vec![];
    take::<2>(&mut bytes)?;
    for _ in 0..i32::from_be_bytes(take(&mut bytes)?) {
        let length = u16::from_be_bytes(take(&mut bytes)?);
        let (name, rest) = bytes.split_at_checked(length.into())?;
        bytes = rest;
        for _ in 0..i32::from_be_bytes(take(&mut bytes)?) {
            let partition = i32::from_be_bytes(take(&mut bytes)?);
            if name == topic.as_bytes() {
                partitions.push(partition);
            }
        }
    }
    Some(partitions)
}

fn take<const N: usize>(bytes: &mut &[u8]) -> Option<[u8; N]> {
    let (taken, rest) = bytes.split_first_chunk()?;
    *bytes = rest;
    Some(*taken)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Version 3; `a` with partitions 1 and 2, `topic` with 7 and 300; no user data.
    const ASSIGNMENT: &[u8] = b"\0\x03\0\0\0\x02\
        \0\x01a\0\0\0\x02\0\0\0\x01\0\0\0\x02\
        \0\x05topic\0\0\0\x02\0\0\0\x07\0\0\x01\x2c\
        \xff\xff\xff\xff";

    #[test]
    fn the_partitions_of_one_topic_are_decoded() {
        assert_eq!(decode(ASSIGNMENT, "topic"), Some(vec![7, 300]));
        assert_eq!(decode(ASSIGNMENT, "a"), Some(vec![1, 2]));
        assert_eq!(decode(ASSIGNMENT, "other"), Some(vec![]));
    }

    #[test]
    fn an_assignment_that_ends_early_is_not_decoded() {
        for length in 0..ASSIGNMENT.len() - 4 {
            assert_eq!(decode(&ASSIGNMENT[..length], "topic"), None, "{length} bytes");
        }
    }
}
