//! `analytics rebuild`: folds the whole log anew into a schema of its own, beside the live model, which goes on being written and
//! read. When both have the same events they are compared and, in the same transaction, exchanged.
//!
//! Why it is right: the exchange commits only while nothing can write to the live model, and only when the rebuilt one has every
//! event that the live one has. So whatever the live groups have committed in Kafka is true of the new tables as well: they just
//! go on. And because the new tables take over the old ones' names, no process has to be told, not even a frozen one.

mod swap;

use std::time::{Duration, Instant};

use anyhow::{Context, bail, ensure};
use secrecy::ExposeSecret;
use shared::events::mint_id;
use shared::fault;
use shared::messaging::{Inbox, Replay};
use shared::service;
use sqlx::postgres::PgConnectOptions;
use sqlx::{AssertSqlSafe, ConnectOptions, Connection, PgConnection};

use crate::projections::{Mailed, Registered};
use crate::{Config, EMAILS, MIGRATIONS, USERS};

/// Of the session that holds the lock and makes the swap. Frozen or cut off in the middle of the swap, it lets the live model go
/// after 5 s; otherwise it keeps no other rebuild away for more than a minute.
const SESSION_LIMITS: [(&str, &str); 4] = [
    ("idle_session_timeout", "60s"),
    ("idle_in_transaction_session_timeout", "5s"),
    // Readers who come while the swap waits for a lock wait behind it, and for no longer than this either.
    ("lock_timeout", "2s"),
    // The comparison of large models takes a while.
    ("statement_timeout", "60s"),
];
/// Migrations run without the limits above, but a frozen process must not keep their lock.
const MIGRATION_LIMITS: (&str, &str) = ("idle_session_timeout", "15s");
/// The advisory lock's key: any number, the same in every release. Locks are per database.
const REBUILD_LOCK: i64 = 0x72_6562_7569_6C64; // "rebuild"
/// Offsets that may be left to be read while the live model is kept from changing: some tenths of a second.
const REMAINDER: i64 = 5_000;
const SWAP_ATTEMPTS: u32 = 10;
const POLL_INTERVAL: Duration = Duration::from_millis(100);

/// The subcommand `rebuild`.
#[derive(clap::Args, Clone)]
pub struct Rebuild {
    /// Swap although the rebuilt tables differ from the live ones. A changed projection is rebuilt for just that; look at the
    /// differences first.
    #[arg(long)]
    accept_differences: bool,
    /// Swap although Kafka does not have all events of the live model any more: their effects are given up.
    #[arg(long)]
    accept_lost_history: bool,
    /// How long the running service may take to come to where the rebuild has read, in seconds.
    #[arg(long, default_value_t = 30)]
    wait_seconds: u64,
}

/// Both topics, on their way into the rebuilt model.
struct Replays {
    users: Replay<Registered>,
    emails: Replay<Mailed>,
}

/// Crash anywhere before the swap's commit: the live model is as it was, and the next rebuild drops the unfinished schema and
/// starts over. Crash after it: all is done. Frozen and thawed: the lock is gone, and with it the session that could swap; what
/// is still written goes to a schema that nobody reads, or that is gone.
pub async fn run(config: Config, options: Rebuild) -> anyhow::Result<()> {
    let url = config.analytics_database_url.expose_secret();
    let database: PgConnectOptions =
        url.parse().context("the database URL is not postgres://user:password@host:port/name")?;
    let mut live = lock(&database).await?;
    let schema = create_schema(&mut live, &database).await?;
    say(&format!("rebuilding in the schema {schema}"));
    fault::point("rebuild.created");

    let rebuilt = service::pool(database.options([("search_path", &schema)]));
    let kafka = &config.service.kafka;
    let mut replays = Replays {
        users: Replay::new(kafka, USERS, Inbox::new(USERS, rebuilt.clone(), Registered))?,
        emails: Replay::new(kafka, EMAILS, Inbox::new(EMAILS, rebuilt, Mailed))?,
    };
    replays.require_history(&options)?;
    for _ in 0..SWAP_ATTEMPTS {
        replays.catch_up(&mut live, Duration::from_secs(options.wait_seconds)).await?;
        fault::point("rebuild.caught_up");
        match swap::swap(&mut live, &schema, &replays, &options).await {
            Err(error) if swap::is_busy(&error) => say(&format!("trying again: {error:#}")),
            done => return done,
        }
    }
    bail!(
        "{SWAP_ATTEMPTS} times the live tables were locked by somebody else: look for long transactions and run this again"
    )
}

