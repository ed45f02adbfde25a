//! `analytics rebuild`: folds the whole log into a new schema, while the service writes and reads
//! the live model. When both contain the same events, it compares them, and one transaction swaps
//! them.
//!
//! Why this is correct: the swap commits only while no process can write to the live model, and
//! only if the rebuilt model contains every event of the live one. Nearly all of this is compared
//! before, in a snapshot in which both models have the same events. So the offsets that the live
//! groups have committed in Kafka are also correct for the new tables, and the groups simply
//! continue. The new tables have the names of the old ones, so no process needs to be notified, not
//! even a frozen one.

mod compare;
mod options;
mod replays;
mod session;
mod swap;

pub use options::Rebuild;

use std::time::Duration;

use anyhow::{Context, bail};
use shared::events::mint_id;
use shared::fault;
use shared::messaging::KafkaConfig;
use shared::platform::database;
use sqlx::migrate::Migrator;
use sqlx::postgres::PgConnectOptions;
use sqlx::{Connection, PgConnection};

use options::print_line;
use replays::Replays;
use session::{connect, execute, is_busy};

/// The session that migrates has none of the limits of the live session, but a frozen process must
/// not keep the migration lock.
const MIGRATION_LIMITS: (&str, &str) = ("idle_session_timeout", "15s");
/// The key of the advisory lock. Every release uses the same number. Advisory locks belong to one
/// database, so other databases may use it too.
const REBUILD_LOCK: i64 = 0x72_6562_7569_6C64; // "rebuild"
const SWAP_ATTEMPTS: u32 = 10;
/// How often the schema of an earlier rebuild is dropped while that rebuild's statements still run.
const DROP_ATTEMPTS: u32 = 5;

/// Runs the subcommand.
///
/// Crash anywhere before the swap's commit: the live model is unchanged, and the next rebuild drops
/// the unfinished schema and starts from the beginning. Crash after it: the rebuild is complete.
/// Frozen and resumed: Postgres has closed the session that holds the lock, and only that session
/// can swap. Later writes go to a schema that no process reads, or that was dropped.
pub async fn run(
    kafka: &KafkaConfig,
    database_url: &str,
    migrations: &Migrator,
    options: &Rebuild,
) -> anyhow::Result<()> {
    let server = database::options(database_url)?;
    let mut live = lock(&server).await?;
    let schema = create_schema(&mut live, &server, migrations).await?;
    print_line(&format!("rebuilding in the schema {schema}"));
    fault::point("rebuild.created");

    let rebuilt = database::pool_with(server.clone(), &[("search_path", &schema)]);
    let mut replays = Replays::new(kafka, rebuilt)?;
    replays.require_history(options)?;
    let mut compared = false;
    for _ in 0..SWAP_ATTEMPTS {
        // The comparison may have taken long.
        if !compared || !replays.few_are_left()? {
            replays.catch_up(&mut live, Duration::from_secs(options.wait_seconds)).await?;
        }
        fault::point("rebuild.caught_up");
        let done = if compared {
            swap::swap(&mut live, &schema, &replays, options).await
        } else {
            compare::compare(&mut live, &server, &schema, &replays, options).await
        };
        match done {
            Ok(()) if compared => return Ok(()),
            Ok(()) => {
                compared = true;
                fault::point("rebuild.compared");
            }
            Err(error) if is_busy(&error) => print_line(&format!("will retry the swap: {error:#}")),
            Err(error) => {
                compare::stop_recording(&mut live).await;
                return Err(error);
            }
        }
    }
    compare::stop_recording(&mut live).await;
    bail!(
        "the live tables were locked by another session in {SWAP_ATTEMPTS} attempts: look for long transactions, then run this \
         again"
    )
}

/// Opens the session for all statements on the live model. It holds the lock, and only it can swap.
async fn lock(server: &PgConnectOptions) -> anyhow::Result<PgConnection> {
    let mut live = connect(server).await?;
    // Waits up to the lock time-out, because the session of a rebuild that was just killed ends a
    // little later.
    let locked = sqlx::query("select pg_advisory_lock($1)").bind(REBUILD_LOCK).execute(&mut live).await;
    if let Err(error) = locked.map_err(anyhow::Error::new) {
        if is_busy(&error) {
            return Err(error.context("another rebuild is running: wait until it ends, or stop it"));
        }
        return Err(error);
    }
    Ok(live)
}

/// The last statement of a rebuild that was killed may still run. Then Postgres reports a deadlock
/// with it, or the statement keeps its locks for longer than the lock time-out. It ends soon,
/// because its session has no client any more.
async fn drop_schema(live: &mut PgConnection, schema: &str) -> anyhow::Result<()> {
    for _ in 1..DROP_ATTEMPTS {
        match execute(live, format!("drop schema {schema} cascade")).await.map_err(anyhow::Error::new) {
            Err(error) if is_busy(&error) => print_line(&format!("will retry to drop {schema}: {error:#}")),
            dropped => return dropped,
        }
    }
    Ok(execute(live, format!("drop schema {schema} cascade")).await?)
}

/// Creates a schema with the same tables, empty, by the same migrations. Its name is never reused,
/// so later writes of a frozen rebuild find no table. Drops the schemas of earlier rebuilds first:
/// this process holds the lock, so no other rebuild runs.
async fn create_schema(
    live: &mut PgConnection,
    server: &PgConnectOptions,
    migrations: &Migrator,
) -> anyhow::Result<String> {
    let leftovers: Vec<String> =
        sqlx::query_scalar(r"select nspname::text from pg_namespace where nspname like 'rebuild\_%'")
            .fetch_all(&mut *live)
            .await?;
    for schema in leftovers {
        let dropped = drop_schema(live, &schema).await;
        dropped.with_context(|| format!("cannot drop the schema {schema} of an earlier rebuild"))?;
    }
    let schema = format!("rebuild_{}", mint_id().simple());
    execute(live, format!("create schema {schema}")).await.context("cannot create the schema of the rebuild")?;
    let limits = [MIGRATION_LIMITS, ("search_path", &schema)];
    let mut connection = database::session(server, "rebuild migrations", &limits).await?;
    migrations.run(&mut connection).await.context("cannot create the tables of the rebuild")?;
    connection.close().await?;
    Ok(schema)
}
