//! What the relay leaves out for now, because Kafka rejects it or cannot take it: topics,
//! partitions, and keys. Each block has its own time for the next probe, so none of them is
//! forgotten together with the others.

use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, Instant};

use rdkafka::error::RDKafkaErrorCode;
use uuid::Uuid;

/// The time until a topic or partition that metadata shows as unavailable is looked up again. A
/// lookup costs little.
const METADATA_PROBE_INTERVAL: Duration = Duration::from_secs(2);
/// The time until a rejected record is tried again. It doubles with each rejection, up to the
/// maximum.
const REJECTION_PROBE_INTERVAL: Duration = Duration::from_secs(5);
const MAX_PROBE_INTERVAL: Duration = Duration::from_secs(60);
/// If more than this many keys of a topic are blocked, the relay blocks the whole topic: the topic is
/// the cause, and not the records.
const MAX_KEYS_PER_TOPIC: usize = 1_000;
/// The relay also blocks a whole topic if records of this many keys are rejected, and none of its
/// records is accepted in between.
const MAX_KEYS_IN_A_ROW: usize = 5;
/// A rejected probe costs a new producer, half a second or more. The pause after it is this many
/// times as long as the probe, so that probes take at most a twentieth of the relay's time.
const PROBE_PAUSE: u32 = 20;

/// What an error of Kafka is about.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Scope {
    /// All records of the topic.
    Topic,
    /// All records of the partition.
    Partition,
    /// This record.
    Record,
    /// The connection, the cluster or this producer: the whole term.
    Term,
}

/// A code that is not listed is about the record: the round is split until the record is found.
pub fn scope(code: RDKafkaErrorCode) -> Scope {
    use RDKafkaErrorCode as Code;
    match code {
        Code::UnknownTopic
        | Code::UnknownTopicOrPartition
        | Code::TopicAuthorizationFailed
        | Code::InvalidTopic
        | Code::UnknownTopicId => Scope::Topic,
        Code::LeaderNotAvailable
        | Code::NotLeaderForPartition
        | Code::NotEnoughReplicas
        | Code::NotEnoughReplicasAfterAppend
        | Code::ISRInsufficient
        | Code::UnknownPartition
        | Code::ReplicaNotAvailable
        | Code::KafkaStorageError
        // The leader did not acknowledge the record in time. Metadata decides whether that is the
        // partition or the cluster.
        | Code::MessageTimedOut => Scope::Partition,
        Code::BrokerTransportFailure
        | Code::AllBrokersDown
        | Code::Resolve
        | Code::SSL
        | Code::Authentication
        | Code::SaslAuthenticationFailed
        | Code::OperationTimedOut
        | Code::TimedOutQueue
        | Code::RequestTimedOut
        | Code::NetworkException
        | Code::BrokerNotAvailable
        | Code::CoordinatorLoadInProgress
        | Code::CoordinatorNotAvailable
        | Code::NotCoordinator
        | Code::ConcurrentTransactions
        | Code::TransactionalIdAuthorizationFailed
        | Code::ClusterAuthorizationFailed
        | Code::InvalidTransactionTimeout
        | Code::ProducerFenced
        | Code::InvalidProducerEpoch
        | Code::InvalidProducerIdMapping
        | Code::TransactionCoordinatorFenced
        | Code::Fenced
        | Code::Fatal
        | Code::OutOfOrderSequenceNumber
        | Code::UnknownProducerId
        | Code::ThrottlingQuotaExceeded
        | Code::Retry => Scope::Term,
        _ => Scope::Record,
    }
}

/// How a block was found out, which decides how it is probed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Evidence {
    /// Metadata shows that the topic or partition is unavailable.
    Metadata,
    /// Kafka rejected a record.
    Rejection,
}

#[derive(Debug)]
struct Block {
    reason: String,
    evidence: Evidence,
    interval: Duration,
    probe_at: Instant,
}

