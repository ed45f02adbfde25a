//! The relay publishes the rows of the outbox to Kafka, in order, each at least once. All copies of a row have the same
//! event id.
//!
//! Each outbox has one leader, chosen by a session advisory lock. The leader reads and deletes rows on the connection that
//! holds the lock, so losing the lock stops both. The lock cannot stop records that a frozen leader sends late. Kafka
//! fences those: each round is a transaction of one `transactional.id`, and the `init_transactions` of a new leader ends
//! the transactions of its predecessor.
//!
//! The relay has its own thread, because librdkafka's transaction calls block.

mod transaction;

use std::collections::BTreeSet;
use std::sync::Arc;

use anyhow::{Context, bail};
use sqlx::postgres::PgConnectOptions;
use sqlx::{ConnectOptions, Connection, PgConnection};
use tokio::runtime::Handle;
use tokio::sync::Notify;
use tokio::time::{Duration, sleep, timeout};
use tokio_util::sync::CancellationToken;
use tracing_opentelemetry::OpenTelemetrySpanExt;
use uuid::Uuid;

use super::kafka::KafkaConfig;
use crate::events::Envelope;
use crate::fault;
use crate::platform::database::bounded;
use crate::platform::metrics::{Metrics, RoundLabels};
use crate::platform::telemetry::{self, TraceContext};

use transaction::{Outgoing, Refused, Transactions};

/// Rows per round. With this many rows the cost of a transaction (about 3 ms) is negligible.
const ROUND_ROWS: i64 = 500;
/// Bytes per round, so that rows of the largest allowed size are read, sent and acknowledged within a round's time-outs.
const ROUND_BYTES: i64 = 4 << 20;
/// The longest time until the leader finds a row that another replica wrote.
const POLL_INTERVAL: Duration = Duration::from_millis(200);
const RETRY_INTERVAL: Duration = Duration::from_millis(500);
/// How often a follower tries to take the lock.
const ELECTION_INTERVAL: Duration = Duration::from_millis(500);
/// The time after which blocked keys are tried again.
const BLOCKED_FOR: Duration = Duration::from_secs(30);
/// The leader polls continuously, so a session that is idle for this long belongs to a frozen process. Postgres closes it,
/// which releases the lock.
const SESSION_LIMITS: [(&str, &str); 3] =
    [("idle_session_timeout", "15s"), ("statement_timeout", "5s"), ("idle_in_transaction_session_timeout", "10s")];
/// The key of the advisory lock. Any number that is the same in every release; advisory locks are per database.
const LEADER_LOCK: i64 = 0x6F75_7462_6F78; // "outbox"

/// Notifies the relay of this process of new rows.
#[derive(Clone, Default)]
pub struct Wake(Arc<Notify>);

impl Wake {
    /// Call it after the commit. If the notification is lost (a crash, or another replica leads), publishing is delayed by
    /// one poll interval.
    pub fn notify(&self) {
        self.0.notify_one();
    }
}

pub(crate) struct Relay {
    /// The envelope's `ce_source`.
    pub source: String,
    pub kafka: KafkaConfig,
    pub database: PgConnectOptions,
    pub wake: Wake,
    pub metrics: Metrics,
    pub stop: CancellationToken,
}

#[derive(sqlx::FromRow)]
struct Row {
    id: i64,
    topic: String,
    #[sqlx(flatten)]
    envelope: EnvelopeRow,
    payload: Option<Vec<u8>>,
}

#[derive(sqlx::FromRow)]
struct EnvelopeRow {
    event_id: Uuid,
    aggregateid: Uuid,
    version: i64,
    r#type: String,
    traceparent: Option<String>,
    tracestate: Option<String>,
    occurred_at: time::OffsetDateTime,
}

impl EnvelopeRow {
    fn into_envelope(self, source: &str) -> Envelope {
        Envelope {
            id: self.event_id,
            kind: self.r#type,
            source: source.to_owned(),
            key: self.aggregateid,
            version: self.version,
            time: self.occurred_at,
            traceparent: self.traceparent,
            tracestate: self.tracestate,
        }
    }
}

impl Relay {
    /// Leads whenever it can, until the process stops. Any error ends the term: the producer and the connection are dropped
    /// and a new term begins. This is safe at every line.
    pub fn run(self) -> anyhow::Result<()> {
        while !self.stop.is_cancelled() {
            if let Err(error) = self.lead() {
                self.metrics.relay_rounds.get_or_create(&RoundLabels { outcome: "failed" }).inc();
                tracing::warn!(error = %format!("{error:#}"), "relay lost its term; reconnecting");
                self.pause(RETRY_INTERVAL);
            }
        }
        Ok(())
    }

    /// One term as leader. It takes the lock, then fences the predecessor by `init_transactions`, then reads the first row.
    /// So it never reads a row that a predecessor could still publish later.
    fn lead(&self) -> anyhow::Result<()> {
        let runtime = Handle::current();
        self.metrics.outbox_blocked_keys.set(0); // only the leader reports blocked keys
        let Some(mut db) = runtime.block_on(self.elected())? else { return Ok(()) };
        let name: String =
            runtime.block_on(bounded(sqlx::query_scalar("select current_database()").fetch_one(&mut db)))?;
        let mut transactions = Transactions::begin_term(&self.kafka, &name)?;
        tracing::info!("became outbox relay leader");
        let mut blocked = BTreeSet::new();
        let mut blocked_since = std::time::Instant::now();
        while !self.stop.is_cancelled() {
            if blocked_since.elapsed() > BLOCKED_FOR {
                blocked.clear();
                blocked_since = std::time::Instant::now();
            }
            let published = match self.round(&runtime, &mut db, &mut transactions, &blocked) {
                Ok(published) => published,
                Err(error) => {
                    // The producer is dropped, never aborted and reused. No record of the round becomes visible.
                    blocked.extend(self.refused(&error)?);
                    transactions = Transactions::begin_term(&self.kafka, &name)?;
                    0
                }
            };
            self.metrics.outbox_blocked_keys.set(blocked.len() as i64);
            if published == 0 {
                self.pause(POLL_INTERVAL);
            }
        }
        runtime.block_on(db.close()).context("cannot close the relay's database connection")
    }

