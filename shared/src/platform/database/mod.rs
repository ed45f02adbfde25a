//! The connection pool. Its time-outs keep a frozen process from blocking the process that takes
//! over its work.

mod connect;
mod faults;
mod migrations;
mod pooler;
mod sessions;

pub use connect::{options, session};
pub use migrations::migrate;
pub use sessions::report;

use std::sync::Arc;

use anyhow::ensure;
use sqlx::migrate::Migrator;
use sqlx::postgres::{PgConnectOptions, PgPoolOptions};
use sqlx::{ConnectOptions, Connection, PgConnection, PgPool};
use tokio::time::{Duration, sleep, timeout};
use tokio_util::sync::CancellationToken;

use super::health::Health;
use faults::{Refused, refusal};
use migrations::Schema;

/// Set on every pooled session, so that Postgres ends the transactions and locks of a frozen
/// process.
const SESSION_LIMITS: [(&str, &str); 3] =
    [("statement_timeout", "5s"), ("lock_timeout", "2s"), ("idle_in_transaction_session_timeout", "5s")];
/// Sessions of a pool.
pub const POOL_SIZE: u32 = 10;
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
/// The component's name in `/status`.
const COMPONENT: &str = "database";

/// Waits until the database has the migrations of this release, and returns a pool. Several
/// replicas may do this at once.
pub(crate) async fn connect(
    url: &str,
    migrations: &Migrator,
    health: &Health,
    stop: &CancellationToken,
) -> anyhow::Result<PgPool> {
    let options = options(url)?;
    health.waiting(COMPONENT, "the database to answer");
    let mut logged = String::new();
    // Postgres rolls back a migration that is cancelled.
    while let Some(prepared) = stop.run_until_cancelled(migrations::prepare(&options, migrations)).await {
        let (reason, pause) = match prepared {
            Ok(Schema::Current) => break,
            Ok(Schema::Behind(reason)) => (reason, RETRY_INTERVAL),
            Err(error) if error.is::<Refused>() => (error.to_string(), RETRY_INTERVAL),
            Err(error) => match migrations::pause_after(&error) {
                Some(pause) => (format!("{error:#}"), pause),
                None => return Err(error.context("cannot prepare the database")),
            },
        };
        if reason != logged {
            tracing::warn!(reason, "waiting for the database; will retry");
            logged.clone_from(&reason);
        }
        health.waiting(COMPONENT, reason);
        stop.run_until_cancelled(sleep(pause)).await;
    }
    ensure!(!stop.is_cancelled(), "the process was stopped while it waited for the database");
    health.ready(COMPONENT);
    Ok(pool(options))
}

/// A pool for a subcommand.
///
/// # Errors
/// The URL is malformed, or Postgres and this process do not accept each other. While the database is
/// down, the pool waits for it.
pub async fn open(url: &str) -> anyhow::Result<PgPool> {
    let options = options(url)?;
    match session(&options, "check", &[]).await {
        Err(error) if error.is::<Refused>() => Err(error.context("cannot connect to the database, waiting for")),
        _ => Ok(pool(options)),
    }
}

/// A pool whose sessions have the limits above. It connects on first use.
pub fn pool(options: PgConnectOptions) -> PgPool {
    pool_with(options, &[])
}

/// As [`pool`]. Its sessions have further settings.
pub fn pool_with(options: PgConnectOptions, settings: &[(&str, &str)]) -> PgPool {
    let all = [&SESSION_LIMITS[..], settings].concat();
    let statement: Arc<str> = connect::settings_statement(&all).into();
    PgPoolOptions::new()
        .max_connections(POOL_SIZE)
        .acquire_timeout(ACQUIRE_TIMEOUT)
        .test_before_acquire(false)
        .after_connect(move |connection, _| Box::pin(connect::apply(connection, statement.to_string())))
        .before_acquire(|connection, meta| {
            Box::pin(async move {
                if !sessions::is_trusted(meta.age) {
                    return Ok(false);
                }
                if meta.idle_for > PING_AFTER_IDLE {
                    ping(connection).await?;
                }
                Ok(true)
            })
        })
        .after_release(|connection, _| Box::pin(async move { settle(connection).await.map(|()| true) }))
        .connect_lazy_with(options)
}

