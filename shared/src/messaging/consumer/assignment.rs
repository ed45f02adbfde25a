//! Which partitions are ours. The callbacks run inside `poll`, on the consumer's own thread.

use std::collections::BTreeSet;
use std::sync::atomic::AtomicBool;
use std::sync::atomic::Ordering::Relaxed;
use std::sync::{Mutex, MutexGuard, PoisonError};

use rdkafka::consumer::{BaseConsumer, CommitMode, Consumer, ConsumerContext};
use rdkafka::error::KafkaError;
use rdkafka::statistics::Statistics;
use rdkafka::types::RDKafkaRespErr;
use rdkafka::{ClientContext, Offset, TopicPartitionList};

use crate::service::Health;
use crate::service::metrics::{Metrics, Partition};

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
    /// Assigned and paused, without a start.
    unplaced: BTreeSet<i32>,
    /// Taken away since the consumer last asked.
    revoked: BTreeSet<i32>,
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

    pub fn placed(&self, partitions: &[i32]) {
        self.changes().unplaced.retain(|partition| !partitions.contains(partition));
    }

    pub fn unplace(&self, partitions: &[i32]) {
        self.changes().unplaced.extend(partitions);
    }

    pub fn take_revoked(&self) -> BTreeSet<i32> {
        std::mem::take(&mut self.changes().revoked)
    }

    pub fn measured_lag(&self, partition: i32, records: i64) {
        self.metrics.consumer_lag.get_or_create(&self.label(partition)).set(records);
    }

    fn changes(&self) -> MutexGuard<'_, Changes> {
        self.changes.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// New partitions come in paused; [`super::Running::place`] gives them their start. One path for a first start, a
    /// rebalance, a start during an outage, and a handler whose own position moved.
    fn assign(&self, consumer: &BaseConsumer<Self>, partitions: &mut TopicPartitionList) -> Result<(), KafkaError> {
        partitions.set_all_offsets(Offset::Beginning)?; // a placeholder: paused before anything is fetched
        consumer.incremental_assign(partitions)?;
        consumer.pause(partitions)?;
        self.changes().unplaced.extend(numbers(partitions));
        Ok(())
    }

    /// The handled is committed before the partitions go, unless they are lost already: then they are another's, and what it
    /// committed must stand.
    fn revoke(&self, consumer: &BaseConsumer<Self>, partitions: &TopicPartitionList) -> Result<(), KafkaError> {
        if !consumer.assignment_lost() {
            // Fails with "no offset" where the automatic commit was faster; any other failure means that records come again.
            let _ = consumer.commit_consumer_state(CommitMode::Sync);
        }
        let mut changes = self.changes();
        for partition in numbers(partitions) {
            changes.unplaced.remove(&partition);
            changes.revoked.insert(partition);
            self.metrics.consumer_lag.remove(&self.label(partition));
        }
        drop(changes);
        consumer.incremental_unassign(partitions)
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
        let Some(topic) = statistics.topics.get(&self.topic).filter(|_| !self.paused.load(Relaxed)) else { return };
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
