//! A batch of records, and its delivery to the handler: decode, handle, dead-letter a record that
//! can never succeed.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::mem;
use std::rc::Rc;
use std::time::Instant;

use opentelemetry::trace::Status;
use rdkafka::message::{BorrowedMessage, Message};
use tokio::task::yield_now;
use tracing::{Instrument, Level, Span, enabled, field::Empty};
use tracing_opentelemetry::OpenTelemetrySpanExt;

use super::breaker::Breaker;
use super::reading::Unhandled;
use super::start::ConsumerSetup;
use crate::events::{self, DecodeError, Envelope, Event};
use crate::messaging::dead_letters::{DeadLetter, DeadLetterWriter};
use crate::messaging::handler::{self, Delivery, Failure, Handler, OneByOneTooLong, Outcome, Split};
use crate::messaging::record::{Coordinates, Record, headers};
use crate::platform::telemetry::{self, TraceContext};

/// The default of the setting BATCH_RECORDS. A transaction has a cost of its own, which is shared
/// by the records of a batch: with more records it is hardly visible any more.
pub(crate) const BATCH_RECORDS: u16 = 2_000;
/// Bytes after which a batch takes no further record. A record has at most 1 MiB, so a batch has at
/// most 1 MiB more. With a backlog a consumer has three batches: the present one, the next one, and
/// the previous one until the next delivery. Each blocked partition keeps its polled records as well.
pub(in crate::messaging) const BATCH_BYTES: usize = 4 * 1024 * 1024;

/// How many records are decoded between two looks at the handler, which waits for its database
/// meanwhile. Decoding them takes about 0.1 ms.
const DECODE_SLICE: usize = 50;

/// Why a batch was not completed.
pub(super) enum Halt {
    /// The handler or Kafka failed.
    Failure(Failure),
    /// Kafka did not accept a dead letter.
    Unwritten(anyhow::Error),
    /// The breaker does not allow another dead letter.
    Breaker(TooManyRejections),
}

/// The next dead letter would be one too many.
pub(super) struct TooManyRejections {
    pub rejected: usize,
    /// How many of the last records were considered.
    pub of: usize,
    /// Why the last record was rejected.
    pub reason: String,
}

impl<E: Into<Failure>> From<E> for Halt {
    fn from(failure: E) -> Self {
        Self::Failure(failure.into())
    }
}

type PartitionOffset = (i32, i64);

/// A record in the memory of the Kafka client.
pub(super) type PolledMessage<'c> = Rc<BorrowedMessage<'c>>;

/// The result of [`Record::decode`].
type Decoded<E> = Result<Option<Record<E>>, DecodeError>;

struct Entry<'c, E> {
    message: PolledMessage<'c>,
    /// Set by [`Batch::decode`], and taken by the first delivery.
    decoded: Option<Decoded<E>>,
}

/// Records that were polled and are not stored as handled yet.
pub(super) struct Batch<'c, E> {
    entries: Vec<Entry<'c, E>>,
    bytes: usize,
    /// The records of the previous full batch, until [`Batch::decode`] frees them.
    handled: Vec<Entry<'c, E>>,
    /// How many records fill the batch.
    limit: usize,
    /// Records of the batch that have taken effect. They are kept while the batch is retried, so
    /// that no record is handled, dead-lettered or counted again because another one failed.
    finished: BTreeSet<PartitionOffset>,
    counts: Counts,
}

/// What happened to the finished records.
#[derive(Default)]
struct Counts {
    outcome: Outcome,
    skipped: u64,
    dead_lettered: u64,
}

impl<'c, E: Event> Batch<'c, E> {
    pub fn new(limit: u16) -> Self {
        Self {
            entries: Vec::new(),
            bytes: 0,
            handled: Vec::new(),
            limit: limit.into(),
            finished: BTreeSet::new(),
            counts: Counts::default(),
        }
    }

