//! Which replica's relay leads, and how the others wake it.

use std::sync::Arc;

use anyhow::Context;
use sqlx::PgConnection;
use sqlx::postgres::{PgConnectOptions, PgListener, PgPoolOptions};
use tokio::sync::Notify;
use tokio::time::{Duration, Instant, sleep, timeout};
use tokio_util::sync::CancellationToken;

use super::rows;
use crate::platform::database::{bounded, session};
use crate::platform::metrics::Metrics;

/// How often a follower tries to take the lock.
const ELECTION_INTERVAL: Duration = Duration::from_millis(500);
/// How soon a lost connection for notifications is replaced.
const RECONNECT_INTERVAL: Duration = Duration::from_secs(1);
/// The leader polls continuously, and uses its session while it waits for a round. So a session that
/// is idle for this long belongs to a frozen process. Postgres closes it, which releases the lock.
///
/// The plans of its few statements are made once: by an index, whatever the statistics say. They
/// may be from a time when the table was almost empty.
const SESSION_SETTINGS: [(&str, &str); 6] = [
    ("idle_session_timeout", "15s"),
    ("statement_timeout", "5s"),
    ("idle_in_transaction_session_timeout", "10s"),
    ("plan_cache_mode", "force_generic_plan"),
    ("enable_seqscan", "off"),
    // The rows of a round are sorted if some are left out. By default the sort would write them to
    // disk.
    ("work_mem", "32MB"),
];

/// Notifies the relay of new rows.
#[derive(Clone, Default)]
pub struct Wake {
    /// Rows that this process wrote.
    local: Arc<Notify>,
    /// Rows that another process wrote.
    remote: Arc<Notify>,
}

impl Wake {
    /// Call it after the commit. If this process leads, its relay publishes at once; otherwise it
    /// notifies the leader. If the notification is lost (a crash), publishing is delayed by one
    /// poll interval.
    pub fn notify(&self) {
        self.local.notify_one();
    }

    /// Waits for new rows, for at most `limit`. Returns whether it was notified.
    pub(super) async fn wait(&self, limit: Duration) -> bool {
        let notified = async {
            tokio::select! {
                () = self.local.notified() => {}
                () = self.remote.notified() => {}
            }
        };
        timeout(limit, notified).await.is_ok()
    }
}

/// The names of an outbox on shared servers. They follow from the database, the schema and a
/// setting. All replicas of all releases must agree on them: two leaders with different names would
/// not exclude each other.
pub(super) struct Names {
    /// The key of the advisory lock. Locks are per database.
    lock: i64,
    /// The channel of notifications. Channels are per database.
    channel: String,
    /// The producer's `transactional.id`, without the topic prefix.
    pub transactional_id: String,
}

impl Names {
    async fn of(db: &mut PgConnection, outbox: &str) -> sqlx::Result<Self> {
        let query = sqlx::query_as(
            "select current_database(), current_schema(), ('x' || substr(md5(current_schema() || '/' || $1), 1, 16))::bit(64)::bigint",
        );
        let (database, schema, lock): (String, String, i64) = bounded(query.bind(outbox).fetch_one(db)).await?;
        let suffix = if outbox.is_empty() { String::new() } else { format!(".{outbox}") };
        Ok(Self {
            lock,
            channel: channel(&schema, outbox),
            transactional_id: format!("{database}.{schema}{suffix}.relay"),
        })
    }
}

fn channel(schema: &str, outbox: &str) -> String {
    format!("outbox/{schema}/{outbox}")
}

/// Takes part in the election of one outbox.
pub(super) struct Election<'a> {
    pub database: &'a PgConnectOptions,
    /// The setting OUTBOX_NAME.
    pub outbox: &'a str,
    pub wake: &'a Wake,
    pub stop: &'a CancellationToken,
    pub metrics: &'a Metrics,
}

impl Election<'_> {
    /// Waits for the lock. While it waits, it passes notifications of this process to the leader,
    /// on this connection and never within a request's transaction: `NOTIFY` there would serialise
    /// all commits. Calls `waiting` when another relay leads. `None`: the process stops.
    pub async fn win(&self, waiting: impl Fn()) -> anyhow::Result<Option<(PgConnection, Names)>> {
        // Checked in each term: a pooler that was switched to transaction mode would hand out the
        // lock more than once.
        let mut db = session(self.database, "relay", &SESSION_SETTINGS).await?;
        let names = Names::of(&mut db, self.outbox).await.context("cannot read the name of the database")?;
        let mut measured_at: Option<Instant> = None;
        while !self.stop.is_cancelled() {
            let query = sqlx::query_scalar("select pg_try_advisory_lock($1)").bind(names.lock);
            if bounded(query.fetch_one(&mut db)).await.context("cannot take the advisory lock of the relay")? {
                return Ok(Some((db, names)));
            }
            if measured_at.is_none() {
                self.metrics.reset_leaders();
                waiting();
                tracing::info!(transactional_id = names.transactional_id, "another relay leads this outbox; waiting");
            }
            if measured_at.is_none_or(|at| at.elapsed() >= rows::MEASURE_INTERVAL) {
                rows::report_size(&mut db, self.metrics).await;
                measured_at = Some(Instant::now());
            }
            tokio::select! {
                () = self.wake.local.notified() => {
                    let notify = sqlx::query("select pg_notify($1, '')").bind(&names.channel);
                    bounded(notify.execute(&mut db)).await.context("cannot notify the leader of the outbox")?;
                }
                () = sleep(ELECTION_INTERVAL) => {}
                () = self.stop.cancelled() => {}
            }
        }
        Ok(None)
    }
}

/// Listens for notifications of other replicas, on a connection of its own. A follower listens too,
/// so that nothing has to be set up when it becomes leader.
pub(crate) async fn listen(database: PgConnectOptions, outbox: String, wake: Wake) -> anyhow::Result<()> {
    let options = database.application_name("relay listener");
    let pool = PgPoolOptions::new().max_connections(1).connect_lazy_with(options);
    loop {
        if let Err(error) = receive(&pool, &outbox, &wake).await {
            tracing::debug!(%error, "cannot listen for notifications of other relays; will retry");
        }
        sleep(RECONNECT_INTERVAL).await;
    }
}

async fn receive(pool: &sqlx::PgPool, outbox: &str, wake: &Wake) -> sqlx::Result<()> {
    let mut listener = PgListener::connect_with(pool).await?;
    let schema: String = sqlx::query_scalar("select current_schema()").fetch_one(&mut listener).await?;
    listener.listen(&channel(&schema, outbox)).await?;
    loop {
        // `None`: the connection was lost and replaced; notifications may be missing.
        listener.try_recv().await?;
        wake.remote.notify_one();
    }
}
