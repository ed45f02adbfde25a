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

/// An event that is about to be written to the outbox.
pub struct Entry {
    /// Created with the entry. All copies of the event have the same id.
    pub event_id: Uuid,
    topic: &'static str,
    aggregate: &'static str,
    key: Uuid,
    version: i64,
    kind: &'static str,
    payload: Option<Vec<u8>>,
}

impl Entry {
    /// `event` is about the aggregate `key`. `version` is the aggregate's version after the command;
    /// it comes from the row that the same transaction changed.
    pub fn new<E: Event>(key: Uuid, version: i64, event: &E) -> Self {
        let (kind, payload) = event.encode();
        let event_id = events::mint_id();
        Self { event_id, topic: E::TOPIC.name, aggregate: E::TOPIC.aggregate, key, version, kind, payload }
    }
}

/// Writes the events to the outbox, within the caller's transaction, in one statement. The relay
/// publishes events of one key in the order in which they are here. `cause` is new for a command;
/// for a handler it is the event that it handles. Call [`Wake::notify`](super::Wake::notify) after
/// the commit, not before it: the relay could not see the rows yet.
///
/// Crash before the commit: neither the change nor the events exist. Crash after it: the relay of
/// any replica publishes the rows.
///
/// # Errors
/// The insert failed, and with it the caller's transaction. SQLSTATE 23514: an event is larger than
/// Kafka accepts.
pub async fn publish_all(
    tx: &mut PgConnection,
    cause: Cause,
    entries: impl IntoIterator<Item = Entry>,
) -> sqlx::Result<()> {
    let mut columns = Columns::default();
    columns.extend(entries);
    let trace = telemetry::current();
    // The rows are numbered in the order of the arrays. Postgres needs no sort for that.
    sqlx::query(
        "insert into outbox
             (event_id, topic, aggregatetype, aggregateid, key_hash, version, type, payload, causationid, correlationid,
              actor, traceparent, tracestate, occurred_at)
         select event_id, topic, aggregatetype, aggregateid, key_hash, version, type, payload, $9, $10, $11, $12, $13, $14
         from unnest($1::uuid[], $2::text[], $3::text[], $4::uuid[], $5::int[], $6::bigint[], $7::text[], $8::bytea[])
             with ordinality
             as entry (event_id, topic, aggregatetype, aggregateid, key_hash, version, type, payload, place)
         order by place",
    )
    .bind(columns.event_ids)
    .bind(columns.topics)
    .bind(columns.aggregates)
    .bind(columns.keys)
    .bind(columns.key_hashes)
    .bind(columns.versions)
    .bind(columns.kinds)
    .bind(columns.payloads)
    .bind(cause.causation)
    .bind(cause.correlation)
    .bind(cause.actor)
    .bind(trace.traceparent)
    .bind(trace.tracestate)
    .bind(events::now())
    .execute(tx)
    .await?;
    Ok(())
}

/// Entries as the columns of a table, which is how Postgres takes many rows in one statement.
#[derive(Default)]
struct Columns {
    event_ids: Vec<Uuid>,
    topics: Vec<&'static str>,
    aggregates: Vec<&'static str>,
    keys: Vec<Uuid>,
    key_hashes: Vec<i32>,
    versions: Vec<i64>,
    kinds: Vec<&'static str>,
    payloads: Vec<Option<Vec<u8>>>,
}

impl Extend<Entry> for Columns {
    fn extend<I: IntoIterator<Item = Entry>>(&mut self, entries: I) {
        for entry in entries {
            self.event_ids.push(entry.event_id);
            self.topics.push(entry.topic);
            self.aggregates.push(entry.aggregate);
            self.keys.push(entry.key);
            self.key_hashes.push(events::key_hash(entry.key));
            self.versions.push(entry.version);
            self.kinds.push(entry.kind);
            self.payloads.push(entry.payload);
        }
    }
}

/// Writes one event to the outbox, as [`publish_all`] does, and returns its id.
///
/// # Errors
/// As [`publish_all`].
pub async fn publish<E: Event>(
    tx: &mut PgConnection,
    cause: Cause,
    key: Uuid,
    version: i64,
    event: &E,
) -> sqlx::Result<Uuid> {
    let entry = Entry::new(key, version, event);
    let event_id = entry.event_id;
    publish_all(tx, cause, [entry]).await?;
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
