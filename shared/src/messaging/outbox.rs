//! The outbox: a state change and its events are one transaction, so neither exists without the other. The
//! [relay](super::relay) publishes the rows to Kafka and deletes them.

use sqlx::{PgConnection, PgPool};
use tokio::time::{Duration, sleep};
use uuid::Uuid;

use crate::events::{self, Event};
use crate::platform::database::bounded;
use crate::platform::metrics::Metrics;
use crate::platform::telemetry;

const MEASURE_INTERVAL: Duration = Duration::from_secs(2);

/// Writes `event` about the aggregate `key` to the outbox, within the caller's transaction, and returns the event's id.
/// `version` is the aggregate's version after this command; it comes from the row that the same transaction changed.
/// Call [`Wake::notify`](super::Wake::notify) after the commit, not before it: the relay could not see the row yet.
///
/// Crash before the commit: neither the change nor the event exists. Crash after it: the relay of any replica publishes
/// the row.
///
/// # Errors
/// The insert failed, and with it the caller's transaction. SQLSTATE 23514: the event is larger than Kafka accepts.
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

/// How many rows wait to be published, counted up to `limit`. Bulk writers use this to throttle themselves.
///
/// # Errors
/// The database does not answer.
pub async fn waiting(db: &PgPool, limit: i64) -> sqlx::Result<i64> {
    let rows = sqlx::query_scalar("select count(*) from (select from outbox limit $1) waiting").bind(limit);
    bounded(rows.fetch_one(db)).await
}

/// Keeps the outbox metrics up to date. Alert on the oldest age: it grows while Kafka is down. Dead rows are deleted rows
/// not yet vacuumed. The relay scans over them, so it slows down while an open snapshot (an idle transaction, a dump) keeps
/// them alive.
pub(crate) async fn measure(db: PgPool, metrics: Metrics) -> anyhow::Result<()> {
    loop {
        let query = sqlx::query_as(
            "select (select count(*) from outbox),
                    coalesce((select extract(epoch from now() - occurred_at)::bigint from outbox order by id limit 1), 0),
                    coalesce(pg_stat_get_dead_tuples('outbox'::regclass), 0)",
        );
        let measured: sqlx::Result<(i64, i64, i64)> = bounded(query.fetch_one(&db)).await;
        // While the database does not answer, the metrics keep their last values and `/readyz` reports the database.
        if let Ok((rows, age, dead)) = measured {
            metrics.outbox_rows.set(rows);
            metrics.outbox_oldest_age.set(age);
            metrics.outbox_dead_rows.set(dead);
        }
        sleep(MEASURE_INTERVAL).await;
    }
}
