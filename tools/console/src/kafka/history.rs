//! Searches the topics for the newest records of one user. Kafka has no index of keys, so the
//! console reads only the last records of each partition in question.

use std::collections::BTreeSet;
use std::time::Instant;

use anyhow::ensure;
use rdkafka::consumer::{BaseConsumer, Consumer};
use rdkafka::error::KafkaError;
use rdkafka::{Offset, TopicPartitionList};
use shared::events::key_hash;
use shared::messaging::KafkaConfig;
use tokio::task::spawn_blocking;
use topology::USER;
use uuid::Uuid;

use super::record::Reader;
use super::tail::{Seen, seen};
use super::{ANSWER_LIMIT, GROUP, topics};
use crate::traces::TraceId;

/// Records of each partition that are read, from its end backwards: less than 1 MB.
pub const LOOKED_BACK: i64 = 1_000;

impl Reader {
    /// The records with this key, and those of other topics that belong to the same traces.
    ///
    /// # Errors
    /// Kafka does not answer.
    pub async fn of_user(&self, user: Uuid) -> anyhow::Result<Vec<Seen>> {
        let _place = self.places.acquire().await?;
        let kafka = self.kafka.clone();
        spawn_blocking(move || of_user(&kafka, user)).await?
    }
}

/// All records of a user are in one partition of a topic whose key is the user. A topic with
/// another key has them anywhere.
fn of_user(kafka: &KafkaConfig, user: Uuid) -> anyhow::Result<Vec<Seen>> {
    let consumer: BaseConsumer = kafka.reader(GROUP).create()?;
    let mut own = vec![];
    let mut others = vec![];
    for topic in topics() {
        let name = kafka.prefixed(topic);
        let metadata = consumer.fetch_metadata(Some(&name), ANSWER_LIMIT)?;
        let partitions: i32 = metadata.topics().iter().map(|topic| topic.partitions().len() as i32).sum();
        match USER.writes.contains(&topic) {
            true if partitions > 0 => own.push((name, key_hash(user) % partitions)),
            true => {}
            false => others.extend((0..partitions).map(|partition| (name.clone(), partition))),
        }
    }
    let mut found = scan(kafka, &consumer, &own, |seen| seen.key == Some(user))?;
    let traces: BTreeSet<TraceId> = found.iter().filter_map(|seen| seen.trace).collect();
    if !traces.is_empty() {
        let of_traces = |seen: &Seen| seen.trace.is_some_and(|trace| traces.contains(&trace));
        found.extend(scan(kafka, &consumer, &others, of_traces)?);
    }
    Ok(found)
}

/// The records among the last of these partitions that pass. One partition after the other, because
/// the end of a partition is reported without its topic.
fn scan(
    kafka: &KafkaConfig,
    consumer: &BaseConsumer,
    partitions: &[(String, i32)],
    passes: impl Fn(&Seen) -> bool,
) -> anyhow::Result<Vec<Seen>> {
    let deadline = Instant::now() + ANSWER_LIMIT;
    let mut found = vec![];
    for (name, partition) in partitions {
        let (first, next) = consumer.fetch_watermarks(name, *partition, ANSWER_LIMIT)?;
        if first == next {
            continue;
        }
        let mut start = TopicPartitionList::new();
        start.add_partition_offset(name, *partition, Offset::Offset((next - LOOKED_BACK).max(first)))?;
        consumer.assign(&start)?;
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            ensure!(!left.is_zero(), "Kafka does not answer");
            match consumer.poll(left) {
                Some(Ok(message)) => found.extend(seen(kafka, &message).filter(&passes)),
                Some(Err(KafkaError::PartitionEOF(_))) => break,
                Some(Err(error)) => return Err(error.into()),
                None => {}
            }
        }
    }
    Ok(found)
}
