//! The partitions of a consumer: which are assigned, which of them the client reads, and the next
//! offset of each. Rebalance callbacks run inside `poll`, on the consumer's own thread.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::atomic::AtomicBool;
use std::sync::atomic::Ordering::Relaxed;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use rdkafka::consumer::{BaseConsumer, CommitMode, Consumer as _, ConsumerContext};
use rdkafka::error::{KafkaError, RDKafkaErrorCode};
use rdkafka::message::{BorrowedMessage, Message};
use rdkafka::statistics::{Statistics, Topic};
use rdkafka::types::RDKafkaRespErr;
use rdkafka::{ClientContext, Offset, TopicPartitionList};

use super::blocked::Blocked;
use super::reading::{Oldest, Reading, Unhandled};
use super::reports::{Reports, Wait};
use super::start::ConsumerSetup;
use crate::messaging::errors::{Class, class};
use crate::messaging::handler::{EndOfPartition, Handler};
use crate::messaging::kafka::create_with;
use crate::platform::metrics::now_ms;

/// Time for one request to Kafka.
pub(super) const KAFKA_TIMEOUT: Duration = Duration::from_secs(3);
/// A refusal counts as ended if it was not repeated for this long and the client reads every
/// partition. The client repeats a refused request within a second.
const REFUSAL_MEMORY: Duration = Duration::from_secs(5);

const UNREAD: &str = "Kafka has sent nothing of this partition for 10 s, not even its end: it has no leader, or this \
                      service may not read the topic";
const OPEN_TRANSACTION: &str = "another program has left a transaction open: no later record can be read. Find its \
                                producer and end it. It begins at offset";

/// The partitions that the group assigned to this consumer, and how far each is handled. Used by
/// the consumer's thread only.
pub(super) struct Partitions<'c> {
    pub(super) client: &'c Client,
    pub(super) group: &'static str,
    /// The name of the group on the broker.
    pub(super) group_on_broker: String,
    pub(super) topic: String,
    /// Next offset to handle, per partition that the client reads.
    pub(super) next_offsets: BTreeMap<i32, i64>,
    /// Partitions of which a skipped record was logged.
    pub(super) skips_logged: BTreeSet<i32>,
    /// Partitions that have been read to the end.
    pub(super) at_end: BTreeSet<i32>,
    /// Partition and offset of the records that were dropped because the handler's position did not
    /// match. Those before the new position will count as duplicates.
    pub(super) dropped: BTreeSet<(i32, i64)>,
    /// Partitions that wait for their next record, which fails.
    pub(super) blocked: BTreeMap<i32, Blocked<'c>>,
    /// Partitions whose start was not found. They come last in the next attempt.
    pub(super) unplaceable: BTreeSet<i32>,
    /// When a failed placement is tried again.
    pub(super) retry_placement_at: Instant,
}

/// The Kafka client of a consumer.
pub(super) type Client = BaseConsumer<Assignment>;

/// The result of a poll.
pub(super) enum Polled<'c> {
    Nothing,
    /// In the client's memory, which the client keeps until the message is dropped.
    Record(BorrowedMessage<'c>),
    /// A partition has been read to its end.
    EndOfPartition,
    Error(KafkaError),
}

/// Creates a client that joins the group.
pub(super) fn join<H: Handler>(setup: &ConsumerSetup<H>) -> anyhow::Result<Client> {
    let client: Client = create_with(&setup.kafka.group_member(H::GROUP, setup.number), Assignment::new(setup))?;
    client.subscribe(&[&setup.topic()]).context("cannot subscribe to the topic")?;
    Ok(client)
}

impl<'c> Partitions<'c> {
    pub fn new<H: Handler>(client: &'c Client, setup: &ConsumerSetup<H>) -> Self {
        Self {
            client,
            group: H::GROUP,
            group_on_broker: setup.kafka.prefixed(H::GROUP),
            topic: setup.topic(),
            next_offsets: BTreeMap::new(),
            skips_logged: BTreeSet::new(),
            at_end: BTreeSet::new(),
            dropped: BTreeSet::new(),
            blocked: BTreeMap::new(),
            unplaceable: BTreeSet::new(),
            retry_placement_at: Instant::now(),
        }
    }