    pub fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }

    pub fn is_full(&self) -> bool {
        self.entries.len() >= self.limit || self.bytes >= BATCH_BYTES
    }

    pub fn push(&mut self, message: PolledMessage<'c>) {
        self.bytes += message.payload_len() + message.key_len();
        self.entries.push(Entry { message, decoded: None });
    }

    pub fn extend(&mut self, messages: impl IntoIterator<Item = PolledMessage<'c>>) {
        messages.into_iter().for_each(|message| self.push(message));
    }

    /// A batch of one record that blocks its partition.
    pub fn of(message: PolledMessage<'c>) -> Self {
        let mut batch = Self::new(1);
        batch.push(message);
        batch
    }

    /// Takes out the records of a partition from its first unfinished record on, and returns the
    /// unfinished ones. So [`Batch::next_offsets`] does not exceed the first of them.
    pub fn take_blocked(&mut self, partition: i32) -> VecDeque<PolledMessage<'c>> {
        let unfinished = self.unfinished();
        let first = unfinished.iter().find(|(other, _)| *other == partition).map_or(i64::MAX, |(_, offset)| *offset);
        let taken = self.take(partition, first);
        taken.into_iter().filter(|message| !self.finished.contains(&partition_offset(message))).collect()
    }

    /// Takes out the records of a partition from an offset on.
    pub fn take(&mut self, partition: i32, first: i64) -> Vec<PolledMessage<'c>> {
        let is_taken =
            |entry: &mut Entry<'c, E>| entry.message.partition() == partition && entry.message.offset() >= first;
        self.entries.extract_if(.., is_taken).map(|entry| entry.message).collect()
    }

    /// Drops the records of all other partitions.
    pub fn retain_partitions(&mut self, keep: impl Fn(i32) -> bool) {
        self.entries.retain(|entry| keep(entry.message.partition()));
    }

    pub fn partitions(&self) -> BTreeSet<i32> {
        self.messages().map(|message| message.partition()).collect()
    }

    /// The offset after the last record, per partition.
    pub fn next_offsets(&self) -> BTreeMap<i32, i64> {
        self.messages().map(|message| (message.partition(), message.offset() + 1)).collect()
    }

    /// Records that have not taken effect.
    pub fn unfinished(&self) -> Vec<PartitionOffset> {
        self.messages().map(partition_offset).filter(|record| !self.finished.contains(record)).collect()
    }

    /// The first record of each partition.
    pub fn first_records(&self) -> BTreeMap<i32, Unhandled> {
        let mut first = BTreeMap::new();
        for message in self.messages() {
            first.entry(message.partition()).or_insert_with(|| Unhandled::of(message));
        }
        first
    }

    fn messages(&self) -> impl Iterator<Item = &BorrowedMessage<'c>> {
        self.entries.iter().map(|entry| &*entry.message)
    }

    /// Frees the memory of the previous batch, and decodes the records ahead of their delivery.
    /// Yields from time to time.
    pub async fn decode(&mut self) {
        while !self.handled.is_empty() {
            self.handled.truncate(self.handled.len().saturating_sub(DECODE_SLICE));
            yield_now().await;
        }
        for slice in self.entries.chunks_mut(DECODE_SLICE) {
            for entry in slice.iter_mut().filter(|entry| entry.decoded.is_none()) {
                entry.decoded = Some(decode(&entry.message));
            }
            yield_now().await;
        }
    }

    /// Counts the finished records and empties the batch. Each record is counted once, however
    /// often the batch was retried.
    pub fn complete<H: Handler<Event = E>>(&mut self, setup: &ConsumerSetup<H>) {
        if !self.is_empty() {
            setup.group_metrics.batch_records.observe(self.entries.len() as f64);
        }
        if self.is_full() {
            self.handled = mem::take(&mut self.entries);
        }
        self.entries.clear();
        self.bytes = 0;
        self.finished.clear();
        let Counts { outcome, skipped, dead_lettered } = mem::take(&mut self.counts);
        setup.group_metrics.applied.inc_by(outcome.applied);
        setup.group_metrics.duplicate.inc_by(outcome.duplicate);
        setup.group_metrics.stale.inc_by(outcome.stale);
        setup.group_metrics.skipped.inc_by(skipped);
        setup.group_metrics.dead_lettered.inc_by(dead_lettered);
    }

    /// Delivers the records that are not finished, in order. After success every record has taken
    /// effect durably; a dead letter counts as an effect. Exceptions are the records of the
    /// partitions that are returned: with [`Split::Failing`] a record that fails blocks its
    /// partition and no other. They are returned after a failure too, for example when the time
    /// limit ends the delivery: otherwise a record that takes all of the time would stop the other
    /// partitions again and again. After a failure some records may have taken effect: the finished
    /// ones are left out of the next attempt, and effects are idempotent.
    pub async fn deliver<H: Handler<Event = E>>(
        &mut self,
        context: DeliveryContext<'_, H>,
    ) -> (Failing, Result<(), Halt>) {
        let Self { entries, finished, counts, .. } = self;
        let group = H::GROUP;
        let span = tracing::error_span!("consume", group, records = entries.len());
        let failing = Failing::new();
        let ahead: Vec<Option<Decoded<E>>> = entries.iter_mut().map(|entry| entry.decoded.take()).collect();
        let messages: Vec<&BorrowedMessage<'c>> = entries.iter().map(|entry| &*entry.message).collect();
        let messages = &messages;
        let mut delivery = BatchDelivery {
            context,
            messages,
            finished,
            counts,
            span,
            split_since: None,
            letters_since: None,
            failing,
        };
        let delivered = delivery.deliver_messages(ahead).await;
        (delivery.failing, delivered)
    }
}

