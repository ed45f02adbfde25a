//! The consumer: one OS thread that polls, handles and stores offsets in turn. Rebalance callbacks
//! run only inside `poll`, when no batch is being processed, so there is nothing to drain and no
//! race. Scale by more consumers, not by threads per partition.
//!
//! With a backlog the consumer polls the next batch before the handler gets the present one. While
//! the handler waits for its database, the consumer decodes the next batch, and does not poll. So a
//! revoke waits until the present batch is handled and stored. `Consumer::fill` then drops the
//! records of the revoked partitions from the next batch.
//!
//! It stores the offset of the next record, and only after the effects are durable. librdkafka
//! commits stored offsets from time to time (OFFSET_COMMIT_MS), on a revoke and on shutdown.

mod breaker;
mod start;
mod batch;
mod backoff;
mod operator;
mod blocked;
mod reading;
mod reports;
mod partitions;
mod placement;
mod unassigned;
mod waiting;
mod blocking;

use std::collections::{BTreeMap, BTreeSet};
use std::mem;
use std::rc::Rc;
use std::time::{Duration, Instant};

use rdkafka::message::Message;
use tokio::runtime::Handle as Runtime;
use tokio::time::timeout;

use super::dead_letters::{DeadLetter, DeadLetterWriter};
use super::handler::{Failure, Handler, Split};
use super::record::Coordinates;
use crate::events::Event;
use crate::fault;
use batch::{Batch, DeliveryContext, Failing, Halt, PolledMessage};
use breaker::Breaker;
use operator::Decision;
use partitions::{Partitions, Polled};
use unassigned::Unassigned;
use waiting::Waiting;

pub(super) use batch::BATCH_BYTES;
pub(crate) use batch::BATCH_RECORDS;
pub use breaker::BreakerConfig;
pub(super) use operator::BlockedRecords;
pub(crate) use start::ConsumerSetup;

/// How long an empty batch waits for its first record. It is also how soon the consumer notices a
/// stop.
const IDLE_POLL: Duration = Duration::from_millis(100);
/// How long a started batch waits for more records.
const LINGER: Duration = Duration::from_millis(2);
/// How often [`Handler::caught_up`] is called while no record comes.
const CAUGHT_UP_INTERVAL: Duration = Duration::from_secs(1);

/// A running consumer.
pub(crate) struct Consumer<'c, H> {
    setup: ConsumerSetup<H>,
    runtime: Runtime,
    dead_letters: DeadLetterWriter,
    partitions: Partitions<'c>,
    unassigned: Unassigned,
    waiting: Waiting,
    /// When `caught_up` was last called; `None` forces a call on the next turn.
    last_caught_up_call: Option<Instant>,
}

impl<'c, H: Handler> Consumer<'c, H> {
    /// Prepares the topics, joins the group and consumes until the process stops. Blocks the
    /// calling thread.
    ///
    /// # Errors
    /// The Kafka settings are invalid, Kafka does not have the offset to read from, or a topic
    /// differs from its declaration.
    pub fn run(setup: ConsumerSetup<H>) -> anyhow::Result<()> {
        let runtime = Runtime::current();
        let breaker = Breaker::new(&setup.breaker);
        let dead_letters = DeadLetterWriter::new(&setup.kafka, H::GROUP, H::Event::TOPIC.kind);
        let topics = setup.stop.run_until_cancelled(setup.prepare_topics());
        let Some(prepared) = runtime.block_on(topics) else { return Ok(()) };
        prepared?;
        let client = partitions::join(&setup)?;
        let partitions = Partitions::new(&client, &setup);
        let waiting = Waiting::new(breaker, setup.resumed.clone(), setup.paused.clone());
        let unassigned = Unassigned::new();
        let consumer =
            Consumer { setup, runtime, dead_letters, partitions, unassigned, waiting, last_caught_up_call: None };
        consumer.consume()
    }

