//! The rows of the outbox, as the leader reads and deletes them, and their metrics.

use std::time::Duration;

use sqlx::{AssertSqlSafe, PgConnection};
use uuid::Uuid;

use super::blocks::{Excluded, Probe};
use crate::events::{Cause, Envelope};
use crate::platform::database::bounded;
use crate::platform::metrics::Metrics;

/// Bytes per round, so that rows of the largest allowed size are read, sent and acknowledged within
/// a round's time-outs.
const ROUND_BYTES: i64 = 4 << 20;
/// The number of waiting rows is counted up to this limit: counting a million rows takes as long as
/// publishing them.
const COUNT_LIMIT: i64 = 10_000;
/// How often a relay measures the outbox.
pub const MEASURE_INTERVAL: Duration = Duration::from_secs(2);

#[derive(sqlx::FromRow)]
pub struct Row {
    pub id: i64,
    /// The logical name.
    pub topic: String,
    pub key_hash: i32,
    #[sqlx(flatten)]
    pub envelope: EnvelopeRow,
    pub payload: Option<Vec<u8>>,
}

#[derive(sqlx::FromRow)]
pub struct EnvelopeRow {
    event_id: Uuid,
    pub aggregateid: Uuid,
    version: i64,
    r#type: String,
    causationid: Option<Uuid>,
    correlationid: Option<Uuid>,
    actor: Option<Uuid>,
    traceparent: Option<String>,
    tracestate: Option<String>,
    occurred_at: time::OffsetDateTime,
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
            cause: Cause { causation: self.causationid, correlation: self.correlationid, actor: self.actor },
            traceparent: self.traceparent,
            tracestate: self.tracestate,
        }
    }
}

/// The oldest rows that are not excluded, at most `limit` and within [`ROUND_BYTES`], but at least
/// one.
///
/// Ordered by id and without a cursor: a row whose transaction commits late has a low id and is
/// read in the next round. Versions of one key are always in order, because the row lock on the
/// aggregate orders their transactions.
///
/// Each topic is read by its own index range: the recursive part lists the topics with one index
/// lookup each. So a million rows of an excluded topic cost one lookup. Rows of excluded keys and
/// partitions are passed over.
///
/// The topic is compared by `between`. With `=` Postgres would know that the order by topic and id is
/// the order by id, and could read the primary key past all rows of other topics.
pub async fn read(db: &mut PgConnection, excluded: &Excluded, limit: i64) -> sqlx::Result<Vec<Row>> {
    let mut topics = vec![];
    let mut counts = vec![];
    let mut partitions = vec![];
    for (topic, count, partition) in &excluded.partitions {
        topics.push(topic.clone());
        counts.push(*count);
        partitions.push(*partition);
    }
    sqlx::query_as(
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
                 order by topic, id limit $6) as rows
             where topics.topic is not null and topics.topic <> all ($1)
             order by id limit $6)
         select id, topic, key_hash, event_id, aggregateid, version, type, payload, causationid, correlationid, actor,
             traceparent, tracestate, occurred_at
         from (select *, sum(octet_length(payload)) over (order by id rows between unbounded preceding and 1 preceding)
                   as bytes_before
               from oldest) as measured
         where coalesce(bytes_before, 0) < $7 order by id",
    )
    .bind(&excluded.topics)
    .bind(&excluded.keys)
    .bind(topics)
    .bind(counts)
    .bind(partitions)
    .bind(limit)
    .bind(ROUND_BYTES)
    .fetch_all(db)
    .await
}

/// The row that a probe tries.
pub async fn read_one(db: &mut PgConnection, probe: &Probe, excluded: &Excluded) -> sqlx::Result<Option<Row>> {
    let columns =
        "select id, topic, key_hash, event_id, aggregateid, version, type, payload, causationid, correlationid, actor,
             traceparent, tracestate, occurred_at
         from outbox";
    let query = match probe {
        Probe::Topic(topic) => {
            let of_topic = excluded.partitions.iter().filter(|(of, ..)| of == topic);
            let (counts, partitions): (Vec<i32>, Vec<i32>) =
                of_topic.map(|(_, count, number)| (*count, *number)).unzip();
            let oldest = format!(
                "{columns} where topic between $1 and $1 and aggregateid <> all ($2)
                     and not exists (select from unnest($3::int[], $4::int[]) excluded (partitions, partition)
                                     where key_hash % excluded.partitions = excluded.partition)
                 order by topic, id limit 1"
            );
            let oldest = sqlx::query_as(AssertSqlSafe(oldest)).bind(topic.clone());
            oldest.bind(excluded.keys.clone()).bind(counts).bind(partitions)
        }
        Probe::Key(_, row) => sqlx::query_as(AssertSqlSafe(format!("{columns} where id = $1"))).bind(*row),
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

/// Measures the outbox for its metrics. Every replica does, so that the age grows also if the leader
/// hangs. Alert on the oldest age: it grows while Kafka is down.
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