/// The partitions whose next record fails, each with the reason.
pub(super) type Failing = BTreeMap<i32, String>;

fn decode<E: Event>(message: &BorrowedMessage<'_>) -> Decoded<E> {
    Record::decode(message.key(), message, Coordinates::of(message))
}

fn partition_offset(message: &BorrowedMessage<'_>) -> PartitionOffset {
    (message.partition(), message.offset())
}

/// What a delivery needs from the consumer.
pub(super) struct DeliveryContext<'a, H> {
    pub setup: &'a ConsumerSetup<H>,
    pub dead_letters: &'a DeadLetterWriter,
    pub breaker: &'a mut Breaker,
    /// Next offset to handle, per partition.
    pub next_offsets: &'a mut BTreeMap<i32, i64>,
    /// The partitions of which a skipped record was logged.
    pub skips_logged: &'a mut BTreeSet<i32>,
    pub split: Split,
}

/// One delivery of a batch.
struct BatchDelivery<'a, H> {
    context: DeliveryContext<'a, H>,
    messages: &'a [&'a BorrowedMessage<'a>],
    finished: &'a mut BTreeSet<PartitionOffset>,
    counts: &'a mut Counts,
    /// The span of the batch.
    span: Span,
    /// When the delivery began to try fewer records at a time.
    split_since: Option<Instant>,
    /// When the delivery began to write dead letters.
    letters_since: Option<Instant>,
    failing: Failing,
}