impl Block {
    /// `previous` is the block that a failed probe renews.
    fn new(reason: String, evidence: Evidence, previous: Option<&Self>) -> Self {
        let interval = match (evidence, previous) {
            (Evidence::Metadata, _) => METADATA_PROBE_INTERVAL,
            (Evidence::Rejection, None) => REJECTION_PROBE_INTERVAL,
            (Evidence::Rejection, Some(previous)) => (previous.interval * 2).min(MAX_PROBE_INTERVAL),
        };
        Self { reason, evidence, interval, probe_at: Instant::now() + interval }
    }

    fn is_due(&self) -> bool {
        self.probe_at <= Instant::now()
    }
}

/// A blocked partition of a topic.
#[derive(Debug)]
struct PartitionBlock {
    /// The topic's number of partitions.
    count: i32,
    block: Block,
}

/// A blocked key: the rejected row and the later rows of its key.
#[derive(Debug)]
struct KeyBlock {
    topic: String,
    /// The rejected row.
    row: i64,
    block: Block,
}

/// Everything that is blocked in this term. Topics have their logical names.
#[derive(Default)]
pub struct Blocks {
    topics: BTreeMap<String, Block>,
    partitions: BTreeMap<(String, i32), PartitionBlock>,
    keys: BTreeMap<Uuid, KeyBlock>,
    /// The keys of a topic whose records were rejected since a record of it was accepted.
    rejected_in_a_row: BTreeMap<String, BTreeSet<Uuid>>,
    /// No block by rejection is due before this time.
    probes_pause_until: Option<Instant>,
}

/// How much is blocked.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Blocked {
    pub topics: usize,
    pub partitions: usize,
    pub keys: usize,
}

/// The rows that a round leaves out.
#[derive(Default)]
pub struct Excluded {
    /// Logical names.
    pub topics: Vec<String>,
    /// Logical name, number of partitions of the topic, partition.
    pub partitions: Vec<(String, i32, i32)>,
    pub keys: Vec<Uuid>,
}

impl Excluded {
    pub fn is_empty(&self) -> bool {
        self.topics.is_empty() && self.partitions.is_empty() && self.keys.is_empty()
    }
}

/// What is due for a probe by a round of one row.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Probe {
    /// The oldest row of the topic whose key and partition are not blocked.
    Topic(String),
    /// The rejected row of the key.
    Key(Uuid, i64),
}

impl Blocks {
    /// Blocks a topic, or renews its block.
    pub fn block_topic(&mut self, topic: &str, reason: String, evidence: Evidence) {
        let block = Block::new(reason, evidence, self.topics.get(topic));
        self.topics.insert(topic.to_owned(), block);
        self.rejected_in_a_row.remove(topic);
    }

    /// Blocks a partition of a topic with `count` partitions, or renews its block.
    pub fn block_partition(&mut self, topic: &str, count: i32, partition: i32, reason: String) {
        let block = Block::new(reason, Evidence::Metadata, None);
        self.partitions.insert((topic.to_owned(), partition), PartitionBlock { count, block });
    }

    /// Blocks the key of a rejected row, or renews its block. The oldest rejected row of a key is
    /// the one to probe: a later one would overtake it.
    pub fn block_key(&mut self, key: Uuid, topic: &str, row: i64, reason: String) {
        let previous = self.keys.get(&key);
        let row = previous.map_or(row, |previous| previous.row.min(row));
        let block = Block::new(reason.clone(), Evidence::Rejection, previous.map(|previous| &previous.block));
        self.keys.insert(key, KeyBlock { topic: topic.to_owned(), row, block });
        let in_a_row = self.rejected_in_a_row.entry(topic.to_owned()).or_default();
        in_a_row.insert(key);
        let in_a_row = in_a_row.len() >= MAX_KEYS_IN_A_ROW;
        let too_many = self.keys.values().filter(|key| key.topic == topic).count() > MAX_KEYS_PER_TOPIC;
        if too_many {
            // The topic's probes find those again that are still rejected.
            self.keys.retain(|_, key| key.topic != topic);
        }
        if in_a_row || too_many {
            self.block_topic(
                topic,
                format!("too many of its records are rejected, the last one with: {reason}"),
                Evidence::Rejection,
            );
        }
    }

