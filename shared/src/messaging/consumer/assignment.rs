//! Which partitions are ours. The callbacks run inside `poll`, on the consumer's own thread.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::atomic::AtomicBool;
use std::sync::atomic::Ordering::Relaxed;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use rdkafka::consumer::{BaseConsumer, CommitMode, Consumer, ConsumerContext};
use rdkafka::error::KafkaError;
use rdkafka::statistics::{Statistics, Topic};
use rdkafka::types::RDKafkaRespErr;
use rdkafka::{ClientContext, TopicPartitionList};

use crate::service::Health;
use crate::service::metrics::{Metrics, Partition};

/// After this time a partition that the client has and does not read counts as given up. A start takes milliseconds.
const IDLE: Duration = Duration::from_secs(2);

pub(super) struct Assignment {
    topic: String,
    group: String,
    /// The name under which the readiness is told.
    part: String,
    health: Health,
    metrics: Metrics,
    /// While it is set the lag is measured by [`Assignment::measured_lag`]: the statistics do not move for what is paused.
    pub paused: AtomicBool,
    changes: Mutex<Changes>,
}

#[derive(Default)]
struct Changes {
    /// Ours, and waiting for a start. The client does not have them.
    unplaced: BTreeSet<i32>,
    /// Ours, and given to the client with their start.
    read: BTreeSet<i32>,
    /// Taken away since the consumer last asked.
    revoked: BTreeSet<i32>,
    /// Those of `read` that the client does not read, by its statistics.
    idle_since: BTreeMap<i32, Instant>,
    /// The client has been given some since the consumer last asked.
    just_read: bool,
}

impl Assignment {
    pub fn new(topic: String, group: String, part: String, health: &Health, metrics: &Metrics) -> Self {
        health.waiting(&part, "Kafka to assign partitions");
        Self {
            topic,
            group,
            part,
            health: health.clone(),
            metrics: metrics.clone(),
            paused: AtomicBool::new(false),
            changes: Mutex::default(),
        }
    }

    pub fn unplaced(&self) -> Vec<i32> {
        self.changes().unplaced.iter().copied().collect()
    }

    /// The client begins to read these, each from the offset beside it.
    pub fn read(&self, consumer: &BaseConsumer<Self>, starts: &TopicPartitionList) -> Result<(), KafkaError> {
        consumer.incremental_assign(starts)?;
        consumer.resume(starts)?; // one that was paused when it was taken from the client is paused still
        let mut changes = self.changes();
        for partition in numbers(starts) {
            changes.unplaced.remove(&partition);
            changes.read.insert(partition);
        }
        changes.just_read = true;
        Ok(())
    }

    /// The client stops reading these, and they wait for a start again.
    pub fn unplace(&self, consumer: &BaseConsumer<Self>, partitions: &[i32]) -> Result<(), KafkaError> {
        consumer.incremental_unassign(&self.take_read(partitions))?;
        self.changes().unplaced.extend(partitions);
        Ok(())
    }

    /// Those that the client has stopped reading without a word. It does so where it finds no record at the wanted offset while
    /// the partition is paused: the error that it has for this is thrown away with what it had fetched.
    pub fn idle(&self) -> Vec<i32> {
        let changes = self.changes();
        changes.idle_since.iter().filter(|(_, since)| since.elapsed() > IDLE).map(|(partition, _)| *partition).collect()
    }

    pub fn take_revoked(&self) -> BTreeSet<i32> {
        let mut changes = self.changes();
        changes.just_read = false;
        std::mem::take(&mut changes.revoked)
    }

    pub fn measured_lag(&self, partition: i32, records: i64) {
        self.metrics.consumer_lag.get_or_create(&self.label(partition)).set(records);
    }

    fn changes(&self) -> MutexGuard<'_, Changes> {
        self.changes.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn take_read(&self, partitions: &[i32]) -> TopicPartitionList {
        let mut changes = self.changes();
        let mut taken = TopicPartitionList::new();
        for partition in partitions {
            changes.idle_since.remove(partition);
            if changes.read.remove(partition) {
                taken.add_partition(&self.topic, *partition);
            }
        }
        taken
    }