impl<H: Handler> BatchDelivery<'_, H> {
    /// `ahead` has what was decoded ahead, for each of the messages.
    async fn deliver_messages(&mut self, ahead: Vec<Option<Decoded<H::Event>>>) -> Result<(), Halt> {
        let messages = self.messages;
        let mut records = Vec::with_capacity(messages.len());
        for (message, decoded) in messages.iter().zip(ahead) {
            let is_finished = self.finished.contains(&partition_offset(message));
            if is_finished || self.failing.contains_key(&message.partition()) {
                continue;
            }
            match decoded.unwrap_or_else(|| decode(message)) {
                Ok(Some(record)) => records.push(record),
                Ok(None) => self.skip(message),
                // The records before this one are delivered first, because the breaker considers
                // records in order.
                Err(error) => {
                    self.deliver(&mut records).await?;
                    records.clear();
                    self.dead_letter(message, error.to_string()).await?;
                }
            }
            // The later records of a partition must not overtake one that fails.
            if self.context.split == Split::Failing {
                self.deliver(&mut records).await?;
                records.clear();
            }
        }
        self.deliver(&mut records).await
    }

    /// Passes the records to the handler. With [`Split::Failing`] there is at most one record, and
    /// its failure blocks only its partition.
    async fn deliver(&mut self, records: &mut [Record<H::Event>]) -> Result<(), Halt> {
        if self.context.split == Split::Failing {
            self.split_since.get_or_insert_with(Instant::now);
        } else {
            self.split_since = None;
        }
        handler::deliver(self, records, self.context.split).await
    }

    /// This release does not know the type of the event. Only the first such record of a partition
    /// is logged, for an operator who wants to know where to read again with a newer release.
    fn skip(&mut self, message: &BorrowedMessage<'_>) {
        self.counts.skipped += 1;
        if self.context.skips_logged.insert(message.partition()) {
            tracing::warn!(
                group = H::GROUP,
                coordinates = %Coordinates::of(message),
                "this release does not know the type of an event. It skips such records and counts them; deploy readers \
                 before writers"
            );
        }
        self.finish_accepted(partition_offset(message));
    }

    /// Writes the record's dead letter before any later record is handled. A later record moves the
    /// position of a handler that stores its own position past this one. After a crash in between,
    /// no process would read this record again.
    ///
    /// A batch may have very many such records, and each costs a letter and a call of the handler for
    /// the records before it. The consumer must poll in between, or the group takes its partitions
    /// away, and it must be able to stop. So after the time limit of a call the rest waits for the
    /// next attempt. Finished records stay finished.
    async fn dead_letter(&mut self, message: &BorrowedMessage<'_>, reason: String) -> Result<(), Halt> {
        let setup = self.context.setup;
        let since = *self.letters_since.get_or_insert_with(Instant::now);
        if setup.stop.is_cancelled() || since.elapsed() > setup.kafka.handle_timeout() {
            return Err(Failure::from(OneByOneTooLong).into());
        }
        if let Some((rejected, of)) = self.context.breaker.too_many() {
            return Err(Halt::Breaker(TooManyRejections { rejected, of, reason }));
        }
        let coordinates = Coordinates::of(message);
        let span = letter_span::<H>(message, &coordinates);
        let letter = DeadLetter { coordinates, reason, attempts: 1, since: None, message: message.detach() };
        let written = self.context.dead_letters.write(&letter).instrument(span.clone()).await;
        written.map_err(Halt::Unwritten)?;
        span.in_scope(|| {
            tracing::error!(group = H::GROUP, coordinates = %letter.coordinates, reason = letter.reason, "record dead-lettered");
        });
        self.counts.dead_lettered += 1;
        self.finish_rejected(partition_offset(message));
        Ok(())
    }

    fn finish_accepted(&mut self, record: PartitionOffset) {
        self.finished.insert(record);
        self.context.breaker.record_accepted();
    }

    fn finish_rejected(&mut self, record: PartitionOffset) {
        self.finished.insert(record);
        self.context.breaker.record_rejected();
    }

    /// Observes the age of each event. The oldest one leads to its trace: with one exemplar a batch
    /// costs hardly more than without.
    fn observe_ages(&self, records: &[Record<H::Event>], spans: &[Span]) {
        let setup = self.context.setup;
        let oldest = records.iter().enumerate().min_by_key(|(_, record)| record.envelope.time).map(|(index, _)| index);
        let now = events::now();
        for (index, record) in records.iter().enumerate() {
            let span = spans.get(index).filter(|_| Some(index) == oldest);
            let exemplar = span.and_then(|span| setup.metrics.exemplars.of(span));
            setup.group_metrics.ages.observe((now - record.envelope.time).as_seconds_f64(), exemplar);
        }
    }

    /// A span in the trace of the record's producer, linked to the span of the batch.
    fn record_span(&self, record: &Record<H::Event>) -> Span {
        let span = tracing::error_span!(
            parent: None,
            "process",
            "otel.name" = format!("process {}", record.envelope.kind),
            "otel.kind" = "consumer",
            messaging.consumer.group.name = H::GROUP,
            messaging.destination.name = record.coordinates.topic,
            event.id = %record.envelope.id,
            event.type = record.envelope.kind,
            trace.id = Empty,
        );
        let origin = TraceContext::of(&record.envelope);
        telemetry::continue_from(&span, &origin);
        if self.context.setup.exports_spans && is_sampled(&record.envelope) {
            describe_place(&span, &record.coordinates);
        }
        telemetry::link(&span, &origin);
        telemetry::link_to(&span, &self.span);
        span
    }
}

