//! Every topic, declared once. Names use `.` and `-` and never `_`, because `_` and `.` collide in
//! the names of Kafka's metrics.

use uuid::Uuid;

/// A topic as its owner declares it. The owner creates the topic, and exits with an error if an
/// existing one would lose records.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Topic {
    /// The logical name. On the broker the configured prefix is in front of it.
    pub name: &'static str,
    /// What the key identifies; the outbox column `aggregatetype`.
    pub aggregate: &'static str,
    /// The number of partitions. Records of one key are ordered because they are always in one
    /// partition. The number never changes for [`Kind::State`]: after a change, a tombstone would
    /// go to another partition than the value that it should erase. A topic of facts may have more,
    /// because their effects commute.
    pub partitions: i32,
    /// Determines the retention and the meaning of a null value.
    pub kind: Kind,
}

/// What a topic is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// What happened. Facts carry no personal data and are kept permanently. Their effects commute.
    Facts,
    /// The complete current state per key. The topic is compacted; a null value is a tombstone; the
    /// highest version wins.
    State,
}

impl Topic {
    /// What happened to users.
    pub const USER_EVENTS: Self = Self::facts("user.events.v1", "user");
    /// The current state of each user. This is the only topic that carries personal data.
    pub const USER_STATE: Self = Self { name: "user.state.v1", aggregate: "user", partitions: 6, kind: Kind::State };
    /// What happened to mails.
    pub const EMAIL_EVENTS: Self = Self::facts("email.events.v1", "delivery");

    /// What operators did: see [`OperatorAction`](super::OperatorAction). Every service that
    /// consumes writes it, and each creates it. It has one partition, so that the list of actions
    /// is in order.
    pub const OPERATOR_ACTIONS: Self =
        Self { name: "operator.actions.v1", aggregate: "action", partitions: 1, kind: Kind::Facts };

    /// Every topic.
    pub const ALL: [Self; 4] = [Self::USER_EVENTS, Self::USER_STATE, Self::EMAIL_EVENTS, Self::OPERATOR_ACTIONS];

    /// The declared topic of this logical name.
    pub fn named(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|topic| topic.name == name)
    }

    const fn facts(name: &'static str, aggregate: &'static str) -> Self {
        Self { name, aggregate, partitions: 6, kind: Kind::Facts }
    }

    /// The topic's settings on the broker, with times in milliseconds. Records carry the broker's
    /// time and not the producer's: Kafka closes segments by that time, and rejects records of a
    /// producer whose clock is ahead. The envelope carries the time of the event.
    pub const fn settings(&self) -> &'static [(&'static str, &'static str)] {
        match self.kind {
            Kind::Facts => &[
                BROKER_TIME,
                COMPLETE_LEADERS,
                ("cleanup.policy", "delete"),
                ("retention.ms", "-1"),
                ("retention.bytes", "-1"),
            ],
            Kind::State => &[
                BROKER_TIME,
                COMPLETE_LEADERS,
                ("cleanup.policy", "compact"),
                // 7 days: the longest time until an erased value is compacted away.
                ("max.compaction.lag.ms", "604800000"),
                // 30 days: a consumer that lags by less still reads the tombstone.
                ("delete.retention.ms", "2592000000"),
                // 1 day: Kafka compacts only closed segments.
                ("segment.ms", "86400000"),
            ],
        }
    }

    /// The partition that holds a key's records. The result is the same as librdkafka's
    /// `murmur2_random` and every Java client compute from the key's text.
    pub fn partition_of(&self, key: Uuid) -> i32 {
        key_hash(key) % self.partitions
    }
}

/// The hash by which Kafka chooses a key's partition: the partition is its remainder by the number
/// of partitions. It is not negative.
pub fn key_hash(key: Uuid) -> i32 {
    let mut text = Uuid::encode_buffer();
    (murmur2(key.hyphenated().encode_lower(&mut text).as_bytes()) & 0x7fff_ffff).cast_signed()
}

const BROKER_TIME: (&str, &str) = ("message.timestamp.type", "LogAppendTime");
/// A broker that lacks acknowledged records never becomes the leader of a partition.
const COMPLETE_LEADERS: (&str, &str) = ("unclean.leader.election.enable", "false");

/// MurmurHash2 in 32 bits with Kafka's seed. The text of a UUID has 36 bytes, so the algorithm's
/// step for a last word of fewer than four bytes is left out.
fn murmur2(text: &[u8]) -> u32 {
    const MULTIPLIER: u32 = 0x5bd1_e995;
    const SEED: u32 = 0x9747_b28c;
    let (words, rest) = text.as_chunks::<4>();
    debug_assert!(rest.is_empty());
    let mut hash = words.iter().fold(SEED ^ (4 * words.len() as u32), |hash, word| {
        let word = u32::from_le_bytes(*word).wrapping_mul(MULTIPLIER);
        hash.wrapping_mul(MULTIPLIER) ^ (word ^ (word >> 24)).wrapping_mul(MULTIPLIER)
    });
    hash = (hash ^ (hash >> 13)).wrapping_mul(MULTIPLIER);
    hash ^ (hash >> 15)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Keys and hashes from the tests of Kafka's Java client, of those keys whose length is a
    /// multiple of four.
    #[test]
    fn a_key_has_the_same_hash_as_in_kafkas_java_client() {
        let known: [(&str, i32); 2] = [
            ("a-little-bit-long-string", -985_981_536),
            ("lkjh234lh9fiuh90y23oiuhsafujhadof229phr9h19h89h8", -58_897_971),
        ];
        for (text, hash) in known {
            assert_eq!(murmur2(text.as_bytes()).cast_signed(), hash, "{text}");
        }
    }
}
