//! Blocks a partition whose next record fails again and again although the handler's dependency
//! works. The record is tried again until it succeeds or an operator dead-letters it. The other
//! partitions continue. Nothing is stored past the record, so after a crash or a rebalance it comes
//! again.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

use rdkafka::consumer::Consumer as _;

use super::backoff::next_backoff;
use super::batch::PolledMessage;
use super::blocked::Blocked;
use super::operator::BlockedRecords;
use super::partitions::Partitions;
use super::reading::Unhandled;
use super::reports::Wait;
use crate::messaging::record::Coordinates;

/// A failing record may take at most one twentieth of its consumer's time: after an attempt the
/// record waits for this many times the attempt's duration.
const HANGING_SHARE: u32 = 20;

impl<'c> Partitions<'c> {
    /// Pauses a partition at the first of these records, which fails.
    pub fn block(
        &mut self,
        partition: i32,
        records: VecDeque<PolledMessage<'c>>,
        reason: String,
        operators: &BlockedRecords,
    ) -> anyhow::Result<()> {
        let Some(coordinates) = records.front().map(|record| Coordinates::of(&**record)) else { return Ok(()) };
        self.client.pause(&self.list([&partition]))?;
        self.client.context().note_paused(partition, true);
        let first = records.front().map(|record| (partition, Unhandled::of(&**record)));
        self.note_unhandled(&first.into_iter().collect());
        tracing::error!(
            group = self.group,
            %coordinates,
            reason,
            "a record fails although its dependency works; its partition waits until it succeeds or is dead-lettered"
        );
        let backoff = next_backoff(None);
        let listed = operators.list(coordinates, self.group);
        self.blocked.insert(partition, Blocked { records, listed, reason, due: Instant::now() + backoff, backoff });
        self.report_blocked(partition);
        Ok(())
    }

    /// The record failed again, after `took`. A record that makes its handler hang must not take
    /// the consumer's time from the other partitions.
    pub fn postpone(&mut self, partition: i32, reason: Option<String>, took: Duration) {
        let Some(blocked) = self.blocked.get_mut(&partition) else { return };
        blocked.backoff = next_backoff(Some(blocked.backoff));
        blocked.due = Instant::now() + blocked.backoff.max(took * HANGING_SHARE);
        if let Some(reason) = reason.filter(|reason| *reason != blocked.reason) {
            blocked.reason = reason;
            self.report_blocked(partition);
        }
        self.measure_lag([partition]);
    }

    /// Continues the partition after the record. Returns the later records that were polled with
    /// it.
    pub fn unblock(&mut self, partition: i32) -> anyhow::Result<VecDeque<PolledMessage<'c>>> {
        let Some(mut blocked) = self.blocked.remove(&partition) else { return Ok(VecDeque::new()) };
        let context = self.client.context();
        context.note_paused(partition, false);
        context.reports.continues(partition, Wait::FailingRecord);
        self.client.resume(&self.list([&partition]))?;
        tracing::info!(group = self.group, coordinates = %blocked.coordinates(), "the partition continues");
        blocked.records.pop_front();
        Ok(std::mem::take(&mut blocked.records))
    }

    fn report_blocked(&self, partition: i32) {
        let Some(blocked) = self.blocked.get(&partition) else { return };
        let coordinates = blocked.coordinates();
        let reason = format!(
            "the record {coordinates} fails: {}. It is tried again. Fix the cause, or run: dead-letter {coordinates} \
             --reason TEXT",
            blocked.reason
        );
        self.client.context().reports.waits(partition, Wait::FailingRecord, &reason);
    }
}
