//! What is done with a batch: decode, handle, and where a record cannot be handled set it aside as a dead letter.

use std::collections::BTreeSet;
use std::time::Instant;

use anyhow::anyhow;
use rdkafka::message::{Message, OwnedMessage};
use tracing::{Instrument, Span, field::Empty};

use super::Running;
use super::pause::Halt;
use crate::events;
use crate::messaging::dead_letters::DeadLetter;
use crate::messaging::{Handler, Outcome, Record, Source, handler};
use crate::service::metrics::{Consumed, Group};
use crate::service::telemetry::{self, TraceContext};

/// The records of the batch in hand that have had their effect, and what became of them. It stays while the batch is put off: no
/// record is handled, set aside or counted again because another one has to wait.
#[derive(Default)]
pub(super) struct Done {
    /// Partition and offset.
    records: BTreeSet<(i32, i64)>,
    outcome: Outcome,
    skipped: u64,
    dead_lettered: u64,
}

impl Done {
    /// Records that were dropped from a batch and turn out to have had their effect.
    pub fn found_handled(&mut self, records: u64) {
        self.outcome.duplicate += records;
    }
}

/// Handles what the consumer has in hand, in its order. On success every record of it has had its effect, durably; a dead letter
/// counts as an effect. On failure some may have had it: what is [`Done`] is left alone at the next try, and effects are
/// idempotent.
pub(super) fn handle<H: Handler>(consumer: &mut Running<H>) -> Result<(), Halt> {
    let messages = std::mem::take(&mut consumer.batch);
    let result = handle_all(consumer, &messages);
    consumer.batch = messages;
    result
}

fn handle_all<H: Handler>(consumer: &mut Running<H>, messages: &[OwnedMessage]) -> Result<(), Halt> {
    let batch_span = tracing::error_span!("consume", group = consumer.setup.group, records = messages.len());
    let mut records = Vec::with_capacity(messages.len());
    for message in messages {
        if consumer.done.records.contains(&place(message)) {
            continue;
        }
        match Record::decode(message.key(), message, Source::of(message)) {
            Ok(Some(record)) => records.push(record),
            Ok(None) => {
                consumer.done.skipped += 1;
                finished(consumer, place(message), false);
            }
            // The ones before it first: the breaker judges by what came last.
            Err(error) => {
                handle_records(consumer, std::mem::take(&mut records), messages, &batch_span)?;
                set_aside(consumer, message, error.to_string())?;
            }
        }
    }
    handle_records(consumer, records, messages, &batch_span)
}

/// All at once; and if one of them can never work, one by one: a SQL error has undone the whole transaction. The same where it took
/// too long for the second time: then it is not the moment but the number of records, perhaps, and together they would never be
/// done.
fn handle_records<H: Handler>(
    consumer: &mut Running<H>,
    mut records: Vec<Record<H::Event>>,
    messages: &[OwnedMessage],
    batch_span: &Span,
) -> Result<(), Halt> {
    match run(consumer, &mut records, batch_span) {
        Err(Halt::Failure(failure)) if failure.rejection().is_some() => {}
        Err(Halt::Failure(failure)) if failure.took_too_long() && consumer.pause.is_some() => {}
        result => return result,
    }
    let began = Instant::now();
    for record in records {
        // Slow records must not keep us from polling, nor from stopping. What is done stays done.
        if consumer.setup.stop.is_cancelled() || began.elapsed() > consumer.setup.kafka.handle_timeout() {
            return Err(anyhow!("the rest of the batch comes later: its records are slow").into());
        }
        let mut alone = [record];
        match run(consumer, &mut alone, batch_span) {
            Err(Halt::Failure(failure)) if let Some(reason) = failure.rejection() => {
                let [Record { source, .. }] = alone;
                let message = messages.iter().find(|message| place(message) == (source.partition, source.offset));
                set_aside(consumer, message.expect("the record was decoded from one of them"), reason)?;
            }
            result => result?,
        }
    }
    Ok(())
}

