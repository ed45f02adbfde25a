//! The sessions of the rebuild that touch the live model.

use shared::platform::database;
use sqlx::postgres::PgConnectOptions;
use sqlx::{AssertSqlSafe, PgConnection};

/// Limits of the session that holds the lock and swaps. If the rebuild freezes during the swap,
/// Postgres closes its session after 5 s; at any other point, after a minute.
const SESSION_LIMITS: [(&str, &str); 4] = [
    ("idle_session_timeout", "60s"),
    ("idle_in_transaction_session_timeout", "5s"),
    // Also limits how long readers wait while the swap waits for a lock.
    ("lock_timeout", "2s"),
    // The comparison has no limit: it locks nothing.
    ("statement_timeout", "60s"),
];
/// While this lock is held, no process writes to the live model, because consumers start each
/// transaction with the inbox or with the audit. The lock on the first table keeps a new release
/// from migrating: a swap would undo its migrations.
pub const LOCK_LIVE: &str = "lock table _sqlx_migrations, inbox, audit in share row exclusive mode";

/// Opens a session with the limits above.
pub async fn connect(server: &PgConnectOptions) -> anyhow::Result<PgConnection> {
    database::session(server, "rebuild", &SESSION_LIMITS).await
}

/// Whether the cause is another session's lock: a lock time-out or a deadlock.
pub fn is_busy(error: &anyhow::Error) -> bool {
    let code = error.downcast_ref::<sqlx::Error>().and_then(|error| error.as_database_error()?.code());
    code.is_some_and(|code| ["55P03", "40P01"].contains(&&*code))
}

/// Runs a statement that contains names, for which SQL has no parameters. All names are our own or
/// quoted by Postgres.
pub async fn execute(db: &mut PgConnection, statement: String) -> sqlx::Result<()> {
    sqlx::raw_sql(AssertSqlSafe(statement)).execute(db).await.map(drop)
}