    /// The keys of the rows that Kafka rejected. Any other error ends the term.
    fn refused(&self, error: &anyhow::Error) -> anyhow::Result<Vec<Uuid>> {
        let Some(refused) = error.downcast_ref::<Refused>() else { bail!("{error:#}") };
        tracing::error!(keys = ?refused.keys, error = %refused.cause, "Kafka rejects outbox rows; rows of these keys wait");
        self.metrics.relay_rounds.get_or_create(&RoundLabels { outcome: "failed" }).inc();
        Ok(refused.keys.clone())
    }

    /// Read → publish → delete. Crash before the Kafka commit: the transaction is aborted, readers see none of its records,
    /// and the rows are still in the outbox. Crash between commit and delete: the rows are published again, at new offsets,
    /// with the same event ids, and consumers recognise them as duplicates. No database transaction is open while the relay
    /// waits for Kafka.
    fn round(
        &self,
        runtime: &Handle,
        db: &mut PgConnection,
        transactions: &mut Transactions,
        blocked: &BTreeSet<Uuid>,
    ) -> anyhow::Result<usize> {
        let rows = runtime.block_on(bounded(read(db, blocked))).context("cannot read the outbox")?;
        if rows.is_empty() {
            return Ok(0);
        }
        fault::point("relay.after_read");
        let span = tracing::error_span!("publish", rows = rows.len(), "otel.kind" = "producer");
        let ids: Vec<i64> = rows.iter().map(|row| row.id).collect();
        let records = rows.into_iter().map(|row| {
            let topic = self.kafka.prefixed(&row.topic);
            let envelope = row.envelope.into_envelope(&self.source);
            telemetry::link(&span, &TraceContext::of(&envelope));
            Outgoing { topic, envelope, payload: row.payload }
        });
        let records: Vec<Outgoing> = records.collect();
        transactions.publish(&records)?;
        fault::point("relay.after_commit");
        self.delete_published(runtime, db, &ids)?;
        fault::point("relay.after_delete");
        span.set_attribute("messaging.batch.message_count", ids.len() as i64);
        self.metrics.relay_rounds.get_or_create(&RoundLabels { outcome: "published" }).inc();
        Ok(ids.len())
    }

    /// Deletes the rows that Kafka has. If Postgres refuses (the table is locked, the database is read-only), the delete is
    /// retried on the session that holds the lock: a new term would publish the same rows again each time. Crash before
    /// the delete succeeds: the next leader publishes the rows again.
    fn delete_published(&self, runtime: &Handle, db: &mut PgConnection, ids: &[i64]) -> anyhow::Result<()> {
        while let Err(error) = runtime.block_on(bounded(delete(db, ids))) {
            if error.as_database_error().is_none() || self.stop.is_cancelled() {
                return Err(error).context("cannot delete published rows");
            }
            self.metrics.relay_rounds.get_or_create(&RoundLabels { outcome: "failed" }).inc();
            tracing::warn!(%error, "cannot delete published rows; will retry");
            self.pause(RETRY_INTERVAL);
        }
        Ok(())
    }

    /// Waits for the lock. `None`: the process stops.
    async fn elected(&self) -> anyhow::Result<Option<PgConnection>> {
        let options = self.database.clone().application_name("relay").options(SESSION_LIMITS);
        let mut db = bounded(options.connect()).await.context("cannot connect to the database of the outbox")?;
        while !self.stop.is_cancelled() {
            let query = sqlx::query_scalar("select pg_try_advisory_lock($1)").bind(LEADER_LOCK);
            if bounded(query.fetch_one(&mut db)).await.context("cannot take the advisory lock of the relay")? {
                return Ok(Some(db));
            }
            sleep(ELECTION_INTERVAL).await;
        }
        Ok(None)
    }

    fn pause(&self, duration: Duration) {
        Handle::current().block_on(async {
            tokio::select! {
                _ = timeout(duration, self.wake.0.notified()) => {}
                () = self.stop.cancelled() => {}
            }
        });
    }
}

/// The oldest rows, up to the limits of a round, but at least one. Ordered by id and without a cursor: a row whose
/// transaction commits late has a low id and is read in the next round. Versions of one key are always in order, because
/// the row lock on the aggregate orders their transactions.
async fn read(db: &mut PgConnection, blocked: &BTreeSet<Uuid>) -> sqlx::Result<Vec<Row>> {
    sqlx::query_as(
        "select id, event_id, topic, aggregateid, version, type, payload, traceparent, tracestate, occurred_at
         from (select *, sum(octet_length(payload)) over (order by id rows between unbounded preceding and 1 preceding) as before
               from (select * from outbox where aggregateid <> all ($1) order by id limit $2) as oldest) as measured
         where coalesce(before, 0) < $3 order by id",
    )
    .bind(blocked.iter().copied().collect::<Vec<_>>())
    .bind(ROUND_ROWS)
    .bind(ROUND_BYTES)
    .fetch_all(db)
    .await
}

async fn delete(db: &mut PgConnection, ids: &[i64]) -> sqlx::Result<()> {
    sqlx::query("delete from outbox where id = any ($1)").bind(ids).execute(db).await.map(|_| ())
}
