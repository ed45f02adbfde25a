//! The outbox: a state change and the event that tells of it are one transaction, so neither exists without the other. The
//! [relay](super::relay) brings the rows to Kafka and deletes them.

use sqlx::{PgConnection, PgPool};
use tokio::time::{Duration, sleep};
use uuid::Uuid;

use crate::events::{self, Event};
use crate::service::{Metrics, bounded, telemetry};

const MEASURE_INTERVAL: Duration = Duration::from_secs(2);

/// Writes `event` about the aggregate `key` to the outbox, within the caller's transaction, and returns the event's id.
/// `version` is the aggregate's version after this command: it comes from the row that the same transaction changed.
/// Wake the relay after the commit, not before: it could not see the row yet.
///
/// Crash: before the commit there is neither change nor event; after it the relay, of any replica, finds the row.
///
/// # Errors
/// The insert failed; so has the caller's transaction. SQLSTATE 23514: the event is larger than Kafka takes.
pub async fn publish<E: Event>(tx: &mut PgConnection, key: Uuid, version: i64, event: &E) -> sqlx::Result<Uuid> {
    let event_id = events::mint_id();
    let (kind, payload) = event.encode();
    let trace = telemetry::current();
    sqlx::query(
        "insert into outbox
             (event_id, topic, aggregatetype, aggregateid, version, type, payload, traceparent, tracestate, occurred_at)
         values ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10)",
    )
    .bind(event_id)
    .bind(E::TOPIC.name)
    .bind(E::TOPIC.aggregate)
    .bind(key)
    .bind(version)
    .bind(kind)
    .bind(payload)
    .bind(trace.traceparent)
    .bind(trace.tracestate)
    .bind(events::now())
    .execute(tx)
    .await?;
    Ok(event_id)
}

/// How many rows wait to be published; counted no further than `limit`. Who writes many rows at once asks before it goes on.
///
/// # Errors
/// The database does not answer.
pub async fn waiting(db: &PgPool, limit: i64) -> sqlx::Result<i64> {
    let rows = sqlx::query_scalar("select count(*) from (select from outbox limit $1) waiting").bind(limit);
    bounded(rows.fetch_one(db)).await
}

/// Keeps the metrics of what waits to be published. While Kafka is away the oldest age is what to alert on. Dead rows are those
/// that were published and deleted and are not vacuumed yet; the relay's read passes over each of them, so it takes longer the
/// more there are. They stay while anybody in this database holds a snapshot from before their end: a forgotten transaction, a
/// dump.
pub(crate) async fn measure(db: PgPool, metrics: Metrics) -> anyhow::Result<()> {
    loop {
        let question = sqlx::query_as(
            "select (select count(*) from outbox),
                    coalesce((select extract(epoch from now() - occurred_at)::bigint from outbox order by id limit 1), 0),
                    coalesce(pg_stat_get_dead_tuples('outbox'::regclass), 0)",
        );
        let measured: sqlx::Result<(i64, i64, i64)> = bounded(question.fetch_one(&db)).await;
        // A database that does not answer is reported by the readiness, and these stay at what was last known.
        if let Ok((rows, age, dead)) = measured {
            metrics.outbox_rows.set(rows);
            metrics.outbox_oldest_age.set(age);
            metrics.outbox_dead_rows.set(dead);
        }
        sleep(MEASURE_INTERVAL).await;
    }
}
