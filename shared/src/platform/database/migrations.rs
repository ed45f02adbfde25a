//! Migrations. The subcommand `migrate` applies them, as the role that owns the tables. The
//! subcommand `serve` waits until the database has those of its release. It applies them itself
//! only if its role may create tables, as on a system where a service has a single role.

use std::collections::BTreeMap;
use std::io;

use anyhow::{Context, bail, ensure};
use sqlx::PgConnection;
use sqlx::migrate::{MigrateError, Migrator};
use sqlx::postgres::PgConnectOptions;
use tokio::time::{Duration, sleep, timeout};

use super::connect::{options, session};

/// The session that migrates. Statements have no time limit, because a migration may take long. A
/// frozen process must keep neither the locks of its transaction nor the lock of the migrator.
const SESSION_LIMITS: [(&str, &str); 2] =
    [("idle_in_transaction_session_timeout", "5s"), ("idle_session_timeout", "15s")];
/// How long a migration waits for the lock on a table. Every statement on this table waits behind
/// it, so this is shorter than the `lock_timeout` of requests.
const LOCK_TIMEOUT: &str = "500ms";
/// The pause after a migration did not get its lock. In this time the statements that waited
/// behind it run. It is longer than the wait, so that requests have most of the time.
const LOCK_PAUSE: Duration = Duration::from_secs(2);
/// Time for one answer of the database, except to a migration.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(8);
const RETRY_INTERVAL: Duration = Duration::from_millis(500);
/// The key of the advisory lock of the migrator. Every release uses the same number.
const MIGRATION_LOCK: i64 = 0x6D_6967_7261_7465; // "migrate"

/// Whether the database has every migration of this release.
pub(super) enum Schema {
    Current,
    /// It does not, and this role may not create tables. The text says what to do.
    Behind(String),
}

/// The subcommand `migrate`. Waits until the database answers and until each lock is free.
///
/// # Errors
/// The URL is malformed, Postgres and this process do not accept each other, or a migration fails.
#[expect(clippy::print_stdout, reason = "the output of the subcommand")]
pub async fn migrate(url: &str, migrations: &Migrator) -> anyhow::Result<()> {
    let options = options(url)?;
    loop {
        let Err(error) = migrate_once(&options, migrations).await else { break };
        let pause = pause_after(&error).ok_or(error)?;
        sleep(pause).await;
    }
    println!("the database has all migrations of this release");
    Ok(())
}

#[expect(clippy::print_stdout, reason = "the output of the subcommand")]
async fn migrate_once(options: &PgConnectOptions, migrations: &Migrator) -> anyhow::Result<()> {
    let outcome = async {
        let mut db = session(options, "migrator", &SESSION_LIMITS).await?;
        let Difference { missing, .. } = difference(&mut db, migrations).await?;
        apply(&mut db, migrations, &missing).await
    };
    let outcome = outcome.await;
    if let Err(error) = &outcome
        && pause_after(error).is_some()
    {
        println!("will retry: {error:#}");
    }
    outcome
}

/// How long to wait before the next attempt, if the error is transient.
pub(super) fn pause_after(error: &anyhow::Error) -> Option<Duration> {
    if is_busy(error) {
        return Some(LOCK_PAUSE);
    }
    is_transient(error).then_some(RETRY_INTERVAL)
}

/// Looks at the database, and migrates it if this role may.
pub(super) async fn prepare(options: &PgConnectOptions, migrations: &Migrator) -> anyhow::Result<Schema> {
    let mut db = session(options, "migrator", &SESSION_LIMITS).await?;
    let Difference { missing, newer } = difference(&mut db, migrations).await?;
    if missing.is_empty() {
        if !newer.is_empty() {
            tracing::info!(migrations = ?newer, "the database has migrations of a newer release");
        }
        return Ok(Schema::Current);
    }
    // Null if the schema of the search path does not exist.
    let may_create = sqlx::query_scalar("select has_schema_privilege(current_schema(), 'create')");
    let may_create: Option<bool> = answered(may_create.fetch_one(&mut db)).await?;
    if may_create != Some(true) {
        let reason = format!(
            "the migrations {missing:?}: run the subcommand `migrate` of this release, with the URL of the role that owns the \
             tables"
        );
        return Ok(Schema::Behind(reason));
    }
    apply(&mut db, migrations, &missing).await?;
    Ok(Schema::Current)
}

/// Waits for an answer of the database, but only for a limited time: a server that is frozen or in
/// the middle of a failover accepts connections and does not answer.
async fn answered<T, E>(answer: impl Future<Output = Result<T, E>>) -> anyhow::Result<T>
where
    anyhow::Error: From<E>,
{
    match timeout(ANSWER_TIMEOUT, answer).await {
        Ok(answer) => Ok(answer?),
        Err(_) => {
            let error = io::Error::new(io::ErrorKind::TimedOut, format!("no answer within {ANSWER_TIMEOUT:?}"));
            Err(sqlx::Error::Io(error).into())
        }
    }
}