    pub fn poll(&mut self, wait: Duration) -> Polled<'c> {
        match self.client.poll(wait) {
            None => Polled::Nothing,
            Some(Ok(message)) => {
                self.at_end.remove(&message.partition());
                Polled::Record(message)
            }
            Some(Err(KafkaError::PartitionEOF(partition))) => {
                self.at_end.insert(partition);
                Polled::EndOfPartition
            }
            Some(Err(error)) => Polled::Error(error),
        }
    }

    /// Handles an error of the client. The client recovers from most errors while the consumer
    /// polls. `/status` reports them, because the client's statistics show them.
    ///
    /// # Errors
    /// The client cannot recover, or Kafka does not have the offset to read from.
    pub fn handle_client_error(&self, error: &KafkaError) -> anyhow::Result<()> {
        if let Some((code, reason)) = self.client.client().fatal_error() {
            bail!("the Kafka client failed and cannot recover: {code}: {reason}");
        }
        if error.rdkafka_error_code() == Some(RDKafkaErrorCode::AutoOffsetReset) {
            bail!(
                "Kafka does not have the offset at which group {} wants to read; no record was skipped. Find out what \
                 deleted the records, then set the offsets of the group by hand: {error}",
                self.group
            );
        }
        self.client.context().note_error(error);
        Ok(())
    }

    /// Forgets partitions that were revoked since the last call.
    pub fn drop_revoked(&mut self) {
        for partition in self.client.context().take_revoked() {
            self.at_end.remove(&partition);
            self.next_offsets.remove(&partition);
            self.blocked.remove(&partition);
            self.dropped.retain(|(dropped, _)| *dropped != partition);
        }
    }

    /// Partitions that the client silently stopped fetching.
    pub fn idle(&self) -> Vec<i32> {
        self.client.context().idle()
    }

    /// Stops fetching all partitions. Polling continues, so the group keeps this consumer.
    pub fn pause(&self) -> anyhow::Result<()> {
        self.client.context().paused.store(true, Relaxed);
        Ok(self.client.pause(&self.list(self.next_offsets.keys()))?)
    }

    /// Continues all partitions that are not blocked.
    pub fn resume(&self) -> anyhow::Result<()> {
        self.client.context().paused.store(false, Relaxed);
        let working = self.next_offsets.keys().filter(|partition| !self.blocked.contains_key(partition));
        Ok(self.client.resume(&self.list(working))?)
    }

    /// Stores the next offset per partition. librdkafka commits stored offsets later. Do not
    /// use its other functions that store offsets: they add one.
    pub fn store(&self, next_offsets: &BTreeMap<i32, i64>) -> anyhow::Result<()> {
        let mut offsets = TopicPartitionList::new();
        for (partition, offset) in next_offsets {
            offsets.add_partition_offset(&self.topic, *partition, Offset::Offset(*offset))?;
        }
        self.client.store_offsets(&offsets).context("cannot store offsets")?;
        self.client.context().note_handled(next_offsets);
        Ok(())
    }

    /// Notes the first polled record of each partition that is not handled, for the age of the lag.
    pub fn note_unhandled(&self, records: &BTreeMap<i32, Unhandled>) {
        self.client.context().note_unhandled(records);
    }

    /// Commits the stored offsets.
    pub fn commit(&self) {
        // Fails if there is nothing to commit, or if the automatic commit was faster.
        let _ = self.client.commit_consumer_state(CommitMode::Sync);
    }

    /// The partitions that have been read to the end. The next offset after the end is the client's
    /// position, which is after the marker of the last transaction. Storing it makes the lag 0.
    /// `unhandled` are partitions of which records were polled that are not handled yet: their
    /// position is after these records.
    pub fn ends(&self, unhandled: &BTreeSet<i32>) -> Result<Vec<EndOfPartition>, KafkaError> {
        let positions = self.client.position()?;
        // A blocked partition has records that are not handled.
        let is_handled = |partition: &&i32| !self.blocked.contains_key(partition) && !unhandled.contains(partition);
        let at_end = self.at_end.iter().filter(is_handled);
        let ends = at_end.filter_map(|partition| {
            let expected_position = *self.next_offsets.get(partition)?;
            let position = positions.find_partition(&self.topic, *partition).map(|element| element.offset());
            let next_offset = match position {
                Some(Offset::Offset(position)) => position.max(expected_position),
                _ => expected_position,
            };
            Some(EndOfPartition { partition: *partition, expected_position, next_offset })
        });
        Ok(ends.collect())
    }

    /// Measures the lag of paused partitions, so that the metric shows how it grows. If Kafka does
    /// not answer for a partition, which may have no leader, its metric keeps its value. If it does
    /// not answer twice, it is probably down.
    pub fn measure_lag(&self, partitions: impl IntoIterator<Item = i32>) {
        let mut unanswered = 0;
        for partition in partitions {
            let Some(next_offset) = self.next_offsets.get(&partition) else { continue };
            let asked = Instant::now();
            let Ok((_, end)) = self.client.fetch_watermarks(&self.topic, partition, KAFKA_TIMEOUT) else {
                unanswered += u32::from(asked.elapsed() >= KAFKA_TIMEOUT);
                if unanswered == 2 {
                    return;
                }
                continue;
            };
            let context = self.client.context();
            context.reports.lag(partition, end - next_offset);
            context.note_end(partition, end);
        }
    }

    pub(super) fn list<'a>(&self, partitions: impl IntoIterator<Item = &'a i32>) -> TopicPartitionList {
        let mut list = TopicPartitionList::new();
        for partition in partitions {
            list.add_partition(&self.topic, *partition);
        }
        list
    }
}

