//! The outbox: a state change and its events are one transaction, so neither exists without the
//! other. The [relay](super::relay) publishes the rows to Kafka and deletes them.

use sqlx::{PgConnection, PgPool};
use time::OffsetDateTime;
use uuid::Uuid;

use crate::events::{self, Cause, Event, Topic};
use crate::platform::database::bounded;
use crate::platform::telemetry::{self, TraceContext};

/// An event that is not written to the outbox yet.
#[derive(Clone)]
pub struct Draft {
    id: Uuid,
    topic: Topic,
    key: Uuid,
    kind: &'static str,
    payload: Option<Vec<u8>>,
    cause: Cause,
    trace: TraceContext,
    occurred_at: OffsetDateTime,
}

impl Draft {
    /// `event` about the aggregate `key`. It happened now, and belongs to the current trace.
    pub fn new<E: Event>(cause: Cause, key: Uuid, event: &E) -> Self {
        let (kind, payload) = event.encode();
        let trace = telemetry::current();
        Self { id: events::mint_id(), topic: E::TOPIC, key, kind, payload, cause, trace, occurred_at: events::now() }
    }
}

/// Writes `event` about the aggregate `key` to the outbox, within the caller's transaction, and
/// returns the event's id. `cause` is new for a command; for a handler it is the event that it
/// handles. `version` is the aggregate's version after this command; it comes from the row that the
/// same transaction changed. Call [`Wake::notify`](super::Wake::notify) after the commit, not
/// before it: the relay could not see the row yet.
///
/// Crash before the commit: neither the change nor the event exists. Crash after it: the relay of
/// any replica publishes the row.
///
/// # Errors
/// The insert failed, and with it the caller's transaction. SQLSTATE 23514: the event is larger
/// than Kafka accepts.
pub async fn publish<E: Event>(
    tx: &mut PgConnection,
    cause: Cause,
    key: Uuid,
    version: i64,
    event: &E,
) -> sqlx::Result<Uuid> {
    let event_id = events::mint_id();
    let (kind, payload) = event.encode();
    let trace = telemetry::current();
    sqlx::query(
        "insert into outbox
             (event_id, topic, aggregatetype, aggregateid, key_hash, version, type, payload, causationid, correlationid,
              actor, traceparent, tracestate, occurred_at)
         values ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11, $12, $13, $14)",
    )
    .bind(event_id)
    .bind(E::TOPIC.name)
    .bind(E::TOPIC.aggregate)
    .bind(key)
    .bind(events::key_hash(key))
    .bind(version)
    .bind(kind)
    .bind(payload)
    .bind(cause.causation)
    .bind(cause.correlation)
    .bind(cause.actor)
    .bind(trace.traceparent)
    .bind(trace.tracestate)
    .bind(events::now())
    .execute(tx)
    .await?;
    Ok(event_id)
}

/// As [`publish`], for several events, each with the version of its aggregate, in one statement.
///
/// # Errors
/// As [`publish`].
pub async fn publish_all(tx: &mut PgConnection, events: &[(&Draft, i64)]) -> sqlx::Result<()> {
    let drafts = || events.iter().map(|(draft, _)| draft);
    sqlx::query(
        "insert into outbox
             (event_id, topic, aggregatetype, aggregateid, key_hash, version, type, payload, causationid, correlationid,
              actor, traceparent, tracestate, occurred_at)
         select * from unnest($1::uuid[], $2::text[], $3::text[], $4::uuid[], $5::int[], $6::bigint[], $7::text[],
             $8::bytea[], $9::uuid[], $10::uuid[], $11::uuid[], $12::text[], $13::text[], $14::timestamptz[])",
    )
    .bind(drafts().map(|draft| draft.id).collect::<Vec<_>>())
    .bind(drafts().map(|draft| draft.topic.name).collect::<Vec<_>>())
    .bind(drafts().map(|draft| draft.topic.aggregate).collect::<Vec<_>>())
    .bind(drafts().map(|draft| draft.key).collect::<Vec<_>>())
    .bind(drafts().map(|draft| events::key_hash(draft.key)).collect::<Vec<_>>())
    .bind(events.iter().map(|(_, version)| *version).collect::<Vec<_>>())
    .bind(drafts().map(|draft| draft.kind).collect::<Vec<_>>())
    .bind(drafts().map(|draft| draft.payload.as_deref()).collect::<Vec<_>>())
    .bind(drafts().map(|draft| draft.cause.causation).collect::<Vec<_>>())
    .bind(drafts().map(|draft| draft.cause.correlation).collect::<Vec<_>>())
    .bind(drafts().map(|draft| draft.cause.actor).collect::<Vec<_>>())
    .bind(drafts().map(|draft| draft.trace.traceparent.as_deref()).collect::<Vec<_>>())
    .bind(drafts().map(|draft| draft.trace.tracestate.as_deref()).collect::<Vec<_>>())
    .bind(drafts().map(|draft| draft.occurred_at).collect::<Vec<_>>())
    .execute(tx)
    .await
    .map(drop)
}

/// How many rows of this event's topic wait to be published, counted up to `limit`. Bulk writers use
/// this to throttle themselves. The rows of other topics do not count: Kafka may refuse them for any
/// time, and the relay publishes the others meanwhile.
///
/// The topic is compared by `between`, as the relay does it: with `=` Postgres could read the whole
/// table instead of the index range.
///
/// # Errors
/// The database does not answer.
pub async fn waiting<E: Event>(db: &PgPool, limit: i64) -> sqlx::Result<i64> {
    let rows = sqlx::query_scalar(
        "select count(*) from (
             select from outbox where topic between $2 and $2 order by topic, id limit $1) waiting",
    );
    bounded(rows.bind(limit).bind(E::TOPIC.name).fetch_one(db)).await
}