/// Writes the record's dead letter, before any record behind it is handled: a handler that keeps its own position moves that
/// past the record, so after a crash in between nobody would read the record again.
fn set_aside<H: Handler>(consumer: &mut Running<H>, message: &OwnedMessage, reason: String) -> Result<(), Halt> {
    if let Some((rejected, of)) = consumer.breaker.too_many() {
        return Err(Halt::Breaker { rejected, of, reason });
    }
    let letter = DeadLetter { source: Source::of(message), reason, attempts: 1, since: None, message: message.clone() };
    consumer.runtime.block_on(consumer.dead_letters.write(&letter)).map_err(Halt::Unwritten)?;
    tracing::error!(source = %letter.source, reason = letter.reason, "dead letter");
    consumer.done.dead_lettered += 1;
    finished(consumer, place(message), true);
    Ok(())
}

fn finished<H: Handler>(consumer: &mut Running<H>, place: (i32, i64), rejected: bool) {
    consumer.done.records.insert(place);
    consumer.breaker.record(rejected);
}

fn place(message: &OwnedMessage) -> (i32, i64) {
    (message.partition(), message.offset())
}

/// Calls the handler, with a span per record in its producer's trace, linked to the batch's. A single record is handled within
/// its own span, so that what the handler does and publishes belongs to the record's trace.
fn run<H: Handler>(consumer: &mut Running<H>, records: &mut [Record<H::Event>], batch_span: &Span) -> Result<(), Halt> {
    if records.is_empty() {
        return Ok(());
    }
    let mut reached = consumer.reached.clone();
    for record in &mut *records {
        record.after = reached.insert(record.source.partition, record.source.offset + 1);
    }
    let spans: Vec<Span> = records.iter().map(|record| span(consumer, record, batch_span)).collect();
    let span = if let [single] = spans.as_slice() { single } else { batch_span };
    let limit = consumer.setup.kafka.handle_timeout();
    let handled = handler::call(&consumer.setup.handler, records, limit).instrument(span.clone());
    let outcome = consumer.runtime.block_on(handled)?;
    consumer.reached = reached;
    consumer.done.outcome += outcome;
    let group = Group { group: consumer.setup.group.clone() };
    for (record, span) in records.iter().zip(&spans) {
        span.in_scope(|| tracing::debug!("handled"));
        let age = (events::now() - record.envelope.time).as_seconds_f64();
        consumer.setup.metrics.event_age.get_or_create(&group).observe(age.max(0.0));
        finished(consumer, (record.source.partition, record.source.offset), false);
    }
    Ok(())
}

fn span<H: Handler>(consumer: &Running<H>, record: &Record<H::Event>, batch_span: &Span) -> Span {
    let span = tracing::error_span!(
        parent: None,
        "process",
        "otel.name" = format!("process {}", record.envelope.kind),
        "otel.kind" = "consumer",
        messaging.consumer.group.name = consumer.setup.group,
        messaging.destination.name = record.source.topic,
        event.id = %record.envelope.id,
        event.type = record.envelope.kind,
        trace.id = Empty,
    );
    let origin = TraceContext::of(&record.envelope);
    telemetry::continue_from(&span, &origin);
    telemetry::link(&span, &origin);
    telemetry::link_to(&span, batch_span);
    span
}

/// The handler stands elsewhere, so the batch is read again from there. What is done is counted now; what is not is remembered,
/// for where the handler stands behind it, it has had its effect and will not come again.
pub(super) fn drop_unfinished<H: Handler>(consumer: &mut Running<H>) {
    let dropped = consumer.batch.iter().map(place).filter(|place| !consumer.done.records.contains(place));
    consumer.dropped.extend(dropped);
    consumer.batch.clear();
    count(consumer);
}

/// Counts what became of the batch, once its offsets are stored: each record once, however often it was put off.
pub(super) fn count<H: Handler>(consumer: &mut Running<H>) {
    let done = std::mem::take(&mut consumer.done);
    let outcomes = [
        ("applied", done.outcome.applied),
        ("duplicate", done.outcome.duplicate),
        ("stale", done.outcome.stale),
        ("skipped", done.skipped),
        ("dead_lettered", done.dead_lettered),
    ];
    for (outcome, records) in outcomes {
        let label = Consumed { group: consumer.setup.group.clone(), outcome };
        consumer.setup.metrics.events_consumed.get_or_create(&label).inc_by(records);
    }
}