    /// The group gets its answer, but the client gets no partition before [`super::Running::place`] knows the start: one path
    /// for a first start, a rebalance, a start during an outage, and a handler whose own position moved. Not a placeholder and
    /// a seek later: the placeholder's offset is asked for in the background, and an answer that comes after the seek sets the
    /// partition back to it (librdkafka 2.12 asks again, and does not ask whether it still should).
    ///
    /// What was given to the client just before may have answered the group in our place, and then the client leaves paused what
    /// it paused for this call (again librdkafka 2.12). So everything starts anew.
    fn assign(&self, consumer: &BaseConsumer<Self>, partitions: &TopicPartitionList) -> Result<(), KafkaError> {
        consumer.incremental_assign(&TopicPartitionList::new())?;
        let mut changes = self.changes();
        changes.unplaced.extend(numbers(partitions));
        if changes.just_read {
            let again: Vec<i32> = changes.read.iter().copied().collect();
            changes.revoked.extend(&again);
            drop(changes);
            self.unplace(consumer, &again)?;
        }
        Ok(())
    }

    /// The handled is committed before the partitions go, unless they are lost already: then they are another's, and what it
    /// committed must stand.
    fn revoke(&self, consumer: &BaseConsumer<Self>, partitions: &TopicPartitionList) -> Result<(), KafkaError> {
        if !consumer.assignment_lost() {
            // Fails with "no offset" where the automatic commit was faster; any other failure means that records come again.
            let _ = consumer.commit_consumer_state(CommitMode::Sync);
        }
        let partitions = numbers(partitions);
        let mut changes = self.changes();
        for partition in &partitions {
            changes.unplaced.remove(partition);
            changes.revoked.insert(*partition);
            self.metrics.consumer_lag.remove(&self.label(*partition));
        }
        drop(changes);
        consumer.incremental_unassign(&self.take_read(&partitions))
    }

    /// See [`Assignment::idle`].
    fn look_for_idle(&self, topic: &Topic) {
        let mut changes = self.changes();
        for partition in topic.partitions.values() {
            let idle = changes.read.contains(&partition.partition) && partition.fetch_state == "none";
            if idle {
                changes.idle_since.entry(partition.partition).or_insert_with(Instant::now);
            } else {
                changes.idle_since.remove(&partition.partition);
            }
        }
    }

    fn label(&self, partition: i32) -> Partition {
        Partition { group: self.group.clone(), topic: self.topic.clone(), partition }
    }
}

fn numbers(partitions: &TopicPartitionList) -> Vec<i32> {
    partitions.elements().iter().map(|element| element.partition()).collect()
}

impl ConsumerContext for Assignment {
    fn rebalance(&self, consumer: &BaseConsumer<Self>, event: RDKafkaRespErr, partitions: &mut TopicPartitionList) {
        let result = match event {
            RDKafkaRespErr::RD_KAFKA_RESP_ERR__ASSIGN_PARTITIONS => self.assign(consumer, partitions),
            _ => self.revoke(consumer, partitions),
        };
        let partitions = numbers(partitions);
        match result {
            Ok(()) => tracing::info!(group = self.group, ?event, ?partitions, "rebalanced"),
            Err(error) => tracing::error!(group = self.group, ?event, ?partitions, %error, "cannot rebalance"),
        }
    }
}

impl ClientContext for Assignment {
    /// Twice a second: the lag of what is assigned, and whether the group works.
    fn stats(&self, statistics: Statistics) {
        let connected = statistics.brokers.values().any(|broker| broker.state == "UP");
        let joined = statistics.cgrp.is_some_and(|group| group.state == "up" && group.join_state == "steady");
        match (connected, joined) {
            (true, true) => self.health.ready(&self.part),
            (true, false) => self.health.waiting(&self.part, "Kafka to assign partitions"),
            (false, _) => self.health.waiting(&self.part, "Kafka to answer"),
        }
        let Some(topic) = statistics.topics.get(&self.topic) else { return };
        self.look_for_idle(topic);
        if self.paused.load(Relaxed) {
            return;
        }
        for partition in topic.partitions.values() {
            // Below 0 the lag is unknown, which is not the same as none.
            if partition.fetch_state == "active" && partition.consumer_lag_stored >= 0 {
                self.measured_lag(partition.partition, partition.consumer_lag_stored);
            }
        }
    }

    fn error(&self, error: KafkaError, reason: &str) {
        tracing::debug!(group = self.group, %error, reason, "Kafka client");
    }
}