    /// Kafka has accepted records of these topics.
    pub fn accepted<'a>(&mut self, topics: impl Iterator<Item = &'a str>) {
        if !self.rejected_in_a_row.is_empty() {
            topics.for_each(|topic| drop(self.rejected_in_a_row.remove(topic)));
        }
    }

    /// Pauses the probes after one that was rejected and took this time.
    pub fn pause_probes(&mut self, took: Duration) {
        self.probes_pause_until = Some(Instant::now() + took * PROBE_PAUSE);
    }

    /// The topics that have a due block by metadata, of themselves or of a partition.
    pub fn due_by_metadata(&self) -> BTreeSet<String> {
        let due = |block: &Block| block.evidence == Evidence::Metadata && block.is_due();
        let topics = self.topics.iter().filter(|(_, block)| due(block)).map(|(topic, _)| topic.clone());
        let partitions = self.partitions.iter().filter(|(_, partition)| due(&partition.block));
        topics.chain(partitions.map(|((topic, _), _)| topic.clone())).collect()
    }

    /// The block by rejection that has been due for longest. The keys of a blocked topic wait for
    /// the topic.
    pub fn due_by_rejection(&self) -> Option<Probe> {
        if self.probes_pause_until.is_some_and(|until| Instant::now() < until) {
            return None;
        }
        let due = |block: &Block| block.evidence == Evidence::Rejection && block.is_due();
        let topics = self.topics.iter().filter(|(_, block)| due(block));
        let topics = topics.map(|(topic, block)| (block.probe_at, Probe::Topic(topic.clone())));
        let keys = self.keys.iter().filter(|(_, key)| due(&key.block) && !self.topics.contains_key(&key.topic));
        let keys = keys.map(|(key, blocked)| (blocked.block.probe_at, Probe::Key(*key, blocked.row)));
        topics.chain(keys).min_by_key(|(probe_at, _)| *probe_at).map(|(_, probe)| probe)
    }

    /// Removes the blocks of the topic that were found by metadata.
    pub fn forget_metadata(&mut self, topic: &str) {
        self.topics.retain(|of, block| of != topic || block.evidence != Evidence::Metadata);
        self.partitions.retain(|(of, _), _| of != topic);
    }

    /// Whether any block is due.
    pub fn is_due(&self) -> bool {
        !self.due_by_metadata().is_empty() || self.due_by_rejection().is_some()
    }

    /// Postpones the next probe by the block's interval.
    pub fn postpone(&mut self, probe: &Probe) {
        let block = match probe {
            Probe::Topic(topic) => self.topics.get_mut(topic),
            Probe::Key(key, _) => self.keys.get_mut(key).map(|key| &mut key.block),
        };
        if let Some(block) = block {
            block.probe_at = Instant::now() + block.interval;
        }
    }

    /// Whether metadata shows that a record of this topic with this hash of its key cannot be
    /// written.
    pub fn is_unavailable(&self, topic: &str, key_hash: i32) -> bool {
        let by_topic = self.topics.get(topic).is_some_and(|block| block.evidence == Evidence::Metadata);
        let mut partitions = self.partitions.iter();
        by_topic || partitions.any(|((of, number), partition)| of == topic && key_hash % partition.count == *number)
    }

    pub fn unblock(&mut self, probe: &Probe) {
        match probe {
            Probe::Topic(topic) => {
                self.topics.remove(topic);
            }
            Probe::Key(key, _) => {
                self.keys.remove(key);
            }
        }
    }

    pub fn excluded(&self) -> Excluded {
        let partitions = self.partitions.iter();
        Excluded {
            topics: self.topics.keys().cloned().collect(),
            partitions: partitions.map(|((topic, number), of)| (topic.clone(), of.count, *number)).collect(),
            keys: self.keys.keys().copied().collect(),
        }
    }

    pub fn count(&self) -> Blocked {
        Blocked { topics: self.topics.len(), partitions: self.partitions.len(), keys: self.keys.len() }
    }

    /// Up to three blocks with their reasons.
    pub fn examples(&self) -> Vec<String> {
        let topics = self.topics.iter().map(|(topic, block)| format!("topic {topic}: {}", block.reason));
        let partitions = self.partitions.iter();
        let partitions =
            partitions.map(|((topic, number), of)| format!("partition {topic}-{number}: {}", of.block.reason));
        let keys = self.keys.iter().map(|(key, of)| format!("key {key} on {}: {}", of.topic, of.block.reason));
        topics.chain(partitions).chain(keys).take(3).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn make_due(blocks: &mut Blocks) {
        let now = Instant::now();
        let topics = blocks.topics.values_mut();
        let keys = blocks.keys.values_mut().map(|key| &mut key.block);
        topics.chain(keys).for_each(|block| block.probe_at = now);
    }

    fn reject_topic(blocks: &mut Blocks, topic: &str) {
        blocks.block_topic(topic, "denied".to_owned(), Evidence::Rejection);
    }

    #[test]
    fn each_block_has_its_own_time_for_the_next_probe() {
        let mut blocks = Blocks::default();
        reject_topic(&mut blocks, "a");
        make_due(&mut blocks);
        reject_topic(&mut blocks, "b");
        assert_eq!(blocks.due_by_rejection(), Some(Probe::Topic("a".to_owned())));
        reject_topic(&mut blocks, "a");
        assert_eq!(blocks.due_by_rejection(), None, "a failed probe renews the block");
        blocks.unblock(&Probe::Topic("a".to_owned()));
        assert_eq!(blocks.excluded().topics, ["b"]);
    }

    #[test]
    fn the_interval_of_a_rejected_record_doubles_up_to_a_minute() {
        let mut blocks = Blocks::default();
        let seconds = (0..6).map(|_| {
            blocks.block_key(Uuid::nil(), "a", 7, "too large".to_owned());
            blocks.keys[&Uuid::nil()].block.interval.as_secs()
        });
        assert_eq!(seconds.collect::<Vec<_>>(), [5, 10, 20, 40, 60, 60]);
    }

    #[test]
    fn a_topic_with_too_many_blocked_keys_is_blocked_as_a_whole() {
        let topic = "a";
        let mut blocks = Blocks::default();
        for key in 0..=MAX_KEYS_PER_TOPIC as u128 {
            assert_eq!(blocks.count().topics, 0, "after {key} keys");
            blocks.block_key(Uuid::from_u128(key), topic, 7, "too large".to_owned());
            blocks.accepted([topic].into_iter());
        }
        assert_eq!(blocks.count(), Blocked { topics: 1, partitions: 0, keys: 0 });
    }

    #[test]
    fn a_topic_of_which_nothing_is_accepted_is_blocked_as_a_whole() {
        let mut blocks = Blocks::default();
        for key in 0..MAX_KEYS_IN_A_ROW as u128 {
            assert_eq!(blocks.count().topics, 0, "after {key} keys");
            blocks.block_key(Uuid::from_u128(key), "a", 7, "too large".to_owned());
        }
        assert_eq!(blocks.count(), Blocked { topics: 1, partitions: 0, keys: MAX_KEYS_IN_A_ROW });
        make_due(&mut blocks);
        assert_eq!(blocks.due_by_rejection(), Some(Probe::Topic("a".to_owned())), "the keys wait for their topic");
    }

    #[test]
    fn probes_pause_after_a_rejected_one() {
        let mut blocks = Blocks::default();
        reject_topic(&mut blocks, "a");
        make_due(&mut blocks);
        blocks.pause_probes(Duration::from_secs(1));
        assert_eq!(blocks.due_by_rejection(), None);
        blocks.pause_probes(Duration::ZERO);
        assert!(blocks.due_by_rejection().is_some());
    }

    #[test]
    fn an_unlisted_code_is_about_the_record() {
        assert_eq!(scope(RDKafkaErrorCode::InvalidRecord), Scope::Record);
        assert_eq!(scope(RDKafkaErrorCode::PolicyViolation), Scope::Record);
        assert_eq!(scope(RDKafkaErrorCode::AllBrokersDown), Scope::Term);
        assert_eq!(scope(RDKafkaErrorCode::TopicAuthorizationFailed), Scope::Topic);
        assert_eq!(scope(RDKafkaErrorCode::NotEnoughReplicas), Scope::Partition);
    }
}
