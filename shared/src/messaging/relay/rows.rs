//! The rows of the outbox, as the leader reads and deletes them, and their metrics.

use std::time::Duration;

use sqlx::postgres::PgRow;
use sqlx::{AssertSqlSafe, FromRow, PgConnection, Row as _};
use uuid::Uuid;

use super::blocks::{Excluded, Probe};
use crate::events::{Cause, Envelope};
use crate::platform::database::bounded;
use crate::platform::metrics::Metrics;

/// Bytes of payload per round, so that rows of the largest allowed size are read, sent and
/// acknowledged within a round's time-outs. At most two rounds are in memory.
const ROUND_BYTES: i64 = 4 << 20;
/// The number of waiting rows is counted up to this limit: counting a million rows takes as long as
/// publishing them.
const COUNT_LIMIT: i64 = 10_000;
/// How often a relay measures the outbox.
pub const MEASURE_INTERVAL: Duration = Duration::from_secs(2);

/// A row of the outbox.
pub struct Row {
    pub id: i64,
    /// The logical name.
    pub topic: String,
    pub key_hash: i32,
    pub envelope: EnvelopeRow,
    pub payload: Option<Vec<u8>>,
}

pub struct EnvelopeRow {
    event_id: Uuid,
    pub aggregateid: Uuid,
    version: i64,
    r#type: String,
    cause: Cause,
    traceparent: Option<String>,
    tracestate: Option<String>,
    occurred_at: time::OffsetDateTime,
}

/// The columns of a [`Row`].
const COLUMNS: &str = "id, topic, key_hash, payload, event_id, aggregateid, version, type, causationid, correlationid, \
                       actor, traceparent, tracestate, occurred_at";

/// Decodes [`COLUMNS`] by their places: a lookup by name would take longer than the decoding.
impl FromRow<'_, PgRow> for Row {
    fn from_row(row: &PgRow) -> sqlx::Result<Self> {
        Ok(Self {
            id: row.try_get(0)?,
            topic: row.try_get(1)?,
            key_hash: row.try_get(2)?,
            payload: row.try_get(3)?,
            envelope: EnvelopeRow {
                event_id: row.try_get(4)?,
                aggregateid: row.try_get(5)?,
                version: row.try_get(6)?,
                r#type: row.try_get(7)?,
                cause: Cause { causation: row.try_get(8)?, correlation: row.try_get(9)?, actor: row.try_get(10)? },
                traceparent: row.try_get(11)?,
                tracestate: row.try_get(12)?,
                occurred_at: row.try_get(13)?,
            },
        })
    }
}

impl EnvelopeRow {
    pub fn into_envelope(self, source: &str) -> Envelope {
        Envelope {
            id: self.event_id,
            kind: self.r#type,
            source: source.to_owned(),
            key: self.aggregateid,
            version: self.version,
            time: self.occurred_at,
            cause: self.cause,
            traceparent: self.traceparent,
            tracestate: self.tracestate,
        }
    }
}

/// The oldest rows.
pub struct Batch {
    pub rows: Vec<Row>,
    /// Whether a limit ended the batch, so that more rows may wait.
    pub is_full: bool,
}

impl Batch {
    fn new(rows: Vec<Row>, limit: i64) -> Self {
        let bytes: usize = rows.iter().filter_map(|row| row.payload.as_ref()).map(Vec::len).sum();
        let is_full = rows.len() as i64 >= limit || bytes as i64 >= ROUND_BYTES;
        Self { rows, is_full }
    }
}

/// The oldest rows that are neither excluded nor `in_flight`, at most `limit` and within
/// [`ROUND_BYTES`], but at least one. No row has a lower id than `first`.
///
/// Ordered by id and without a cursor: a row whose transaction commits late has a low id and is
/// read in the next round. `first` is no cursor: no such row can have a lower id. Versions of one
/// key are always in order, because the row lock on the aggregate orders their transactions. So a
/// row that becomes visible later has a higher id than all rows of its key that are in flight.
pub async fn read(
    db: &mut PgConnection,
    excluded: &Excluded,
    first: i64,
    in_flight: &[i64],
    limit: i64,
) -> sqlx::Result<Batch> {
    let rows = if excluded.is_empty() {
        oldest(db, first, in_flight, limit).await
    } else {
        oldest_not_excluded(db, excluded, in_flight, limit).await
    };
    Ok(Batch::new(rows?, limit))
}

/// Reads the primary key from `first` on. Rows in flight are looked up in a hash table.
async fn oldest(db: &mut PgConnection, first: i64, in_flight: &[i64], limit: i64) -> sqlx::Result<Vec<Row>> {
    let query = format!(
        "select {COLUMNS}
         from (select *, sum(octet_length(payload)) over (order by id rows between unbounded preceding and 1 preceding)
                   as bytes_before
               from outbox where id >= $4 and id not in (select unnest($1::bigint[]))
               order by id limit $2) as measured
         where coalesce(bytes_before, 0) < $3 order by id"
    );
    sqlx::query_as(AssertSqlSafe(query)).bind(in_flight).bind(limit).bind(ROUND_BYTES).bind(first).fetch_all(db).await
}

