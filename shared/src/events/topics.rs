//! Every topic, declared once. Names use `.` and `-`, never `_`: Kafka's metrics cannot tell `_` from `.`.

use uuid::Uuid;

/// A topic as its owner declares it; the owner creates it and refuses to run on one that differs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Topic {
    /// The logical name. The configured prefix stands before it on the broker.
    pub name: &'static str,
    /// What the key identifies; the outbox column `aggregatetype`.
    pub aggregate: &'static str,
    /// Order holds per key because a key always has the same partition. For [`Kind::State`] the number is fixed for life:
    /// after a change a tombstone lands on another partition than what it should erase.
    pub partitions: i32,
    /// Decides retention, and what a null value means.
    pub kind: Kind,
}

/// What a topic is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// What happened. Never any personal data; kept for ever; effects commute.
    Facts,
    /// What is. The whole current state per key, compacted; a null value is a tombstone; the highest version wins.
    State,
}

impl Topic {
    /// What happened to users.
    pub const USER_EVENTS: Self = Self::facts("user.events.v1", "user");
    /// Who each user is now: the only topic that carries personal data.
    pub const USER_STATE: Self = Self { name: "user.state.v1", aggregate: "user", partitions: 6, kind: Kind::State };
    /// What became of mails.
    pub const EMAIL_EVENTS: Self = Self::facts("email.events.v1", "delivery");

    const fn facts(name: &'static str, aggregate: &'static str) -> Self {
        Self { name, aggregate, partitions: 6, kind: Kind::Facts }
    }

    /// The topic's settings on the broker. Times in milliseconds. Records bear the time of the broker, not of their producer:
    /// segments close by it, and a producer whose clock is fast would be refused. When an event happened is in its envelope.
    pub const fn settings(&self) -> &'static [(&'static str, &'static str)] {
        match self.kind {
            Kind::Facts => &[BROKER_TIME, ("cleanup.policy", "delete"), ("retention.ms", "-1")],
            Kind::State => &[
                BROKER_TIME,
                ("cleanup.policy", "compact"),
                ("max.compaction.lag.ms", "604800000"), // 7 days: by then an erased value is gone
                ("delete.retention.ms", "2592000000"),  // 30 days: a consumer behind by less still sees the tombstone
                ("segment.ms", "86400000"), // 1 day: only closed segments are compacted, and only a record closes one
            ],
        }
    }

    /// Where a key's records are: what `murmur2_random`, and every Java client, makes of the key's text.
    pub fn partition_of(&self, key: Uuid) -> i32 {
        let partitions = u32::try_from(self.partitions).expect("a topic has a positive number of partitions");
        let positive = murmur2(key.to_string().as_bytes()) & 0x7fff_ffff;
        i32::try_from(positive % partitions).expect("less than the number of partitions")
    }
}

const BROKER_TIME: (&str, &str) = ("message.timestamp.type", "LogAppendTime");

/// MurmurHash2 in 32 bits with Kafka's seed. A UUID's text is 36 bytes, so what the algorithm does with less than four bytes at
/// the end is left out.
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

    /// From the tests of Kafka's Java client, those whose length is a multiple of four.
    #[test]
    fn keys_are_hashed_as_kafka_does() {
        let known: [(&str, i32); 2] = [
            ("a-little-bit-long-string", -985_981_536),
            ("lkjh234lh9fiuh90y23oiuhsafujhadof229phr9h19h89h8", -58_897_971),
        ];
        for (text, hash) in known {
            assert_eq!(murmur2(text.as_bytes()).cast_signed(), hash, "{text}");
        }
    }
}