    /// The loop. Crash anywhere: records whose offset was not committed come again.
    fn consume(mut self) -> anyhow::Result<()> {
        let mut batch = Batch::new(self.setup.batch_records);
        let mut next = Batch::new(self.setup.batch_records);
        while !self.setup.stop.is_cancelled() {
            self.waiting.follow_operator(&self.setup, &self.partitions)?;
            if !self.waiting.is_paused() {
                self.partitions.place(&self.setup, &self.runtime);
                self.retry_blocked(&mut batch)?;
            }
            self.unassigned.look(&self.setup, &self.partitions)?;
            self.fill(&mut batch, &mut next)?;
            if self.waiting.may_work(&self.setup, &self.partitions) {
                let result = self.work(&mut batch, &mut next);
                self.finish_turn(&mut batch, &mut next, result)?;
            }
        }
        self.partitions.commit();
        Ok(())
    }

    /// Polls until the batch is full or no record comes. A paused consumer polls too, or the group
    /// would consider it dead. Its partitions are paused, so a poll returns only events of the
    /// group.
    ///
    /// When the batch is full, the next one gets the records that the client has already fetched.
    /// They are decoded while the handler works on the batch, and they are the next turn's batch.
    fn fill(&mut self, batch: &mut Batch<'c, H::Event>, next: &mut Batch<'c, H::Event>) -> anyhow::Result<()> {
        if batch.is_empty() {
            mem::swap(batch, next);
        }
        let is_paused = self.waiting.is_paused();
        let mut wait = if is_paused || batch.is_empty() { IDLE_POLL } else { LINGER };
        // At least one poll, for the events of the group.
        loop {
            let is_ahead = batch.is_full() || !next.is_empty();
            if is_ahead && !is_paused {
                wait = Duration::ZERO;
            }
            match self.partitions.poll(wait) {
                Polled::Nothing => break,
                Polled::Record(message) if is_ahead => next.push(Rc::new(message)),
                Polled::Record(message) => {
                    batch.push(Rc::new(message));
                    wait = LINGER;
                }
                Polled::EndOfPartition => {
                    self.last_caught_up_call = None;
                    wait = Duration::ZERO;
                }
                Polled::Error(error) => {
                    self.partitions.handle_client_error(&error)?;
                    break;
                }
            }
            if !is_paused && batch.is_full() && next.is_full() {
                break;
            }
        }
        let idle = self.partitions.idle();
        if !idle.is_empty() && !self.waiting.is_paused() {
            tracing::warn!(group = H::GROUP, partitions = ?idle, "the Kafka client stopped fetching; restarting partitions");
            self.partitions.restart(&idle)?;
        }
        if !batch.is_empty() {
            fault::point("consumer.after_poll");
        }
        self.partitions.drop_revoked();
        // Drops records that were polled before their partition was revoked or restarted: another
        // consumer handles them, or this one reads them again.
        let placed = &self.partitions.next_offsets;
        batch.retain_partitions(|partition| placed.contains_key(&partition));
        next.retain_partitions(|partition| placed.contains_key(&partition));
        Ok(())
    }

    /// Delivers the batch, stores its offsets, and calls `caught_up` from time to time.
    fn work(&mut self, batch: &mut Batch<'c, H::Event>, next: &mut Batch<'c, H::Event>) -> Result<(), Halt> {
        if !batch.is_empty() {
            let split = self.split();
            let (failing, delivered) = self.deliver(batch, next, split);
            for (partition, reason) in failing {
                let mut records = batch.take_blocked(partition);
                records.extend(next.take(partition, 0));
                self.partitions.block(partition, records, reason, &self.setup.blocked_records)?;
            }
            delivered?;
            fault::point("consumer.after_effect");
            self.partitions.store(&batch.next_offsets())?;
            fault::point("consumer.after_store");
        }
        // Also for an empty batch: its records may have been revoked after some had taken effect.
        batch.complete(&self.setup);
        if self.last_caught_up_call.is_none_or(|last| last.elapsed() >= CAUGHT_UP_INTERVAL) {
            self.call_caught_up(&next.partitions())?;
            self.last_caught_up_call = Some(Instant::now());
        }
        Ok(())
    }

