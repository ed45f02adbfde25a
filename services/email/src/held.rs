//! Held deliveries. An old event comes from a replayed history (a lost database, a group that
//! starts from the beginning) and not from a user who waits. Most mails of a replayed history were
//! sent before. So the deliveries of old events are held until an operator runs `email send-held`.
//! A metric counts them.
//!
//! The command releases only what is held now. A setting would stay on and mail the next replay
//! too.

use std::time::Duration;

use shared::platform::database::bounded;
use sqlx::PgPool;
use tokio::time::sleep;
use uuid::Uuid;

use crate::deliveries::interval;
use crate::metrics::DeliveryMetrics;

const INTERVAL: Duration = Duration::from_secs(1);
/// Deliveries per statement. A whole history would exceed the time-out of a statement.
const BATCH: i64 = 5_000;

/// The subcommand `send-held`. It requires at least one bound: without any it would mail a whole
/// replayed history.
#[derive(clap::Args, Clone)]
#[group(required = true, multiple = true)]
pub struct SendHeld {
    /// Send mails whose cause is younger than this, for example of the four days during which this
    /// service was down.
    #[arg(long)]
    younger_than_hours: Option<u32>,
    /// Send the mails of this user.
    #[arg(long)]
    user: Option<Uuid>,
}

/// Holds deliveries that are too old, and cancels held ones whose recipient was erased. A delivery
/// that is too old and not held yet is not sent either, because the sender does not claim it.
/// Several processes may do this at once.
pub async fn watch(db: PgPool, max_age: Duration, metrics: DeliveryMetrics) -> anyhow::Result<()> {
    loop {
        match bounded(async { Ok((hold(&db, max_age).await?, cancel_erased(&db).await?)) }).await {
            Ok((held, cancelled)) => {
                if held > 0 {
                    tracing::warn!(
                        deliveries = held,
                        "deliveries are held: their cause is older than MAX_AGE_HOURS; see `email send-held --help`"
                    );
                }
                metrics.count_ended("cancelled", cancelled);
                // After a full batch there may be more.
                if held.max(cancelled) == BATCH.unsigned_abs() {
                    continue;
                }
            }
            Err(error) => tracing::warn!(%error, "cannot hold old deliveries; will retry"),
        }
        sleep(INTERVAL).await;
    }
}

/// Holds deliveries that are too old, except those that are being sent under a valid lease: they
/// were young enough, or released, when they were claimed.
async fn hold(db: &PgPool, max_age: Duration) -> sqlx::Result<u64> {
    let held = sqlx::query!(
        "update deliveries set status = 'held', token = null, lease_until = null, updated_at = now()
         where id in (
             select id from deliveries
             where status in ('pending', 'unknown', 'sending') and (status <> 'sending' or lease_until < now())
                 and released_at is null and requested_at <= now() - $1::interval
             limit $2 for update skip locked)",
        interval(max_age),
        BATCH
    );
    Ok(held.execute(db).await?.rows_affected())
}

async fn cancel_erased(db: &PgPool) -> sqlx::Result<u64> {
    let cancelled = sqlx::query!(
        "update deliveries set status = 'cancelled', updated_at = now()
         where id in (
             select d.id from deliveries d join recipients r using (user_id)
             where d.status = 'held' and r.email is null
             limit $1 for update of d skip locked)",
        BATCH
    );
    Ok(cancelled.execute(db).await?.rows_affected())
}

/// Releases held deliveries. Crash in between: some are released and others are not, and the next
/// call releases the rest. A released delivery stays released, however often it is retried.
#[expect(clippy::print_stdout, reason = "the output of the subcommand")]
pub async fn send(db: &PgPool, options: &SendHeld) -> anyhow::Result<()> {
    let age = options.younger_than_hours.map(|hours| interval(Duration::from_secs(u64::from(hours) * 3600)));
    let mut released = 0;
    loop {
        let batch = sqlx::query!(
            "update deliveries set status = 'pending', released_at = now(), next_attempt_at = now(), updated_at = now()
             where id in (
                 select id from deliveries
                 where status = 'held' and requested_at > coalesce(now() - $1::interval, '-infinity')
                     and user_id = coalesce($2, user_id)
                 limit $3 for update)",
            age.clone(),
            options.user,
            BATCH
        );
        let batch = batch.execute(db).await?.rows_affected();
        released += batch;
        if batch < BATCH.unsigned_abs() {
            break;
        }
    }
    let held = sqlx::query_scalar!(r#"select count(*) as "held!" from deliveries where status = 'held'"#);
    println!("{released} released, to be sent by the running service; {} still held", held.fetch_one(db).await?);
    Ok(())
}