/// The part of the state that rebalance callbacks and statistics change.
pub(super) struct Assignment {
    /// The component's name in `/status`.
    component: String,
    pub(super) reports: Reports,
    /// Whether the consumer has paused its partitions. If so, it measures the lag itself, because
    /// the client's statistics do not change for paused partitions.
    pub(super) paused: AtomicBool,
    changes: Mutex<Changes>,
}

#[derive(Default)]
struct Changes {
    /// Assigned, but their start is not known yet. The client does not have them.
    unplaced: BTreeSet<i32>,
    /// Assigned, and given to the client with their start.
    reading: BTreeMap<i32, Reading>,
    /// Revoked since the last call of [`Assignment::take_revoked`].
    revoked: BTreeSet<i32>,
    /// Codes with which Kafka refuses requests of this client, and when each was last seen.
    refusals: BTreeMap<String, Instant>,
    /// Whether the client was given partitions since the last call of [`Assignment::take_revoked`].
    just_started: bool,
}

impl Assignment {
    fn new<H: Handler>(setup: &ConsumerSetup<H>) -> Self {
        let component = setup.component("group");
        setup.health.report(&component, "Kafka to assign partitions");
        Self {
            component,
            reports: Reports {
                group: H::GROUP,
                consumer: setup.consumer(),
                topic: setup.topic(),
                health: setup.health.clone(),
                metrics: setup.metrics.clone(),
            },
            paused: AtomicBool::new(false),
            changes: Mutex::default(),
        }
    }

    pub fn unplaced(&self) -> Vec<i32> {
        self.changes().unplaced.iter().copied().collect()
    }

    /// Makes the client read these partitions, each from its offset in the list.
    pub fn start_reading(&self, client: &Client, starts: &TopicPartitionList) -> Result<(), KafkaError> {
        client.incremental_assign(starts)?;
        // A partition that was paused when the client lost it is still paused.
        client.resume(starts)?;
        let mut changes = self.changes();
        for element in starts.elements() {
            let start = element.offset().to_raw().unwrap_or_default();
            changes.unplaced.remove(&element.partition());
            changes.reading.insert(element.partition(), Reading::new(start, Instant::now()));
        }
        changes.just_started = true;
        self.reports.count_started(starts.count());
        Ok(())
    }

    /// Makes the client stop reading these partitions. They are placed again later.
    pub fn stop_reading(&self, client: &Client, partitions: &[i32]) -> Result<(), KafkaError> {
        client.incremental_unassign(&self.take_reading(partitions))?;
        self.changes().unplaced.extend(partitions);
        Ok(())
    }

    /// Partitions that the client silently stopped fetching. It does so if Kafka does not have the
    /// requested offset while the partition is paused: the client then discards the error together
    /// with the fetched records.
    fn idle(&self) -> Vec<i32> {
        let now = Instant::now();
        let changes = self.changes();
        changes.reading.iter().filter(|(_, reading)| reading.is_idle(now)).map(|(partition, _)| *partition).collect()
    }

    /// Notes how far partitions are handled, for their lag.
    fn note_handled(&self, next_offsets: &BTreeMap<i32, i64>) {
        let mut changes = self.changes();
        for (partition, next_offset) in next_offsets {
            if let Some(reading) = changes.reading.get_mut(partition) {
                reading.note_handled(*next_offset);
                self.reports.oldest(*partition, reading.oldest(now_ms()));
            }
        }
    }

