//! `analytics rebuild`: folds the whole log into a new schema, while the service writes and reads the live model. When both
//! contain the same events, one transaction compares them and swaps them.
//!
//! Why this is correct: the swap commits only while no process can write to the live model, and only if the rebuilt model
//! contains every event of the live one. So the offsets that the live groups have committed in Kafka are also true of the
//! new tables, and the groups simply continue. The new tables take over the names of the old ones, so no process needs to
//! be notified, not even a frozen one.

mod swap;

use std::time::{Duration, Instant};

use anyhow::{Context, bail, ensure};
use secrecy::ExposeSecret;
use shared::events::mint_id;
use shared::fault;
use shared::messaging::{Inbox, Replay};
use shared::platform::database;
use sqlx::postgres::PgConnectOptions;
use sqlx::{AssertSqlSafe, ConnectOptions, Connection, PgConnection};

use crate::projections::{Mailed, Registered};
use crate::{Config, MIGRATIONS};

/// Limits of the session that holds the lock and swaps. If the rebuild freezes during the swap, Postgres closes its session
/// after 5 s; at any other point, after a minute.
const SESSION_LIMITS: [(&str, &str); 4] = [
    ("idle_session_timeout", "60s"),
    ("idle_in_transaction_session_timeout", "5s"),
    // Also bounds how long readers wait behind a swap that waits for a lock.
    ("lock_timeout", "2s"),
    // Comparing large models takes long.
    ("statement_timeout", "60s"),
];
/// The session that migrates has none of the limits above, but a frozen process must not keep the migration lock.
const MIGRATION_LIMITS: (&str, &str) = ("idle_session_timeout", "15s");
/// The key of the advisory lock. Any number that is the same in every release; advisory locks are per database.
const REBUILD_LOCK: i64 = 0x72_6562_7569_6C64; // "rebuild"
/// How many offsets may remain to be read while the live model is locked. They take some tenths of a second.
const REMAINDER: i64 = 5_000;
const SWAP_ATTEMPTS: u32 = 10;
const POLL_INTERVAL: Duration = Duration::from_millis(100);

/// The subcommand `rebuild`.
#[derive(clap::Args, Clone)]
pub struct Rebuild {
    /// Swap even if the rebuilt tables differ from the live ones. After a change of a projection they differ on purpose; check
    /// the printed differences first.
    #[arg(long)]
    accept_differences: bool,
    /// Swap even if Kafka has deleted events that the live model contains. Their effects are lost.
    #[arg(long)]
    accept_lost_history: bool,
    /// How long to wait until the running service has read as far as the rebuild, in seconds.
    #[arg(long, default_value_t = 30)]
    wait_seconds: u64,
}

/// The replays of both topics into the rebuilt model.
struct Replays {
    users: Replay<Registered>,
    emails: Replay<Mailed>,
}

/// Crash anywhere before the swap's commit: the live model is unchanged, and the next rebuild drops the unfinished schema
/// and starts from the beginning. Crash after it: the rebuild is complete. Frozen and resumed: Postgres has closed the
/// session that holds the lock and that alone could swap. Later writes go to a schema that no process reads, or that was
/// dropped.
pub async fn run(config: Config, options: Rebuild) -> anyhow::Result<()> {
    let url = config.analytics_database_url.expose_secret();
    let server: PgConnectOptions =
        url.parse().context("the database URL is not postgres://user:password@host:port/name")?;
    let mut live = lock(&server).await?;
    let schema = create_schema(&mut live, &server).await?;
    print_line(&format!("rebuilding in the schema {schema}"));
    fault::point("rebuild.created");

    let rebuilt = database::pool(server.options([("search_path", &schema)]));
    let kafka = &config.service.kafka;
    let mut replays = Replays {
        users: Replay::new(kafka, Inbox::new(rebuilt.clone(), Registered))?,
        emails: Replay::new(kafka, Inbox::new(rebuilt, Mailed))?,
    };
    replays.require_history(&options)?;
    for _ in 0..SWAP_ATTEMPTS {
        replays.catch_up(&mut live, Duration::from_secs(options.wait_seconds)).await?;
        fault::point("rebuild.caught_up");
        match swap::swap(&mut live, &schema, &replays, &options).await {
            Err(error) if swap::is_busy(&error) => print_line(&format!("will retry the swap: {error:#}")),
            done => return done,
        }
    }
    bail!(
        "the live tables were locked by another session in {SWAP_ATTEMPTS} attempts: look for long transactions, then run this \
         again"
    )
}

