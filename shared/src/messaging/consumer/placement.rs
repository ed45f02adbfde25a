//! Placement: finding out where to start reading each partition. It happens here and nowhere else:
//! at the first start, after a rebalance, after an outage, and when a handler reports another
//! position.

use std::time::{Duration, Instant};

use anyhow::Context;
use rdkafka::consumer::Consumer as _;
use rdkafka::{Offset, TopicPartitionList};
use tokio::runtime::Handle as Runtime;
use tokio::time::timeout;

use super::partitions::{KAFKA_TIMEOUT, Partitions};
use super::start::ConsumerSetup;
use crate::messaging::handler::Handler;

/// How soon a failed lookup is repeated.
const RETRY_INTERVAL: Duration = Duration::from_millis(500);

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
        match self.try_place(setup, runtime, &unplaced) {
            Ok(()) => setup.health.resolved(&component),
            Err(error) => {
                self.retry_placement_at = Instant::now() + RETRY_INTERVAL;
                setup.health.report(&component, "the offsets at which to start reading");
                tracing::warn!(
                    group = self.group,
                    error = %format!("{error:#}"),
                    "cannot find out where to start reading; will retry"
                );
            }
        }
    }

    fn try_place<H: Handler>(
        &mut self,
        setup: &ConsumerSetup<H>,
        runtime: &Runtime,
        unplaced: &[i32],
    ) -> anyhow::Result<()> {
        let committed = self
            .client
            .committed_offsets(self.list(unplaced), KAFKA_TIMEOUT)
            .context("cannot get the committed offsets from Kafka")?;
        let mut placed = Vec::new();
        let mut starts = TopicPartitionList::new();
        for element in committed.elements() {
            element.error()?;
            let partition = element.partition();
            let lookup = setup.handler.resume_at(partition);
            let limit = setup.kafka.handle_timeout();
            let stored = runtime.block_on(async { timeout(limit, lookup).await })?;
            let stored = stored.context("cannot get the position that the handler has stored")?;
            let (next_offset, start) = match (stored, element.offset()) {
                (Some(stored), _) if stored > 0 => (stored, stored),
                // Including offset 0 of a partition that was empty: if its first records have been
                // deleted since, Kafka must report it.
                (None, Offset::Offset(committed)) => (committed, committed),
                // This group has never read the partition. It starts with the first record that
                // Kafka still has.
                _ => (0, self.client.fetch_watermarks(&self.topic, partition, KAFKA_TIMEOUT)?.0),
            };
            starts.add_partition_offset(&self.topic, partition, Offset::Offset(start))?;
            placed.push((partition, next_offset));
        }
        self.client.context().start_reading(self.client, &starts)?;
        for (partition, next_offset) in placed {
            self.next_offsets.insert(partition, next_offset);
            self.at_end.remove(&partition);
            setup.group_metrics.duplicate.inc_by(self.forget_dropped(partition, next_offset));
        }
        Ok(())
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
