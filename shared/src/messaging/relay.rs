//! The relay: brings the outbox to Kafka, in order, every row at least once. What is published more than once has the same
//! event id.
//!
//! One leader per outbox, by a session advisory lock. Rows are read and deleted on the very connection that holds the lock, so
//! losing it stops both. What the lock cannot stop is a frozen leader's late send: that is fenced by Kafka itself, since each
//! round is a transaction of one `transactional.id`, and a new leader's `init_transactions` ends its predecessor's.
//!
//! It runs on a thread of its own: librdkafka's transaction calls block.

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

use crate::events::Envelope;
use crate::fault;
use crate::service::metrics::{Metrics, Round};
use crate::service::{KafkaConfig, bounded, telemetry};

mod transaction;

use transaction::{Refused, Transactions};

/// Rows per transaction: large enough that a transaction's cost (about 3 ms) does not count.
const ROUND_ROWS: i64 = 500;
/// Rows of any size that are allowed have to be read, sent and acknowledged within the time-outs of a round.
const ROUND_BYTES: i64 = 4 << 20;
/// Rows that another replica wrote are found after this time at the latest.
const POLL_INTERVAL: Duration = Duration::from_millis(200);
const RETRY_INTERVAL: Duration = Duration::from_millis(500);
/// How often a follower asks for the lock.
const ELECTION_INTERVAL: Duration = Duration::from_millis(500);
/// After this time a key that Kafka refused is tried again.
const BLOCKED_FOR: Duration = Duration::from_secs(30);
/// The leader asks for rows all the time, so a session this silent belongs to a frozen process: Postgres ends it, and with it
/// the lock.
const SESSION_LIMITS: [(&str, &str); 3] =
    [("idle_session_timeout", "15s"), ("statement_timeout", "5s"), ("idle_in_transaction_session_timeout", "10s")];
/// The advisory lock's key: any number, the same in every release. Locks are per database.
const LEADER_LOCK: i64 = 0x6F75_7462_6F78; // "outbox"

/// Tells the relay of this process that there are new rows.
#[derive(Clone, Default)]
pub struct Wake(Arc<Notify>);

impl Wake {
    /// Call it after the commit. Losing the call (a crash, another replica leading) costs one poll interval.
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
    /// Leads whenever it can, until told to stop. Any error ends the term: the producer and the connection are dropped and
    /// everything starts over, which is safe at every line.
    pub fn run(self) -> anyhow::Result<()> {
        while !self.stop.is_cancelled() {
            if let Err(error) = self.lead() {
                self.metrics.relay_rounds.get_or_create(&Round { outcome: "failed" }).inc();
                tracing::warn!(error = %format!("{error:#}"), "the relay starts over");
                self.pause(RETRY_INTERVAL);
            }
        }
        Ok(())
    }

    /// One term as leader. The lock is held before `init_transactions` fences the predecessor, and that before the first row is
    /// read: so no row is read that a predecessor could still publish later.
    fn lead(&self) -> anyhow::Result<()> {
        let runtime = Handle::current();
        self.metrics.outbox_blocked_keys.set(0); // another's concern while it leads
        let Some(mut db) = runtime.block_on(self.elected())? else { return Ok(()) };
        let name: String =
            runtime.block_on(bounded(sqlx::query_scalar("select current_database()").fetch_one(&mut db)))?;
        let mut transactions = Transactions::begin_term(&self.kafka, &name)?;
        tracing::info!("this relay leads");
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
                    // The producer is dropped, never aborted and reused: nothing of the round becomes visible.
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
        runtime.block_on(db.close()).context("cannot close the relay's connection")
    }

    /// The keys of rows that Kafka refused for themselves; any other error ends the term.
    fn refused(&self, error: &anyhow::Error) -> anyhow::Result<Vec<Uuid>> {
        let Some(refused) = error.downcast_ref::<Refused>() else { bail!("{error:#}") };
        tracing::error!(keys = ?refused.keys, error = %refused.cause, "Kafka refuses outbox rows: their keys are set aside");
        self.metrics.relay_rounds.get_or_create(&Round { outcome: "failed" }).inc();
        Ok(refused.keys.clone())
    }

    /// Read → publish → delete. Crash before the Kafka commit: the transaction is aborted and nothing of it is seen; the rows
    /// are still there. Crash between commit and delete: the rows are published again, at new offsets, with the same event
    /// ids: consumers know them. No database transaction is open while Kafka is waited for.
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
            let (topic, envelope) = (self.kafka.prefixed(&row.topic), row.envelope.into_envelope(&self.source));
            telemetry::link(&span, &telemetry::TraceContext::of(&envelope));
            (topic, envelope, row.payload)
        });
        transactions.publish(records.collect())?;
        fault::point("relay.after_commit");
        self.settle(runtime, db, &ids)?;
        fault::point("relay.after_delete");
        span.set_attribute("messaging.batch.message_count", ids.len() as i64);
        self.metrics.relay_rounds.get_or_create(&Round { outcome: "published" }).inc();
        Ok(ids.len())
    }

    /// Deletes what Kafka has. Where Postgres answers that it will not (the table is locked, the database read-only), it is asked
    /// again, by the session that holds the lock: to start over would publish the same rows again each time. Crash meanwhile: they are
    /// published once more, by whoever leads next.
    fn settle(&self, runtime: &Handle, db: &mut PgConnection, ids: &[i64]) -> anyhow::Result<()> {
        while let Err(error) = runtime.block_on(bounded(delete(db, ids))) {
            if error.as_database_error().is_none() || self.stop.is_cancelled() {
                return Err(error).context("cannot delete published rows");
            }
            self.metrics.relay_rounds.get_or_create(&Round { outcome: "failed" }).inc();
            tracing::warn!(%error, "cannot delete published rows yet");
            self.pause(RETRY_INTERVAL);
        }
        Ok(())
    }

    /// Waits for the lock. `None`: told to stop.
    async fn elected(&self) -> anyhow::Result<Option<PgConnection>> {
        let options = self.database.clone().application_name("relay").options(SESSION_LIMITS);
        let mut db = bounded(options.connect()).await.context("cannot connect to the outbox")?;
        while !self.stop.is_cancelled() {
            let query = sqlx::query_scalar("select pg_try_advisory_lock($1)").bind(LEADER_LOCK);
            if bounded(query.fetch_one(&mut db)).await.context("cannot ask for the lock")? {
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

/// As many rows as a round may have, and no more bytes than can be sent within its time-outs; but at least one row.
/// By id, without a cursor: a row whose transaction commits late has a low id and is read in the next round. Versions of one
/// key never swap, since the row lock on the aggregate orders their transactions.
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