#[expect(clippy::print_stdout, reason = "it is what the subcommand answers")]
fn say(line: &str) {
    println!("{line}");
}

/// The session on which everything is asked and done that concerns the live model. It alone can swap, and it holds the lock.
async fn lock(database: &PgConnectOptions) -> anyhow::Result<PgConnection> {
    let mut live =
        database.clone().options(SESSION_LIMITS).connect().await.context("cannot connect to the database")?;
    // Waits a moment, because the session of a rebuild that was just killed ends a moment later.
    let locked = sqlx::query("select pg_advisory_lock($1)").bind(REBUILD_LOCK).execute(&mut live).await;
    locked.map_err(anyhow::Error::new).map_err(|error| match swap::is_busy(&error) {
        true => error.context("another rebuild is running: wait for its end, or end it"),
        false => error,
    })?;
    Ok(live)
}

/// A new schema with the same empty tables, made by the same migrations. Its name is never used again: what a frozen rebuild
/// writes later finds no table. What earlier rebuilds left goes; it is theirs no more, since we hold the lock.
async fn create_schema(live: &mut PgConnection, database: &PgConnectOptions) -> anyhow::Result<String> {
    let left: Vec<String> =
        sqlx::query_scalar(r"select nspname::text from pg_namespace where nspname like 'rebuild\_%'")
            .fetch_all(&mut *live)
            .await?;
    for schema in left {
        let dropped = execute(live, format!("drop schema {schema} cascade")).await;
        dropped.with_context(|| format!("cannot drop {schema}, which an earlier rebuild left"))?;
    }
    let schema = format!("rebuild_{}", mint_id().simple());
    execute(live, format!("create schema {schema}")).await.context("cannot create a schema")?;
    let limits = [MIGRATION_LIMITS, ("search_path", &schema)];
    let mut connection = database.clone().options(limits).connect().await?;
    MIGRATIONS.run(&mut connection).await.context("cannot create the tables")?;
    connection.close().await?;
    Ok(schema)
}

/// Names cannot be parameters; all in here are our own or quoted by Postgres.
async fn execute(db: &mut PgConnection, statement: String) -> sqlx::Result<()> {
    sqlx::raw_sql(AssertSqlSafe(statement)).execute(db).await.map(drop)
}

impl Replays {
    /// A rebuild can fold only what Kafka still has.
    fn require_history(&self, options: &Rebuild) -> anyhow::Result<()> {
        let topics = [(self.users.topic(), self.users.truncated()), (self.emails.topic(), self.emails.truncated())];
        for (topic, truncated) in topics {
            if truncated == 0 {
                continue;
            }
            ensure!(
                options.accept_lost_history,
                "Kafka has deleted the first {truncated} offsets of {topic}: a rebuild would lose their effects. Find out what \
                 deleted them (facts are kept for ever: retention.ms=-1); --accept-lost-history rebuilds from the rest"
            );
            say(&format!("warning: {truncated} offsets of {topic} are gone and will not be in the rebuilt model"));
        }
        Ok(())
    }

    /// Afterwards the rebuilt model has everything up to a fixed point, the live model has passed that point, and little has come
    /// since. Events before the point that the live model still does not have, it has passed over: they are dead letters, or of
    /// a type that its release did not know. The rebuilt model has those that its projections take.
    async fn catch_up(&mut self, live: &mut PgConnection, wait: Duration) -> anyhow::Result<()> {
        loop {
            self.users.advance(live).await?;
            self.emails.advance(live).await?;
            let deadline = Instant::now() + wait;
            loop {
                let behind = self.users.live_is_behind()? + self.emails.live_is_behind()?;
                if behind == 0 {
                    break;
                }
                ensure!(
                    Instant::now() < deadline,
                    "the live model is {behind} offsets behind the rebuilt one and did not come up within {wait:?}: is the \
                     service running? let it catch up and run this again, or give it more time by --wait-seconds"
                );
                tokio::time::sleep(POLL_INTERVAL).await;
                // A session that is idle for too long is ended, and with it the lock; and a lost one is noticed here.
                sqlx::query("select 1").execute(&mut *live).await.context("the live database does not answer")?;
            }
            if self.users.remaining()? + self.emails.remaining()? <= REMAINDER {
                return Ok(());
            }
        }
    }

    /// Gives the rebuilt model what the live one has got since.
    async fn complete(&self, live: &mut PgConnection) -> anyhow::Result<()> {
        self.users.complete(live).await?;
        self.emails.complete(live).await
    }
}