/// Each topic is read by its own index range: the recursive part lists the topics with one index
/// lookup each. So a million rows of an excluded topic cost one lookup. Rows of excluded keys and
/// partitions are read and left out, so a read takes time in proportion to their number.
///
/// The topic is compared by `between`. With `=` Postgres would know that the order by topic and id
/// is the order by id, and could read the primary key past all rows of other topics.
async fn oldest_not_excluded(
    db: &mut PgConnection,
    excluded: &Excluded,
    in_flight: &[i64],
    limit: i64,
) -> sqlx::Result<Vec<Row>> {
    let mut topics = vec![];
    let mut counts = vec![];
    let mut partitions = vec![];
    for (topic, count, partition) in &excluded.partitions {
        topics.push(topic.clone());
        counts.push(*count);
        partitions.push(*partition);
    }
    let query = format!(
        "with recursive topics (topic) as (
             (select topic from outbox order by topic limit 1)
             union all
             select (select topic from outbox where topic > topics.topic order by topic limit 1)
             from topics where topics.topic is not null),
         oldest as (
             select rows.* from topics cross join lateral (
                 select * from outbox
                 where outbox.topic between topics.topic and topics.topic and aggregateid <> all ($2)
                     and not exists (
                         select from unnest($3::text[], $4::int[], $5::int[]) excluded (topic, partitions, partition)
                         where excluded.topic = outbox.topic
                             and outbox.key_hash % excluded.partitions = excluded.partition)
                     and id not in (select unnest($8::bigint[]))
                 order by topic, id limit $6) as rows
             where topics.topic is not null and topics.topic <> all ($1)
             order by id limit $6)
         select {COLUMNS}
         from (select *, sum(octet_length(payload)) over (order by id rows between unbounded preceding and 1 preceding)
                   as bytes_before
               from oldest) as measured
         where coalesce(bytes_before, 0) < $7 order by id"
    );
    sqlx::query_as(AssertSqlSafe(query))
        .bind(&excluded.topics)
        .bind(&excluded.keys)
        .bind(topics)
        .bind(counts)
        .bind(partitions)
        .bind(limit)
        .bind(ROUND_BYTES)
        .bind(in_flight)
        .fetch_all(db)
        .await
}

/// The row that a probe tries.
pub async fn read_one(db: &mut PgConnection, probe: &Probe, excluded: &Excluded) -> sqlx::Result<Option<Row>> {
    let query = match probe {
        Probe::Topic(topic) => {
            let of_topic = excluded.partitions.iter().filter(|(of, ..)| of == topic);
            let (counts, partitions): (Vec<i32>, Vec<i32>) =
                of_topic.map(|(_, count, number)| (*count, *number)).unzip();
            let oldest = format!(
                "select {COLUMNS} from outbox
                 where topic between $1 and $1 and aggregateid <> all ($2)
                     and not exists (select from unnest($3::int[], $4::int[]) excluded (partitions, partition)
                                     where key_hash % excluded.partitions = excluded.partition)
                 order by topic, id limit 1"
            );
            let oldest = sqlx::query_as(AssertSqlSafe(oldest)).bind(topic.clone());
            oldest.bind(excluded.keys.clone()).bind(counts).bind(partitions)
        }
        Probe::Key(_, row) => {
            sqlx::query_as(AssertSqlSafe(format!("select {COLUMNS} from outbox where id = $1"))).bind(*row)
        }
    };
    query.fetch_optional(db).await
}

pub async fn delete(db: &mut PgConnection, ids: &[i64]) -> sqlx::Result<()> {
    sqlx::query("delete from outbox where id = any ($1)").bind(ids).execute(db).await.map(|_| ())
}

/// The state of the outbox, for its metrics.
#[derive(sqlx::FromRow)]
struct Size {
    /// Rows that wait, counted up to a limit.
    rows: i64,
    /// Seconds.
    oldest_age: i64,
    /// Deleted rows that are not vacuumed yet. The relay scans over them, so it slows down while an
    /// open snapshot (an idle transaction, a dump) keeps them alive.
    dead_rows: i64,
}

/// Measures the outbox for its metrics. Every replica does, so that the age grows also if the
/// leader hangs. Alert on the oldest age: it grows while Kafka is down.
pub async fn report_size(db: &mut PgConnection, metrics: &Metrics) {
    match bounded(measure(db)).await {
        Ok(size) => {
            metrics.outbox_rows.set(size.rows);
            metrics.outbox_oldest_age.set(size.oldest_age);
            metrics.outbox_dead_rows.set(size.dead_rows);
        }
        Err(error) => tracing::debug!(%error, "cannot measure the outbox; will retry"),
    }
}

/// Three index lookups and a bounded count.
async fn measure(db: &mut PgConnection) -> sqlx::Result<Size> {
    sqlx::query_as(
        "select (select count(*) from (select from outbox limit $1) waiting) as rows,
                coalesce((select extract(epoch from now() - occurred_at)::bigint from outbox order by id limit 1), 0)
                    as oldest_age,
                coalesce(pg_stat_get_dead_tuples('outbox'::regclass), 0) as dead_rows",
    )
    .bind(COUNT_LIMIT)
    .fetch_one(db)
    .await
}