    /// On a retry the records are tried one by one if together they take too long again, or if one
    /// of them seems to be the cause of the failures.
    fn split(&self) -> Split {
        if self.waiting.suspects_a_record() && self.dependency_works() {
            Split::Failing
        } else if self.waiting.is_paused() {
            Split::Slow
        } else {
            Split::Rejected
        }
    }

    fn dependency_works(&self) -> bool {
        let works = self.setup.handler.dependency_works();
        let limit = self.setup.kafka.handle_timeout();
        self.runtime.block_on(async { timeout(limit, works).await }).unwrap_or(false)
    }

    /// Delivers the batch. Decodes the next one while the handler waits for its database.
    fn deliver(
        &mut self,
        batch: &mut Batch<'c, H::Event>,
        next: &mut Batch<'c, H::Event>,
        split: Split,
    ) -> (Failing, Result<(), Halt>) {
        let mut unhandled = next.first_records();
        unhandled.extend(batch.first_records());
        self.partitions.note_unhandled(&unhandled);
        let context = DeliveryContext {
            setup: &self.setup,
            dead_letters: &self.dead_letters,
            breaker: &mut self.waiting.breaker,
            next_offsets: &mut self.partitions.next_offsets,
            skips_logged: &mut self.partitions.skips_logged,
            split,
        };
        self.runtime.block_on(async { tokio::join!(batch.deliver(context), next.decode()).0 })
    }

    /// Follows an operator's decision about a record that blocks its partition, or tries the record
    /// again that is due. Does only one of these in a turn, so that the consumer polls in between.
    /// `batch` gets the later records of a partition that continues. It has at most records of other
    /// partitions, which were polled before an operator paused the consumer.
    fn retry_blocked(&mut self, batch: &mut Batch<'c, H::Event>) -> anyhow::Result<()> {
        let blocked = self.partitions.blocked.values();
        let decided = blocked.clone().find_map(|blocked| Some((blocked.decision()?, blocked.record().clone())));
        let due = blocked.filter(|blocked| blocked.due <= Instant::now()).min_by_key(|blocked| blocked.due);
        let due = due.map(|blocked| blocked.record().clone());
        match (decided, due) {
            (Some((decision, record)), _) => self.dead_letter_blocked(batch, record, decision),
            (None, Some(record)) => self.retry_record(batch, record),
            (None, None) => Ok(()),
        }
    }

    /// Crash after the effect and before the offset is stored: the record comes again, and effects
    /// are idempotent.
    fn retry_record(&mut self, batch: &mut Batch<'c, H::Event>, record: PolledMessage<'c>) -> anyhow::Result<()> {
        let partition = record.partition();
        let started = Instant::now();
        let mut single = Batch::of(record);
        let (mut failing, delivered) = self.deliver(&mut single, &mut Batch::new(0), Split::Failing);
        match delivered {
            Ok(()) if failing.is_empty() => {
                self.partitions.store(&single.next_offsets())?;
                single.complete(&self.setup);
                batch.extend(self.partitions.unblock(partition)?);
            }
            Ok(()) => self.partitions.postpone(partition, failing.remove(&partition), started.elapsed()),
            Err(Halt::Failure(Failure::Resume)) => self.partitions.restart(&[partition])?,
            Err(Halt::Breaker(rejections)) => self.waiting.open_breaker(&self.setup, &self.partitions, &rejections)?,
            // The dependency is down, or Kafka does not accept the letter of the record.
            Err(Halt::Failure(_) | Halt::Unwritten(_)) => self.partitions.postpone(partition, None, started.elapsed()),
        }
        Ok(())
    }

