//! Every topic, declared once. Names use `.` and `-`, never `_`: Kafka's metrics cannot tell `_` from `.`.

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

    /// The topic's settings on the broker. Times in milliseconds.
    pub const fn settings(&self) -> &'static [(&'static str, &'static str)] {
        match self.kind {
            Kind::Facts => &[("cleanup.policy", "delete"), ("retention.ms", "-1")],
            Kind::State => &[
                ("cleanup.policy", "compact"),
                ("max.compaction.lag.ms", "604800000"), // 7 days: by then an erased value is gone, once a later record has come
                ("delete.retention.ms", "2592000000"),  // 30 days: a consumer behind by less still sees the tombstone
                ("segment.ms", "86400000"),             // 1 day: only closed segments are compacted
            ],
        }
    }
}
