//! Placement: finding out where to start reading each partition. It happens here and nowhere else:
//! at the first start, after a rebalance, after an outage, and when a handler reports another
//! position.

use std::time::{Duration, Instant};

use anyhow::Context;
use rdkafka::consumer::Consumer as _;
use rdkafka::topic_partition_list::TopicPartitionListElem;
use rdkafka::{Offset, TopicPartitionList};
use tokio::runtime::Handle as Runtime;
use tokio::time::timeout;

use super::partitions::{KAFKA_TIMEOUT, Partitions};
use super::start::ConsumerSetup;
use crate::messaging::handler::Handler;

/// How soon a failed lookup is repeated, at the earliest.
const RETRY_INTERVAL: Duration = Duration::from_millis(500);
/// While the consumer reads other partitions, failing lookups may take at most one fifth of its
/// time: it waits for this many times the duration of the attempt.
const RETRY_SHARE: u32 = 4;
/// After a failed lookup no other one begins if the attempt has taken this long: the consumer handles
/// no records during an attempt.
const ATTEMPT_LIMIT: Duration = KAFKA_TIMEOUT;

impl Partitions<'_> {
    /// Looks up the start of each unplaced partition, and lets the client read it from there. A
    /// failed lookup is repeated on a later turn, and the partition is not read until then: a start
    /// is never guessed.
    pub fn place<H: Handler>(&mut self, setup: &ConsumerSetup<H>, runtime: &Runtime) {
        let unplaced = self.client.context().unplaced();
        let component = setup.component("position");
        if unplaced.is_empty() {
            // The partitions whose placement failed may have been revoked since.
            setup.health.resolved(&component);
            return;
        }
        if Instant::now() < self.retry_placement_at {
            return;
        }
        let started = Instant::now();
        let before = self.next_offsets.len();
        match self.try_place(setup, runtime, unplaced) {
            Ok(()) => setup.health.resolved(&component),
            Err(error) => {
                // As long as an attempt finds the start of a partition, the next one follows at once.
                let only_failed = self.next_offsets.len() == before && before > 0;
                let share = if only_failed { RETRY_SHARE } else { 0 };
                self.retry_placement_at = Instant::now() + RETRY_INTERVAL.max(started.elapsed() * share);
                setup.health.report(&component, "the offsets at which to start reading");
                tracing::warn!(
                    group = self.group,
                    error = %format!("{error:#}"),
                    "cannot find out where to start reading; will retry"
                );
            }
        }
    }

    /// Lets the client read every partition whose start is found, also if that of another is not. The
    /// partitions that failed in the last attempt come last: each may take [`KAFKA_TIMEOUT`].
    ///
    /// # Errors
    /// The first failed lookup.
    fn try_place<H: Handler>(
        &mut self,
        setup: &ConsumerSetup<H>,
        runtime: &Runtime,
        mut unplaced: Vec<i32>,
    ) -> anyhow::Result<()> {
        let started = Instant::now();
        unplaced.sort_by_key(|partition| self.unplaceable.contains(partition));
        let committed = self
            .client
            .committed_offsets(self.list(&unplaced), KAFKA_TIMEOUT)
            .context("cannot get the committed offsets from Kafka")?;
        let mut placed = Vec::new();
        let mut starts = TopicPartitionList::new();
        let mut failed = None;
        for element in committed.elements() {
            match self.start_of(setup, runtime, &element) {
                Ok((next_offset, start)) => {
                    self.unplaceable.remove(&element.partition());
                    starts.add_partition_offset(&self.topic, element.partition(), Offset::Offset(start))?;
                    placed.push((element.partition(), next_offset));
                }
                Err(error) => {
                    self.unplaceable.insert(element.partition());
                    failed = failed.or(Some(error));
                }
            }
            if failed.is_some() && started.elapsed() > ATTEMPT_LIMIT {
                break;
            }
        }
        if !placed.is_empty() {
            self.client.context().start_reading(self.client, &starts)?;
        }
        for (partition, next_offset) in placed {
            self.next_offsets.insert(partition, next_offset);
            self.at_end.remove(&partition);
            setup.group_metrics.duplicate.inc_by(self.forget_dropped(partition, next_offset));
        }
        failed.map_or(Ok(()), Err)
    }

    /// The next offset to handle of a partition, and the offset at which the client starts to read.
    fn start_of<H: Handler>(
        &self,
        setup: &ConsumerSetup<H>,
        runtime: &Runtime,
        committed: &TopicPartitionListElem<'_>,
    ) -> anyhow::Result<(i64, i64)> {
        committed.error()?;
        let partition = committed.partition();
        let lookup = setup.handler.resume_at(partition);
        let limit = setup.kafka.handle_timeout();
        let stored = runtime.block_on(async { timeout(limit, lookup).await })?;
        let stored = stored.context("cannot get the position that the handler has stored")?;
        Ok(match (stored, committed.offset()) {
            (Some(stored), _) if stored > 0 => (stored, stored),
            // Including offset 0 of a partition that was empty: if its first records have been
            // deleted since, Kafka must report it.
            (None, Offset::Offset(committed)) => (committed, committed),
            // This group has never read the partition. It starts with the first record that Kafka
            // still has.
            _ => (0, self.client.fetch_watermarks(&self.topic, partition, KAFKA_TIMEOUT)?.0),
        })
    }

    /// Forgets the dropped records of a partition. Returns how many of them are before
    /// `next_offset`: these will not be read again, because they took effect earlier.
    fn forget_dropped(&mut self, partition: i32, next_offset: i64) -> u64 {
        let before = self.dropped.range((partition, i64::MIN)..(partition, next_offset)).count();
        self.dropped.retain(|(dropped, _)| *dropped != partition);
        before as u64
    }

    /// Stops reading the partitions until [`Partitions::place`] has looked up their start again.
    pub fn restart(&mut self, partitions: &[i32]) -> anyhow::Result<()> {
        self.client.context().stop_reading(self.client, partitions)?;
        for partition in partitions {
            self.next_offsets.remove(partition);
            self.at_end.remove(partition);
            self.blocked.remove(partition);
        }
        Ok(())
    }
}