/// How the database differs from this release.
struct Difference {
    /// The migrations of this release that the database lacks.
    missing: Vec<i64>,
    /// Those of a newer release. The release before it works with them (`migrations/README.md`).
    newer: Vec<i64>,
}

/// # Errors
/// A migration of this release was applied with another text, or the database cannot store every
/// text.
async fn difference(db: &mut PgConnection, migrations: &Migrator) -> anyhow::Result<Difference> {
    let encoding = sqlx::query_scalar("select current_setting('server_encoding')").fetch_one(&mut *db);
    let encoding: String = answered(encoding).await?;
    ensure!(
        encoding == "UTF8",
        "the encoding of the database is {encoding}, so it cannot store every name and address: create it with `encoding \
         'UTF8' template template0`, as deploy/postgres/service/database.sql does"
    );
    let any = sqlx::query_scalar("select to_regclass('_sqlx_migrations') is not null").fetch_one(&mut *db);
    let any: bool = answered(any).await?;
    let mut applied = BTreeMap::new();
    if any {
        let rows = sqlx::query_as("select version, checksum from _sqlx_migrations").fetch_all(&mut *db);
        let rows: Vec<(i64, Vec<u8>)> = answered(rows).await?;
        applied.extend(rows);
    }
    let mut missing = vec![];
    for migration in migrations.iter() {
        match applied.remove(&migration.version) {
            None => missing.push(migration.version),
            Some(checksum) if *checksum == *migration.checksum => {}
            Some(_) => bail!(
                "the migration {} was applied with another text than this release has: a migration that was released is never \
                 edited. Deploy the release that has applied it, or start with an empty database",
                migration.version
            ),
        }
    }
    Ok(Difference { missing, newer: applied.into_keys().collect() })
}

/// Applies the missing migrations, one transaction each. Crash or time-out in one: Postgres rolls
/// it back, and the next attempt begins with it. One process migrates at a time. The others do not
/// wait inside a statement: its snapshot would block `create index concurrently`.
async fn apply(db: &mut PgConnection, migrations: &Migrator, missing: &[i64]) -> anyhow::Result<()> {
    let locked = sqlx::query_scalar("select pg_try_advisory_lock($1)").bind(MIGRATION_LOCK).fetch_one(&mut *db);
    if !answered(locked).await? {
        return Err(Busy.into());
    }
    let mut migrator = Migrator::with_migrations(migrations.iter().cloned().collect());
    migrator.set_ignore_missing(true).set_locking(false);
    for version in missing {
        // Outside a transaction a migration waits without blocking others: `create index
        // concurrently` would leave an invalid index if it gave up.
        let waits = migrations.iter().any(|migration| migration.version == *version && migration.no_tx);
        let limit = if waits { "0" } else { LOCK_TIMEOUT };
        let set = sqlx::query("select set_config('lock_timeout', $1, false)").bind(limit);
        answered(set.execute(&mut *db)).await?;
        migrator.run_to(*version, &mut *db).await.with_context(|| format!("cannot apply the migration {version}"))?;
    }
    Ok(())
}

#[derive(Debug, thiserror::Error)]
#[error("another process migrates the database")]
struct Busy;

/// Another session holds a lock: the migrator's, or one on a table.
fn is_busy(error: &anyhow::Error) -> bool {
    error.is::<Busy>() || code(error).is_some_and(|code| ["55P03", "40P01"].contains(&&*code))
}

/// Whether the server is down, is starting, has too many clients, or is read-only, as during a
/// failover. A wrong password and a failing migration are not transient.
fn is_transient(error: &anyhow::Error) -> bool {
    use sqlx::Error::{Io, PoolClosed, PoolTimedOut, Protocol, WorkerCrashed};
    // 57P0x: starting up, shutting down, ended as idle; 53xxx: out of connections; 08xxx: the
    // connection broke; 25P03: idle in a transaction for too long; 25006: a read-only session.
    const CODES: [&str; 5] = ["57P", "53", "08", "25P03", "25006"];
    match cause(error) {
        // Protocol: a proxy without a server behind it closes the connection before any answer.
        Some(Io(_) | Protocol(_) | PoolTimedOut | PoolClosed | WorkerCrashed) => true,
        _ => code(error).is_some_and(|code| CODES.iter().any(|class| code.starts_with(class))),
    }
}

fn code(error: &anyhow::Error) -> Option<String> {
    let code = cause(error)?.as_database_error()?.code()?;
    Some(code.into_owned())
}

fn cause(error: &anyhow::Error) -> Option<&sqlx::Error> {
    error.chain().find_map(|cause| match cause.downcast_ref() {
        Some(MigrateError::Execute(cause) | MigrateError::ExecuteMigration(cause, _)) => Some(cause),
        _ => cause.downcast_ref(),
    })
}
