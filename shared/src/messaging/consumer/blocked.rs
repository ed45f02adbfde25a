//! A partition that waits for its next record, which fails each time.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

use rdkafka::message::OwnedMessage;

use super::operator::{Decision, Listed};

pub(super) struct Blocked {
    /// The failing record, and the later records of the partition that were polled with it.
    pub records: VecDeque<OwnedMessage>,
    /// Its entry in the list for operators.
    pub listed: Listed,
    pub reason: String,
    /// When the record is tried again.
    pub due: Instant,
    pub backoff: Duration,
}

impl Blocked {
    /// The failing record.
    pub fn record(&self) -> &OwnedMessage {
        self.records.front().expect("a partition is blocked by a record")
    }

    pub fn decision(&self) -> Option<Decision> {
        self.listed.decision()
    }
}
