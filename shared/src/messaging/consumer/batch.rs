//! What is done with a batch: decode, handle, and where a record cannot be handled set it aside as a dead letter.

use rdkafka::message::{Message, OwnedMessage};
use tracing::{Instrument, Span, field::Empty};

use super::Running;
use crate::events;
use crate::messaging::dead_letters::DeadLetter;
use crate::messaging::{Failure, Handler, Outcome, Record, Source, handler};
use crate::service::metrics::{Consumed, Group};
use crate::service::telemetry::{self, TraceContext};

/// What became of a batch's records. It is counted when the whole batch is done, so that a retried batch counts once.
#[derive(Default)]
struct Tally {
    outcome: Outcome,
    skipped: u64,
    dead_lettered: u64,
}

/// Handles what the consumer has in hand. On success every record of it has had its effect, durably; a dead letter counts as
/// an effect. On failure any part may have had its effect, and the batch is handled again: effects are idempotent.
pub(super) fn handle<H: Handler>(consumer: &mut Running<H>) -> Result<(), Failure> {
    let mut tally = Tally::default();
    let mut records = Vec::with_capacity(consumer.batch.len());
    for message in &consumer.batch {
        match Record::decode(message.key(), message, Source::of(message)) {
            Ok(Some(record)) => records.push(record),
            Ok(None) => tally.skipped += 1,
            Err(error) => set_aside(consumer, message, error.to_string(), &mut tally)?,
        }
    }
    let batch_span = tracing::error_span!("consume", group = consumer.setup.group, records = consumer.batch.len());
    match run(consumer, &mut records, &batch_span) {
        Ok(outcome) => tally.outcome += outcome,
        // Records are isolated by rerunning the batch one by one: a SQL error has undone the whole transaction.
        Err(failure) if failure.rejection().is_some() => {
            isolate(consumer, records, &batch_span, &mut tally)?;
        }
        Err(failure) => return Err(failure),
    }
    count(consumer, &tally);
    Ok(())
}

fn isolate<H: Handler>(
    consumer: &mut Running<H>,
    records: Vec<Record<H::Event>>,
    batch_span: &Span,
    tally: &mut Tally,
) -> Result<(), Failure> {
    for record in records {
        let mut alone = [record];
        match run(consumer, &mut alone, batch_span) {
            Ok(outcome) => tally.outcome += outcome,
            Err(failure) => {
                let Some(reason) = failure.rejection() else { return Err(failure) };
                let [Record { source, .. }] = alone;
                let message = consumer.batch.iter().find(|message| Source::of(message) == source);
                let message = message.expect("the record was decoded from the batch in hand");
                set_aside(consumer, message, reason, tally)?;
            }
        }
    }
    Ok(())
}

/// Writes the record's dead letter, before any record behind it is handled: a handler that keeps its own position moves that
/// past the record, so after a crash in between nobody would read the record again.
fn set_aside<H: Handler>(
    consumer: &Running<H>,
    message: &OwnedMessage,
    reason: String,
    tally: &mut Tally,
) -> Result<(), Failure> {
    let letter = DeadLetter { source: Source::of(message), reason, attempts: 1, since: None, message: message.clone() };
    tracing::error!(source = %letter.source, reason = letter.reason, "dead letter");
    consumer.runtime.block_on(consumer.dead_letters.write(&letter))?;
    tally.dead_lettered += 1;
    Ok(())
}

/// Calls the handler, with a span per record in its producer's trace, linked to the batch's. A single record is handled within
/// its own span, so that what the handler does and publishes belongs to the record's trace.
fn run<H: Handler>(
    consumer: &mut Running<H>,
    records: &mut [Record<H::Event>],
    batch_span: &Span,
) -> Result<Outcome, Failure> {
    if records.is_empty() {
        return Ok(Outcome::default());
    }
    let mut reached = consumer.reached.clone();
    for record in &mut *records {
        record.after = reached.insert(record.source.partition, record.source.offset + 1);
    }
    let spans: Vec<Span> = records.iter().map(|record| span(consumer, record, batch_span)).collect();
    let span = if let [single] = spans.as_slice() { single } else { batch_span };
    let handled = handler::call(&consumer.setup.handler, records).instrument(span.clone());
    let outcome = consumer.runtime.block_on(handled)?;
    consumer.reached = reached;
    let group = Group { group: consumer.setup.group.clone() };
    for (record, span) in records.iter().zip(&spans) {
        span.in_scope(|| tracing::debug!("handled"));
        let age = (events::now() - record.envelope.time).as_seconds_f64();
        consumer.setup.metrics.event_age.get_or_create(&group).observe(age.max(0.0));
    }
    Ok(outcome)
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

fn count<H: Handler>(consumer: &Running<H>, tally: &Tally) {
    let outcomes = [
        ("applied", tally.outcome.applied),
        ("duplicate", tally.outcome.duplicate),
        ("stale", tally.outcome.stale),
        ("skipped", tally.skipped),
        ("dead_lettered", tally.dead_lettered),
    ];
    for (outcome, records) in outcomes {
        let label = Consumed { group: consumer.setup.group.clone(), outcome };
        consumer.setup.metrics.events_consumed.get_or_create(&label).inc_by(records);
    }
}
