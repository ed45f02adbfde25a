//! Where each partition starts. It is found out here and nowhere else: at the first start, after a rebalance, after an outage,
//! and when a handler says that its own position is another.

use std::time::{Duration, Instant};

use anyhow::Context;
use rdkafka::consumer::Consumer as _;
use rdkafka::{Offset, TopicPartitionList};

use super::{KAFKA_TIMEOUT, Running};
use crate::messaging::Handler;
use tokio::time::timeout;

/// How soon a start that could not be found out is asked for again.
const PLACE_INTERVAL: Duration = Duration::from_millis(500);

impl<H: Handler> Running<H> {
    /// Gives each partition that waits for one its start, and lets the client read it from there. Whatever fails here is asked
    /// again on the next turn, and nothing is read meanwhile: a start is never guessed.
    pub(super) fn place(&mut self) {
        let unplaced = self.client.context().unplaced();
        let part = self.setup.part("position");
        if unplaced.is_empty() {
            return self.setup.health.ready(&part); // those that could not be placed may have been taken away
        }
        if Instant::now() < self.place_at {
            return;
        }
        match self.try_place(&unplaced) {
            Ok(()) => self.setup.health.ready(&part),
            Err(error) => {
                self.place_at = Instant::now() + PLACE_INTERVAL;
                self.setup.health.waiting(&part, "where to start reading");
                tracing::warn!(group = self.setup.group, error = %format!("{error:#}"), "cannot place partitions yet");
            }
        }
    }

    fn try_place(&mut self, unplaced: &[i32]) -> anyhow::Result<()> {
        let topic = self.setup.topic();
        let committed = self
            .client
            .committed_offsets(self.list(unplaced), KAFKA_TIMEOUT)
            .context("cannot ask for committed offsets")?;
        let mut placed = Vec::new();
        let mut starts = TopicPartitionList::new();
        for element in committed.elements() {
            element.error()?;
            let partition = element.partition();
            let limit = self.setup.kafka.handle_timeout();
            let asked = self.setup.handler.resume_at(partition);
            let own = self.runtime.block_on(async { timeout(limit, asked).await })?;
            let (reached, offset) = match (own.context("cannot ask the handler for its position")?, element.offset()) {
                (Some(own), _) if own > 0 => (own, own),
                // Also when it is 0, of a partition that was empty: if its first records are gone by now, that must be heard.
                (None, Offset::Offset(committed)) => (committed, committed),
                // Never been here: what the log still has.
                _ => (0, self.client.fetch_watermarks(&topic, partition, KAFKA_TIMEOUT)?.0),
            };
            starts.add_partition_offset(&topic, partition, Offset::Offset(offset))?;
            placed.push((partition, reached));
        }
        self.client.context().read(&self.client, &starts)?;
        for (partition, start) in placed {
            self.reached.insert(partition, start);
            self.at_end.remove(&partition);
            let ours = |&&(of, _): &&(i32, i64)| of == partition;
            let behind = self.dropped.iter().filter(ours).filter(|(_, offset)| *offset < start).count();
            self.done.found_handled(behind as u64);
            self.dropped.retain(|(of, _)| *of != partition);
        }
        Ok(())
    }

    /// The partitions wait for [`Running::place`].
    pub(super) fn unplace(&mut self, partitions: &[i32]) -> anyhow::Result<()> {
        self.client.context().unplace(&self.client, partitions)?;
        for partition in partitions {
            self.reached.remove(partition);
            self.at_end.remove(partition);
        }
        Ok(())
    }

    pub(super) fn list(&self, partitions: &[i32]) -> TopicPartitionList {
        let topic = self.setup.topic();
        let mut list = TopicPartitionList::new();
        for partition in partitions {
            list.add_partition(&topic, *partition);
        }
        list
    }
}
