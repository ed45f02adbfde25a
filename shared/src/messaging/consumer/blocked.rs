//! A partition whose next record fails each time. Its later records wait until that record succeeds
//! or is dead-lettered.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

use super::batch::PolledMessage;
use super::operator::{Decision, Listed};
use crate::messaging::record::Coordinates;

pub(super) struct Blocked<'c> {
    /// The failing record, and the later records of the partition that were polled with it.
    pub records: VecDeque<PolledMessage<'c>>,
    /// Its entry in the list for operators.
    pub listed: Listed,
    pub reason: String,
    /// When the record is tried again.
    pub due: Instant,
    pub backoff: Duration,
}

impl<'c> Blocked<'c> {
    /// The failing record.
    pub fn record(&self) -> &PolledMessage<'c> {
        self.records.front().expect("a partition is blocked by a record")
    }

    pub fn coordinates(&self) -> Coordinates {
        Coordinates::of(&**self.record())
    }

    pub fn decision(&self) -> Option<Decision> {
        self.listed.decision()
    }
}
