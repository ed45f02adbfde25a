//! Deliveries that are held back. A cause of long ago comes from a history read again (a lost database, a group that starts
//! anew), not from a user who waits; most of these mails were sent once. So they wait, visibly, for an operator's word: `email
//! send-held`.
//!
//! The word is given for what is held now. As a setting it would be forgotten, and the next history would be mailed.

use std::time::Duration;

use shared::service::bounded;
use sqlx::PgPool;
use tokio::time::sleep;
use uuid::Uuid;

use crate::deliveries::interval;
use crate::metrics::Metrics;

const INTERVAL: Duration = Duration::from_secs(1);
/// Deliveries per statement: a history has more than a statement's time-out allows.
const BATCH: i64 = 5_000;

/// The subcommand `send-held`. It takes at least one bound: without any, whatever was read again would be mailed.
#[derive(clap::Args, Clone)]
#[group(required = true, multiple = true)]
pub struct SendHeld {
    /// Mails whose cause is younger than this: of the four days, say, that this service was away.
    #[arg(long)]
    younger_than_hours: Option<u32>,
    /// This user's mails.
    #[arg(long)]
    user: Option<Uuid>,
}

/// Holds back what is too old, and cancels what is held for recipients who were erased. Until it comes to a delivery, the claim's
/// own condition keeps that from being sent. Any number of processes may do so at once.
pub async fn watch(db: PgPool, max_age: Duration, metrics: Metrics) -> anyhow::Result<()> {
    loop {
        match bounded(async { Ok((hold(&db, max_age).await?, cancel_erased(&db).await?)) }).await {
            Ok((held, cancelled)) => {
                if held > 0 {
                    tracing::warn!(
                        deliveries = held,
                        "held back: older than MAX_AGE_HOURS; see `email send-held --help`"
                    );
                }
                metrics.settled("cancelled", cancelled);
                if held.max(cancelled) == BATCH.unsigned_abs() {
                    continue;
                }
            }
            Err(error) => tracing::warn!(%error, "the database does not answer; what is too old is held back later"),
        }
        sleep(INTERVAL).await;
    }
}

/// What is being sent, with a lease, was young enough or released when it was claimed: it is let go on.
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

/// The operator's word. Crash in between: some are released and others not, and the next call releases the rest. A released
/// delivery stays so, however often it is put off.
#[expect(clippy::print_stdout, reason = "it is what the subcommand answers")]
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