#[expect(clippy::print_stdout, reason = "the output of the subcommand")]
fn print_line(line: &str) {
    println!("{line}");
}

/// Opens the session for all statements on the live model. It holds the lock, and it alone can swap.
async fn lock(server: &PgConnectOptions) -> anyhow::Result<PgConnection> {
    let mut live = server.clone().options(SESSION_LIMITS).connect().await.context("cannot connect to the database")?;
    // Waits up to the lock time-out, because the session of a rebuild that was just killed ends a little later.
    let locked = sqlx::query("select pg_advisory_lock($1)").bind(REBUILD_LOCK).execute(&mut live).await;
    locked.map_err(anyhow::Error::new).map_err(|error| match swap::is_busy(&error) {
        true => error.context("another rebuild is running: wait until it ends, or stop it"),
        false => error,
    })?;
    Ok(live)
}

/// Creates a schema with the same empty tables, by the same migrations. Its name is never reused, so later writes of a
/// frozen rebuild find no table. Drops the schemas of earlier rebuilds: this process holds the lock, so none of them runs.
async fn create_schema(live: &mut PgConnection, server: &PgConnectOptions) -> anyhow::Result<String> {
    let left: Vec<String> =
        sqlx::query_scalar(r"select nspname::text from pg_namespace where nspname like 'rebuild\_%'")
            .fetch_all(&mut *live)
            .await?;
    for schema in left {
        let dropped = execute(live, format!("drop schema {schema} cascade")).await;
        dropped.with_context(|| format!("cannot drop the schema {schema} of an earlier rebuild"))?;
    }
    let schema = format!("rebuild_{}", mint_id().simple());
    execute(live, format!("create schema {schema}")).await.context("cannot create the schema of the rebuild")?;
    let limits = [MIGRATION_LIMITS, ("search_path", &schema)];
    let mut connection = server.clone().options(limits).connect().await?;
    MIGRATIONS.run(&mut connection).await.context("cannot create the tables of the rebuild")?;
    connection.close().await?;
    Ok(schema)
}

/// Runs a statement with names in it, which cannot be parameters. All names are our own or quoted by Postgres.
async fn execute(db: &mut PgConnection, statement: String) -> sqlx::Result<()> {
    sqlx::raw_sql(AssertSqlSafe(statement)).execute(db).await.map(drop)
}

impl Replays {
    /// Checks that Kafka still has the whole history: a rebuild cannot fold deleted events.
    fn require_history(&self, options: &Rebuild) -> anyhow::Result<()> {
        let topics = [(self.users.topic(), self.users.truncated()), (self.emails.topic(), self.emails.truncated())];
        for (topic, truncated) in topics {
            if truncated == 0 {
                continue;
            }
            ensure!(
                options.accept_lost_history,
                "Kafka has deleted the first {truncated} offsets of {topic}: a rebuild would lose their effects. Find out what \
                 deleted them (facts have retention.ms=-1). --accept-lost-history rebuilds from the remaining events"
            );
            print_line(&format!(
                "warning: Kafka has deleted {truncated} offsets of {topic}; the rebuilt model lacks their effects"
            ));
        }
        Ok(())
    }

    /// Afterwards the rebuilt model has applied everything up to a fixed point, the live model has passed that point, and few
    /// events came later. If the live model lacks an event before the point, it skipped the event: the event is a dead
    /// letter, or the release did not know its type. The rebuilt model contains those that its projections accept.
    async fn catch_up(&mut self, live: &mut PgConnection, wait: Duration) -> anyhow::Result<()> {
        loop {
            self.users.advance(live).await?;
            self.emails.advance(live).await?;
            let deadline = Instant::now() + wait;
            loop {
                let lag = self.users.live_lag()? + self.emails.live_lag()?;
                if lag == 0 {
                    break;
                }
                ensure!(
                    Instant::now() < deadline,
                    "the live model has {lag} offsets left to read to reach the rebuilt one, and did not within {wait:?}: is the \
                     service running? Let it catch up and run this again, or allow more time with --wait-seconds"
                );
                tokio::time::sleep(POLL_INTERVAL).await;
                // Keeps the session from its idle time-out, which would release the lock, and notices a lost session.
                sqlx::query("select 1").execute(&mut *live).await.context("the live database does not answer")?;
            }
            if self.users.remaining()? + self.emails.remaining()? <= REMAINDER {
                return Ok(());
            }
        }
    }

    /// Applies the events that the live model has applied since the last catch-up.
    async fn complete(&self, live: &mut PgConnection) -> anyhow::Result<()> {
        self.users.complete(live).await?;
        self.emails.complete(live).await
    }
}
