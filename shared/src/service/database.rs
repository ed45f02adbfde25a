//! The connection pool, with the time-outs that keep a frozen process from blocking its successor.

use anyhow::{Context, ensure};
use sqlx::migrate::Migrator;
use sqlx::postgres::{PgConnectOptions, PgPoolOptions};
use sqlx::{ConnectOptions, Connection, PgConnection, PgPool};
use tokio::time::{Duration, sleep, timeout};
use tokio_util::sync::CancellationToken;

use super::Health;

/// Set on every pooled session, so that Postgres itself ends what a frozen process left open.
const SESSION_LIMITS: [(&str, &str); 3] =
    [("statement_timeout", "5s"), ("lock_timeout", "2s"), ("idle_in_transaction_session_timeout", "5s")];
/// Migrations may run long and must wait for another replica's, so none of the limits above; but a frozen process must not
/// keep the migration lock.
const MIGRATION_LIMITS: [(&str, &str); 1] = [("idle_session_timeout", "15s")];
const POOL_SIZE: u32 = 10;
const ACQUIRE_TIMEOUT: Duration = Duration::from_secs(3);
/// A connection that idled longer is asked whether it still lives before it is used.
const TRUSTED_IDLE: Duration = Duration::from_secs(5);
/// For the answer to that, below the time-out for acquiring: what is silent is replaced by a new connection in the same call.
const PING_TIMEOUT: Duration = Duration::from_secs(1);
/// For one statement as we see it: longer than Postgres' own `statement_timeout`, which does not run while the server is frozen
/// or the network gone.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(8);
const RETRY_INTERVAL: Duration = Duration::from_millis(500);
const PART: &str = "database";

/// Waits for the database, migrates it, and hands out a pool. Any number of replicas may do so at once: the migrator takes a
/// lock, and each migration is a transaction.
pub(crate) async fn connect(
    url: &str,
    migrations: &Migrator,
    health: &Health,
    stop: &CancellationToken,
) -> anyhow::Result<PgPool> {
    let options: PgConnectOptions =
        url.parse().context("the database URL is not postgres://user:password@host:port/name")?;
    health.waiting(PART, "the database to answer");
    // Given up in the middle, a migration is rolled back.
    while let Some(Err(error)) = stop.run_until_cancelled(migrate(&options, migrations)).await {
        if !unreachable(&error) {
            return Err(error.context("cannot migrate the database"));
        }
        tracing::warn!(error = %format!("{error:#}"), "waiting for the database");
        stop.run_until_cancelled(sleep(RETRY_INTERVAL)).await;
    }
    ensure!(!stop.is_cancelled(), "stopped while waiting for the database");
    health.ready(PART);
    Ok(pool(options))
}

/// A pool whose sessions carry the limits above. It connects when first used.
pub fn pool(options: PgConnectOptions) -> PgPool {
    PgPoolOptions::new()
        .max_connections(POOL_SIZE)
        .acquire_timeout(ACQUIRE_TIMEOUT)
        .test_before_acquire(false)
        .before_acquire(|connection, meta| {
            Box::pin(async move {
                if meta.idle_for > TRUSTED_IDLE {
                    ping(connection).await?;
                }
                Ok(true)
            })
        })
        // The pool itself asks again here, and would wait for ever: a connection given up because nothing came on it would keep its
        // place, and ten of them the whole pool.
        .after_release(|connection, _| Box::pin(async move { ping(connection).await.map(|()| true) }))
        .connect_lazy_with(options.options(SESSION_LIMITS))
}

async fn ping(connection: &mut PgConnection) -> sqlx::Result<()> {
    timeout(PING_TIMEOUT, connection.ping()).await.unwrap_or(Err(sqlx::Error::PoolTimedOut))
}

async fn migrate(options: &PgConnectOptions, migrations: &Migrator) -> anyhow::Result<()> {
    let mut connection = options.clone().options(MIGRATION_LIMITS).connect().await?;
    migrations.run(&mut connection).await?;
    connection.close().await?;
    Ok(())
}

/// Whether waiting can help: the server is not there, not there yet, or has too many clients. A wrong password or a
/// migration that fails does not mend itself.
fn unreachable(error: &anyhow::Error) -> bool {
    let cause = error.downcast_ref::<sqlx::Error>().or_else(|| match error.downcast_ref() {
        Some(sqlx::migrate::MigrateError::Execute(cause)) => Some(cause),
        _ => None,
    });
    match cause {
        Some(sqlx::Error::Io(_) | sqlx::Error::PoolTimedOut | sqlx::Error::PoolClosed) => true,
        // 57P0x: starting up or shutting down; 53xxx: out of connections; 08xxx: the connection broke.
        Some(sqlx::Error::Database(error)) => {
            error.code().is_some_and(|code| ["57P", "53", "08"].iter().any(|class| code.starts_with(class)))
        }
        _ => false,
    }
}

/// Gives a statement up when no answer comes. It may have taken effect, as when a connection breaks. HTTP handlers and consumers'
/// handlers are bounded as a whole already; this is for loops.
///
/// # Errors
/// The statement's own, or `PoolTimedOut`.
pub async fn bounded<T>(statement: impl Future<Output = sqlx::Result<T>>) -> sqlx::Result<T> {
    timeout(ANSWER_TIMEOUT, statement).await.unwrap_or(Err(sqlx::Error::PoolTimedOut))
}

/// Keeps `/readyz` honest: asks the database once a second.
pub(crate) async fn watch(db: PgPool, health: Health) -> anyhow::Result<()> {
    loop {
        match bounded(sqlx::query("select 1").execute(&db)).await {
            Ok(_) => health.ready(PART),
            Err(_) => health.waiting(PART, "the database to answer"),
        }
        sleep(Duration::from_secs(1)).await;
    }
}
