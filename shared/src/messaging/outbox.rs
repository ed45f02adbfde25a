//! The outbox: a state change and its events are one transaction, so neither exists without the
//! other. The [relay](super::relay) publishes the rows to Kafka and deletes them.

use sqlx::{PgConnection, PgPool};
use time::OffsetDateTime;
use uuid::Uuid;

use crate::events::{self, Cause, Event, Topic};
use crate::platform::database::bounded;
use crate::platform::telemetry::{self, TraceContext};

/// An event, before the change that it is about is written.
#[derive(Clone)]
pub struct Draft {
    event_id: Uuid,
    topic: Topic,
    key: Uuid,
    kind: &'static str,
    payload: Option<Vec<u8>>,
    cause: Cause,
    trace: TraceContext,
    occurred_at: OffsetDateTime,
}

impl Draft {
    /// `event` about the aggregate `key`. It happens now, and belongs to the current trace. `cause`
    /// is new for a command; for a handler it is the event that it handles.
    pub fn new<E: Event>(cause: Cause, key: Uuid, event: &E) -> Self {
        let (kind, payload) = event.encode();
        let trace = telemetry::current();
        let (event_id, occurred_at) = (events::mint_id(), events::now());
        Self { event_id, topic: E::TOPIC, key, kind, payload, cause, trace, occurred_at }
    }

    /// The event of a change that gives the aggregate this version. It comes from the row that the
    /// same transaction changed.
    pub fn at(self, version: i64) -> Entry {
        Entry { draft: self, version }
    }
}

/// An event that is about to be written to the outbox.
pub struct Entry {
    draft: Draft,
    version: i64,
}

impl Entry {
    /// All copies of the event have this id.
    pub fn event_id(&self) -> Uuid {
        self.draft.event_id
    }
}

/// Writes the events to the outbox, within the caller's transaction, in one statement. The relay
/// publishes events of one key in the order in which they are here. Call
/// [`Wake::notify`](super::Wake::notify) after the commit, not before it: the relay could not see
/// the rows yet.
///
/// Crash before the commit: neither the change nor the events exist. Crash after it: the relay of
/// any replica publishes the rows.
///
/// # Errors
/// The insert failed, and with it the caller's transaction. SQLSTATE 23514: an event is larger than
/// Kafka accepts.
pub async fn publish_all(tx: &mut PgConnection, entries: impl IntoIterator<Item = Entry>) -> sqlx::Result<()> {
    let mut columns = Columns::default();
    columns.extend(entries);
    // The rows are numbered in the order of the arrays. Postgres needs no sort for that.
    sqlx::query(
        "insert into outbox
             (event_id, topic, aggregatetype, aggregateid, key_hash, version, type, payload, causationid, correlationid,
              actor, traceparent, tracestate, occurred_at)
         select event_id, topic, aggregatetype, aggregateid, key_hash, version, type, payload, causationid, correlationid,
             actor, traceparent, tracestate, occurred_at
         from unnest($1::uuid[], $2::text[], $3::text[], $4::uuid[], $5::int[], $6::bigint[], $7::text[], $8::bytea[],
                     $9::uuid[], $10::uuid[], $11::uuid[], $12::text[], $13::text[], $14::timestamptz[])
             with ordinality
             as entry (event_id, topic, aggregatetype, aggregateid, key_hash, version, type, payload, causationid,
                       correlationid, actor, traceparent, tracestate, occurred_at, place)
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
    .bind(columns.causations)
    .bind(columns.correlations)
    .bind(columns.actors)
    .bind(columns.traceparents)
    .bind(columns.tracestates)
    .bind(columns.times)
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
    causations: Vec<Option<Uuid>>,
    correlations: Vec<Option<Uuid>>,
    actors: Vec<Option<Uuid>>,
    traceparents: Vec<Option<String>>,
    tracestates: Vec<Option<String>>,
    times: Vec<OffsetDateTime>,
}

impl Extend<Entry> for Columns {
    fn extend<I: IntoIterator<Item = Entry>>(&mut self, entries: I) {
        for Entry { draft, version } in entries {
            self.event_ids.push(draft.event_id);
            self.topics.push(draft.topic.name);
            self.aggregates.push(draft.topic.aggregate);
            self.keys.push(draft.key);
            self.key_hashes.push(events::key_hash(draft.key));
            self.versions.push(version);
            self.kinds.push(draft.kind);
            self.payloads.push(draft.payload);
            self.causations.push(draft.cause.causation);
            self.correlations.push(draft.cause.correlation);
            self.actors.push(draft.cause.actor);
            self.traceparents.push(draft.trace.traceparent);
            self.tracestates.push(draft.trace.tracestate);
            self.times.push(draft.occurred_at);
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
    let entry = Draft::new(cause, key, event).at(version);
    let event_id = entry.event_id();
    publish_all(tx, [entry]).await?;
    Ok(event_id)
}

/// How many rows of this event's topic wait to be published, counted up to `limit`. Bulk writers
/// use this to throttle themselves. The rows of other topics do not count: Kafka may refuse them
/// for any time, and the relay publishes the others meanwhile.
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