    /// Notes the first polled record of each partition that is not handled, for the age of the lag.
    fn note_unhandled(&self, records: &BTreeMap<i32, Unhandled>) {
        let mut changes = self.changes();
        for (partition, record) in records {
            if let Some(reading) = changes.reading.get_mut(partition) {
                reading.note_unhandled(*record);
                self.reports.oldest(*partition, reading.oldest(now_ms()));
            }
        }
    }

    /// Notes the end of a paused partition.
    fn note_end(&self, partition: i32, end: i64) {
        if let Some(reading) = self.changes().reading.get_mut(&partition) {
            reading.note_end(end);
            self.reports.oldest(partition, reading.oldest(now_ms()));
        }
    }

    /// Reports that no broker answers: the ends of the partitions are unknown.
    fn forget_ends(&self) {
        for (partition, reading) in &mut self.changes().reading {
            let oldest: Oldest = reading.oldest_polled();
            self.reports.forget_records(*partition);
            self.reports.oldest(*partition, oldest);
        }
    }

    /// Notes whether a partition is paused because its next record fails.
    pub fn note_paused(&self, partition: i32, paused: bool) {
        if let Some(reading) = self.changes().reading.get_mut(&partition) {
            reading.paused = paused;
        }
    }

    /// Notes an error of the client, by its class. A refusal is logged once, until it has ended.
    fn note_error(&self, error: &KafkaError) {
        let group = self.reports.group;
        if class(error) != Class::Refused {
            tracing::debug!(group, %error, "error of the Kafka client; it retries");
            return;
        }
        let code = error.rdkafka_error_code().map_or("Unknown".to_owned(), |code| format!("{code:?}"));
        self.reports.count_refusal(&code);
        let mut changes = self.changes();
        if changes.refusals.insert(code.clone(), Instant::now()).is_none() {
            tracing::warn!(
                group,
                topic = self.reports.topic,
                code,
                "Kafka refuses a request of the consumer; it is repeated until an operator has fixed the cause"
            );
            self.reports.refuses(&changes.refusals.keys().map(String::as_str).collect::<Vec<_>>());
        }
    }

    /// Forgets the refusals if none was repeated lately and every partition is read.
    fn end_refusals(&self, changes: &mut Changes) {
        let recent = changes.refusals.values().any(|seen| seen.elapsed() < REFUSAL_MEMORY);
        if changes.refusals.is_empty() || recent || changes.reading.values().any(|reading| !reading.is_read()) {
            return;
        }
        changes.refusals.clear();
        self.reports.accepts();
        tracing::info!(group = self.reports.group, "Kafka accepts the requests of the consumer again");
    }

    fn take_revoked(&self) -> BTreeSet<i32> {
        let mut changes = self.changes();
        changes.just_started = false;
        std::mem::take(&mut changes.revoked)
    }

    fn changes(&self) -> MutexGuard<'_, Changes> {
        self.changes.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn take_reading(&self, partitions: &[i32]) -> TopicPartitionList {
        let mut changes = self.changes();
        let mut taken = TopicPartitionList::new();
        for partition in partitions {
            if changes.reading.remove(partition).is_some() {
                self.reports.stopped(*partition);
                self.reports.count_stopped(1);
                taken.add_partition(&self.reports.topic, *partition);
            }
        }
        taken
    }

    /// Accepts the assignment, but gives the client no partition before [`Partitions::place`] knows
    /// its start. So a first start, a rebalance, a start during an outage, and a handler whose
    /// position changed all take the same path.
    ///
    /// The alternative, a placeholder offset and a later seek, fails. The client looks up the
    /// placeholder in the background. If the answer arrives after the seek, it moves the partition
    /// back (librdkafka 2.12 repeats the lookup and does not check whether it is still needed).
    ///
    /// For a rebalance the client pauses its partitions until the consumer has accepted the
    /// assignment. If [`Assignment::start_reading`] gave it a partition during that time, the
    /// client may take that call for the acceptance and leave partitions paused (also librdkafka
    /// 2.12). So if partitions were started just before, all of them are restarted.
    fn assign(&self, client: &Client, partitions: &TopicPartitionList) -> Result<(), KafkaError> {
        client.incremental_assign(&TopicPartitionList::new())?;
        let mut changes = self.changes();
        changes.unplaced.extend(numbers(partitions));
        if changes.just_started {
            let restart: Vec<i32> = changes.reading.keys().copied().collect();
            changes.revoked.extend(&restart);
            drop(changes);
            self.stop_reading(client, &restart)?;
        }
        Ok(())
    }