/// Makes sure that a returned connection is alive, within a limited time. The pool itself pings it
/// after this, without a time-out: on a dead connection it would wait permanently, and ten of these
/// would exhaust the pool.
///
/// A cancelled statement is not answered yet, and a rollback is not sent yet. Their answers are
/// waited for here, and a connection on which they do not come is closed. Otherwise the last
/// statement was answered just now, because a session is returned as soon as its work is done: then
/// this sends nothing, and a ping would prove nothing more. A connection that dies between that
/// answer and the pool's ping keeps its place until TCP reports an error.
async fn settle(connection: &mut PgConnection) -> sqlx::Result<()> {
    timeout(PING_TIMEOUT, connection.flush()).await.unwrap_or(Err(sqlx::Error::PoolTimedOut))
}

async fn ping(connection: &mut PgConnection) -> sqlx::Result<()> {
    timeout(PING_TIMEOUT, connection.ping()).await.unwrap_or(Err(sqlx::Error::PoolTimedOut))
}

/// Gives up a statement that is not answered in time. The statement may have taken effect, as after
/// a broken connection. This is for background loops: HTTP requests and event handlers have their
/// own time-outs.
///
/// # Errors
/// The statement's error, or `PoolTimedOut`.
pub async fn bounded<T>(statement: impl Future<Output = sqlx::Result<T>>) -> sqlx::Result<T> {
    let answer = timeout(ANSWER_TIMEOUT, statement).await.unwrap_or(Err(sqlx::Error::PoolTimedOut));
    if let Err(error) = &answer {
        report(error);
    }
    answer
}

/// Whether the database answers and accepts writes.
pub async fn is_writable(db: &PgPool) -> bool {
    let question = "select current_setting('transaction_read_only') = 'off'";
    bounded(sqlx::query_scalar(question).fetch_one(db)).await.unwrap_or(false)
}

/// Reports to `/readyz` whether the database answers, and to `/status` whether its sessions can
/// write. Checks once a second.
pub(crate) async fn watch(db: PgPool, health: Health) -> anyhow::Result<()> {
    loop {
        match state(&db).await {
            Ok(State::Writable) => {
                health.ready(COMPONENT);
                health.resolved(COMPONENT);
            }
            // The sessions of other replicas would wait for the same locks.
            Ok(State::Busy) => {
                health.ready(COMPONENT);
                health.report(COMPONENT, format!("a free session: all {POOL_SIZE} are in use"));
            }
            // Reads still succeed, so the process is ready.
            Ok(State::ReadOnly) => {
                health.ready(COMPONENT);
                health.report(COMPONENT, "the database to be writable");
                sessions::doubt();
            }
            Err(error) => {
                let reason = refusal(&error).unwrap_or_else(|| "the database to answer".to_owned());
                health.waiting(COMPONENT, reason);
            }
        }
        sleep(Duration::from_secs(1)).await;
    }
}

enum State {
    Writable,
    ReadOnly,
    /// The database answers, and statements of this process use all sessions of the pool.
    Busy,
}

/// Asks on a session of the pool. If none becomes free, asks on a session of its own: then either
/// the sessions wait, for example for a lock, or the database does not answer.
async fn state(db: &PgPool) -> sqlx::Result<State> {
    match db.acquire().await {
        Ok(mut session) => state_of(&mut session).await,
        Err(sqlx::Error::PoolTimedOut) => {
            let options = db.connect_options().as_ref().clone().application_name("watch");
            let mut session = bounded(options.connect()).await?;
            let state = state_of(&mut session).await?;
            let _ = bounded(session.close()).await;
            let is_busy = db.size() == POOL_SIZE && db.num_idle() == 0;
            Ok(if is_busy && matches!(state, State::Writable) { State::Busy } else { state })
        }
        Err(error) => Err(error),
    }
}

async fn state_of(session: &mut PgConnection) -> sqlx::Result<State> {
    // True in a read-only session, and while the server is a standby.
    let is_read_only = sqlx::query_scalar("select current_setting('transaction_read_only')::boolean");
    let is_read_only = bounded(is_read_only.fetch_one(session)).await?;
    Ok(if is_read_only { State::ReadOnly } else { State::Writable })
}