impl<H: Handler> Delivery for BatchDelivery<'_, H> {
    type Event = H::Event;
    type Error = Halt;

    /// A single record is handled within its own span, so that what the handler does and publishes
    /// belongs to the record's trace. Several records are handled within the span of the batch.
    /// They have spans of their own only if a collector or the log line of each event needs them:
    /// making the spans costs a large part of the CPU of a handler such as an inbox.
    async fn attempt(&mut self, records: &mut [Record<H::Event>]) -> Result<(), Failure> {
        let setup = self.context.setup;
        let limit = setup.kafka.handle_timeout();
        // Slow records must not keep the consumer from polling or stopping. Finished records stay
        // finished.
        if self.split_since.is_some_and(|since| setup.stop.is_cancelled() || since.elapsed() > limit) {
            return Err(OneByOneTooLong.into());
        }
        let mut next_offsets = self.context.next_offsets.clone();
        for record in &mut *records {
            let next_offset = record.coordinates.offset + 1;
            record.expected_position = next_offsets.insert(record.coordinates.partition, next_offset);
        }
        let is_logged = enabled!(Level::DEBUG);
        let has_spans = records.len() == 1 || setup.exports_spans || is_logged;
        let spans: Vec<Span> = records.iter().filter(|_| has_spans).map(|record| self.record_span(record)).collect();
        let span = if let [single] = spans.as_slice() { single } else { &self.span };
        let called = Instant::now();
        let handled = handler::call(&setup.handler, records, limit).instrument(span.clone()).await;
        setup.group_metrics.handler_duration.observe(called.elapsed().as_secs_f64());
        let outcome = handled.inspect_err(|failure| {
            if setup.exports_spans {
                spans.iter().for_each(|span| span.set_status(Status::error(failure.describe())));
            }
            self.split_since.get_or_insert_with(Instant::now);
        })?;
        *self.context.next_offsets = next_offsets;
        self.counts.outcome += outcome;
        if setup.exports_spans {
            let sampled = records.iter().zip(&spans).filter(|(record, _)| is_sampled(&record.envelope));
            sampled.for_each(|(_, span)| describe_outcome(span, records.len(), outcome));
        }
        self.observe_ages(records, &spans);
        for Record { coordinates, .. } in records.iter() {
            self.finish_accepted((coordinates.partition, coordinates.offset));
        }
        if is_logged {
            log_handled(H::GROUP, records, &spans);
        }
        Ok(())
    }

    async fn reject(&mut self, record: &Record<H::Event>, reason: String) -> Result<(), Halt> {
        let wanted = (record.coordinates.partition, record.coordinates.offset);
        let message = self.messages.iter().find(|message| partition_offset(message) == wanted);
        self.dead_letter(message.expect("the record was decoded from one of these messages"), reason).await
    }

    async fn fail(&mut self, record: &Record<H::Event>, failure: Failure) -> Result<(), Halt> {
        self.failing.insert(record.coordinates.partition, failure.describe());
        Ok(())
    }

    fn is_finished(&self, record: &Record<H::Event>) -> bool {
        self.finished.contains(&(record.coordinates.partition, record.coordinates.offset))
    }
}

/// A span for the dead letter of a record, in the trace of the record's producer. The record may be
/// one that cannot be decoded.
fn letter_span<H: Handler>(message: &BorrowedMessage<'_>, coordinates: &Coordinates) -> Span {
    let span = tracing::error_span!(
        parent: None,
        "dead-letter",
        messaging.consumer.group.name = H::GROUP,
        messaging.destination.name = coordinates.topic,
        trace.id = Empty,
    );
    let header = |name: &str| {
        let found = headers(message).filter_map(Result::ok).find(|header| header.key == name);
        found.and_then(|header| str::from_utf8(header.value?).ok())
    };
    let (traceparent, tracestate) = events::trace_context(header("traceparent"), header("tracestate"));
    let origin =
        TraceContext { traceparent: traceparent.map(str::to_owned), tracestate: tracestate.map(str::to_owned) };
    telemetry::continue_from(&span, &origin);
    describe_place(&span, coordinates);
    span
}

/// Where the record of a span is. Not fields of the span: the log layer would format them.
fn describe_place(span: &Span, coordinates: &Coordinates) {
    span.set_attribute("messaging.destination.partition.id", coordinates.partition.to_string());
    span.set_attribute("messaging.kafka.offset", coordinates.offset);
}

/// What the handler did with the records of a call. It counts them together, so the span of one of
/// several records has the counts of all.
fn describe_outcome(span: &Span, records: usize, Outcome { applied, duplicate, stale }: Outcome) {
    span.set_attribute("messaging.batch.message_count", records as i64);
    for (name, count) in [("records.applied", applied), ("records.duplicate", duplicate), ("records.stale", stale)] {
        if count > 0 {
            span.set_attribute(name, count as i64);
        }
    }
}

/// Whether the trace of a record is exported. The last field of a `traceparent` says so.
fn is_sampled(envelope: &Envelope) -> bool {
    envelope.traceparent.as_ref().is_some_and(|traceparent| traceparent.ends_with('1'))
}

/// Logs each event, in the trace of its record.
fn log_handled<E: Event>(group: &str, records: &[Record<E>], spans: &[Span]) {
    for (record, span) in records.iter().zip(spans) {
        let Record { event, envelope, coordinates, .. } = record;
        tracing::debug!(
            group,
            event.id = %envelope.id,
            event.type = envelope.kind,
            event.version = envelope.version,
            user.id = %event.user(envelope.key),
            correlation.id = envelope.cause.correlation.map(tracing::field::display),
            trace.id = %telemetry::trace_id(span),
            %coordinates,
            "event handled"
        );
    }
}