    /// The letter is written before the offset is stored. Crash in between: the record comes again
    /// and blocks its partition again, with an open letter. The operator decides again, and the
    /// letter is written again with the same key.
    fn dead_letter_blocked(
        &mut self,
        batch: &mut Batch<'c, H::Event>,
        record: PolledMessage<'c>,
        decision: Decision,
    ) -> anyhow::Result<()> {
        let coordinates = Coordinates::of(&*record);
        let reason = decision.reason.clone();
        let letter = DeadLetter { coordinates, reason, attempts: 1, since: None, message: record.detach() };
        if let Err(error) = self.runtime.block_on(self.dead_letters.write(&letter)) {
            decision.answer(Err(format!("{error:#}")));
            return Ok(());
        }
        let DeadLetter { coordinates, reason, .. } = letter;
        tracing::error!(group = H::GROUP, %coordinates, reason, "record dead-lettered by an operator");
        self.partitions.store(&BTreeMap::from([(coordinates.partition, coordinates.offset + 1)]))?;
        self.setup.group_metrics.dead_lettered.inc();
        batch.extend(self.partitions.unblock(coordinates.partition)?);
        decision.answer(Ok(()));
        Ok(())
    }

    /// `unhandled` are partitions of which records were polled that are not handled yet.
    fn call_caught_up(&mut self, unhandled: &BTreeSet<i32>) -> Result<(), Failure> {
        for end in self.partitions.ends(unhandled)? {
            let limit = self.setup.kafka.handle_timeout();
            let call = self.setup.handler.caught_up(end);
            match self.runtime.block_on(async { timeout(limit, call).await })? {
                Ok(()) => {
                    self.partitions.next_offsets.insert(end.partition, end.next_offset);
                    self.partitions.store(&BTreeMap::from([(end.partition, end.next_offset)]))?;
                }
                Err(Failure::Resume) => self.partitions.restart(&[end.partition])?,
                Err(failure) => return Err(failure),
            }
        }
        Ok(())
    }

    /// Decides what follows from the result of a turn.
    fn finish_turn(
        &mut self,
        batch: &mut Batch<'c, H::Event>,
        next: &mut Batch<'c, H::Event>,
        result: Result<(), Halt>,
    ) -> anyhow::Result<()> {
        let setup = &self.setup;
        let partitions = &mut self.partitions;
        match result {
            Ok(()) => self.waiting.end(setup, partitions),
            Err(Halt::Failure(Failure::Resume)) => {
                // The batch is dropped and read again from the handler's position. Finished records
                // are counted now. The others are noted in `dropped`: those before the new position
                // were applied earlier and will not be delivered again, so they count as
                // duplicates.
                let affected: Vec<i32> = batch.partitions().into_iter().collect();
                affected.iter().for_each(|partition| batch.extend(next.take(*partition, 0)));
                tracing::info!(group = H::GROUP, partitions = ?affected, "the handler's stored position differs from that of the batch; reading these partitions again from the stored position");
                partitions.dropped.extend(batch.unfinished());
                batch.complete(setup);
                partitions.restart(&affected)?;
                self.waiting.end(setup, partitions)
            }
            Err(Halt::Failure(failure @ Failure::Retry(_))) => {
                self.waiting.retry_later(setup, partitions, &failure, "a dependency of its handler")
            }
            Err(Halt::Failure(Failure::Reject(reason))) => {
                let error = anyhow::anyhow!("the handler rejected the end of a partition: {reason}");
                self.waiting.retry_later(setup, partitions, &error.into(), "its handler")
            }
            Err(Halt::Unwritten(error)) => {
                let topic = self.dead_letters.topic();
                let what = format!("Kafka to accept a dead letter: check the topic {topic}");
                self.waiting.retry_later(setup, partitions, &error.into(), &what)
            }
            Err(Halt::Breaker(rejections)) => self.waiting.open_breaker(setup, partitions, &rejections),
        }
    }
}
