//! The connection pool. Its time-outs keep a frozen process from blocking the process that takes
//! over its work.

use anyhow::{Context, ensure};
use sqlx::migrate::Migrator;
use sqlx::postgres::{PgConnectOptions, PgPoolOptions};
use sqlx::{ConnectOptions, Connection, PgConnection, PgPool};
use tokio::time::{Duration, sleep, timeout};
use tokio_util::sync::CancellationToken;

use super::health::Health;

/// Set on every pooled session, so that Postgres ends the transactions and locks of a frozen
/// process.
const SESSION_LIMITS: [(&str, &str); 3] =
    [("statement_timeout", "5s"), ("lock_timeout", "2s"), ("idle_in_transaction_session_timeout", "5s")];
/// Set on the session that migrates. The limits above do not apply, because a migration may take
/// long and may wait for another replica. This one ends the session of a frozen process, which
/// would keep the migration lock.
const MIGRATION_LIMITS: [(&str, &str); 1] = [("idle_session_timeout", "15s")];
const POOL_SIZE: u32 = 10;
const ACQUIRE_TIMEOUT: Duration = Duration::from_secs(3);
/// A connection that was idle for longer than this is pinged before it is used.
const PING_AFTER_IDLE: Duration = Duration::from_secs(5);
/// Time for the answer to a ping. It is below the time-out for acquiring, so that a connection that
/// does not answer is replaced within the same call.
const PING_TIMEOUT: Duration = Duration::from_secs(1);
/// Time for one statement, measured by the client. It is longer than Postgres' own
/// `statement_timeout`, which has no effect while the server is frozen or the network is down.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(8);
const RETRY_INTERVAL: Duration = Duration::from_millis(500);
/// The component's name in `/readyz`.
const COMPONENT: &str = "database";

/// Waits for the database, migrates it and returns a pool. Several replicas may do this at once:
/// the migrator takes a lock, and each migration is a transaction.
pub(crate) async fn connect(
    url: &str,
    migrations: &Migrator,
    health: &Health,
    stop: &CancellationToken,
) -> anyhow::Result<PgPool> {
    let options: PgConnectOptions =
        url.parse().context("the database URL is not postgres://user:password@host:port/name")?;
    health.waiting(COMPONENT, "the database to answer");
    // Postgres rolls back a migration that is cancelled.
    while let Some(Err(error)) = stop.run_until_cancelled(migrate(&options, migrations)).await {
        if !is_transient(&error) {
            return Err(error.context("cannot migrate the database"));
        }
        tracing::warn!(error = %format!("{error:#}"), "cannot reach the database; will retry");
        stop.run_until_cancelled(sleep(RETRY_INTERVAL)).await;
    }
    ensure!(!stop.is_cancelled(), "the process was stopped while it waited for the database");
    health.ready(COMPONENT);
    Ok(pool(options))
}

/// A pool whose sessions have the limits above. It connects on first use.
pub fn pool(options: PgConnectOptions) -> PgPool {
    PgPoolOptions::new()
        .max_connections(POOL_SIZE)
        .acquire_timeout(ACQUIRE_TIMEOUT)
        .test_before_acquire(false)
        .before_acquire(|connection, meta| {
            Box::pin(async move {
                if meta.idle_for > PING_AFTER_IDLE {
                    ping(connection).await?;
                }
                Ok(true)
            })
        })
        // By default the pool pings a returned connection without a time-out. A dead connection
        // would keep its slot forever, and ten of them would exhaust the pool.
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

/// Whether the error is transient: the server is down, is starting, or has too many clients. A
/// wrong password and a failing migration are not.
fn is_transient(error: &anyhow::Error) -> bool {
    let cause = error.downcast_ref::<sqlx::Error>().or_else(|| match error.downcast_ref() {
        Some(sqlx::migrate::MigrateError::Execute(cause)) => Some(cause),
        _ => None,
    });
    match cause {
        Some(sqlx::Error::Io(_) | sqlx::Error::PoolTimedOut | sqlx::Error::PoolClosed) => true,
        // 57P0x: starting up or shutting down; 53xxx: out of connections; 08xxx: the connection
        // broke.
        Some(sqlx::Error::Database(error)) => {
            error.code().is_some_and(|code| ["57P", "53", "08"].iter().any(|class| code.starts_with(class)))
        }
        _ => false,
    }
}

/// Gives up a statement that is not answered in time. The statement may have taken effect, as after
/// a broken connection. This is for background loops: HTTP requests and event handlers have their
/// own time-outs.
///
/// # Errors
/// The statement's error, or `PoolTimedOut`.
pub async fn bounded<T>(statement: impl Future<Output = sqlx::Result<T>>) -> sqlx::Result<T> {
    timeout(ANSWER_TIMEOUT, statement).await.unwrap_or(Err(sqlx::Error::PoolTimedOut))
}

/// Reports to `/readyz` whether the database answers. Checks once a second.
pub(crate) async fn watch(db: PgPool, health: Health) -> anyhow::Result<()> {
    loop {
        match bounded(sqlx::query("select 1").execute(&db)).await {
            Ok(_) => health.ready(COMPONENT),
            Err(_) => health.waiting(COMPONENT, "the database to answer"),
        }
        sleep(Duration::from_secs(1)).await;
    }
}