    /// Commits the handled records before the partitions go to another consumer. With automatic
    /// commits the client would do so as well, a moment later (librdkafka 2.12). If the partitions
    /// are already lost, another consumer may have them, and its commits must not be overwritten.
    fn revoke(&self, client: &Client, partitions: &TopicPartitionList) -> Result<(), KafkaError> {
        if !client.assignment_lost() {
            // Fails with "no offset" if the automatic commit was faster. After any other failure
            // the records come again.
            let _ = client.commit_consumer_state(CommitMode::Sync);
        }
        let partitions = numbers(partitions);
        let mut changes = self.changes();
        for partition in &partitions {
            changes.unplaced.remove(partition);
            changes.revoked.insert(*partition);
            self.reports.forget_lag(*partition);
        }
        drop(changes);
        client.incremental_unassign(&self.take_reading(&partitions))
    }

    /// Takes over the statistics of the partitions that are read, and reports their lag and why
    /// they wait.
    fn observe(&self, topic: &Topic) {
        let now = Instant::now();
        let all_paused = self.paused.load(Relaxed);
        let mut changes = self.changes();
        for partition in topic.partitions.values() {
            let number = partition.partition;
            let Some(reading) = changes.reading.get_mut(&number) else { continue };
            reading.observe(partition, now);
            if all_paused || reading.paused {
                reading.forget();
                continue;
            }
            match reading.lag() {
                Some(lag) => self.reports.lag(number, lag),
                None => self.reports.forget_records(number),
            }
            self.reports.oldest(number, reading.oldest(now_ms()));
            let unread = reading.is_unread(now).then(|| UNREAD.to_owned());
            self.report(number, Wait::NotRead, unread, &mut reading.unread_reported);
            let open = reading.held_up_at(now).map(|offset| format!("{OPEN_TRANSACTION} {offset}"));
            self.report(number, Wait::OpenTransaction, open, &mut reading.open_reported);
        }
        self.end_refusals(&mut changes);
    }

    /// Reports a change: the partition waits for this reason, or not any more.
    fn report(&self, partition: i32, wait: Wait, reason: Option<String>, reported: &mut bool) {
        let Reports { group, topic, .. } = &self.reports;
        match reason {
            Some(reason) if !*reported => {
                tracing::warn!(group, topic, partition, reason, "the records of a partition wait");
                self.reports.waits(partition, wait, &reason);
            }
            None if *reported => {
                tracing::info!(group, topic, partition, "the records of a partition can be read again");
                self.reports.continues(partition, wait);
            }
            _ => return,
        }
        *reported = !*reported;
    }
}

fn numbers(partitions: &TopicPartitionList) -> Vec<i32> {
    partitions.elements().iter().map(|element| element.partition()).collect()
}

impl ConsumerContext for Assignment {
    fn rebalance(&self, client: &Client, event: RDKafkaRespErr, partitions: &mut TopicPartitionList) {
        // Read before the client accepts the change.
        let is_lost = client.assignment_lost();
        let (action, result) = match event {
            RDKafkaRespErr::RD_KAFKA_RESP_ERR__ASSIGN_PARTITIONS => ("assigned", self.assign(client, partitions)),
            _ if is_lost => ("lost", self.revoke(client, partitions)),
            _ => ("revoked", self.revoke(client, partitions)),
        };
        let partitions = numbers(partitions);
        if !partitions.is_empty() {
            self.reports.count_rebalance(action);
        }
        match result {
            Ok(()) => tracing::info!(group = self.reports.group, action, ?partitions, "partitions rebalanced"),
            Err(error) => {
                tracing::error!(group = self.reports.group, action, ?partitions, %error, "cannot rebalance partitions");
            }
        }
    }
}

impl ClientContext for Assignment {
    /// Twice a second: reports whether the consumer is in its group, and the state of its
    /// partitions.
    fn stats(&self, statistics: Statistics) {
        let connected = statistics.brokers.values().any(|broker| broker.state == "UP");
        let joined = statistics.cgrp.is_some_and(|group| group.state == "up" && group.join_state == "steady");
        let health = &self.reports.health;
        match (connected, joined) {
            (true, true) => health.resolved(&self.component),
            (true, false) => health.report(&self.component, "Kafka to assign partitions"),
            (false, _) => health.report(&self.component, "Kafka to answer"),
        }
        match statistics.topics.get(&self.reports.topic) {
            Some(topic) if connected => self.observe(topic),
            _ => self.forget_ends(),
        }
    }

    fn error(&self, error: KafkaError, _reason: &str) {
        self.note_error(&error);
    }
}
