//! The id at which the next read of the outbox begins. Postgres keeps the index entry of a deleted
//! row until the next vacuum. A read from the beginning of the index passes over the entries of all
//! rows that were deleted since then. So with a large backlog each round would cost more than the
//! round before.
//!
//! A read may begin at an id if no row with a lower id exists and none can appear. Transactions do
//! not commit in the order in which they took their ids, so a row with a low id may appear late.
//! Therefore the read begins later only within the *settled* ids: every transaction that may have
//! taken one of them has ended.

use std::collections::HashSet;
use std::time::Instant;

use sqlx::PgConnection;
use tokio::time::Duration;

use super::rows::Batch;

/// How often the settled ids are determined, while there is a backlog.
const SETTLE_INTERVAL: Duration = Duration::from_secs(1);

/// Owned by one term as leader: after a failover the database may have other transactions.
pub struct LowerBound {
    /// No row with a lower id exists, and none can appear.
    first: i64,
    /// Every transaction that took an id up to this one has ended.
    settled: i64,
    /// Becomes the next settled id.
    observation: Option<Observation>,
    /// Whether the last read was full.
    has_backlog: bool,
    observe_at: Instant,
}

/// The result of [`observe`].
struct Observation {
    /// The highest id.
    newest: i64,
    /// The transactions that might insert rows with lower ids.
    writers: HashSet<String>,
}

impl LowerBound {
    pub fn new() -> Self {
        Self { first: i64::MIN, settled: i64::MIN, observation: None, has_backlog: false, observe_at: Instant::now() }
    }

    /// The id at which the next read begins.
    pub fn first(&self) -> i64 {
        self.first
    }

    /// Determines the settled ids, at most once per [`SETTLE_INTERVAL`] and only while there is a
    /// backlog. While a transaction with a lower id may still commit, the settled ids do not grow,
    /// and the lower bound stops at them.
    pub async fn settle(&mut self, db: &mut PgConnection) -> sqlx::Result<()> {
        if !self.has_backlog || Instant::now() < self.observe_at {
            return Ok(());
        }
        self.observe_at = Instant::now() + SETTLE_INTERVAL;
        let seen = observe(db).await?;
        let earlier = self.observation.take();
        let is_settled = |earlier: &Observation| earlier.writers.is_disjoint(&seen.writers);
        match earlier {
            Some(earlier) if is_settled(&earlier) => self.settled = earlier.newest,
            Some(earlier) => {
                self.observation = Some(earlier);
                return Ok(());
            }
            None => {}
        }
        if seen.writers.is_empty() {
            self.settled = seen.newest;
        } else {
            self.observation = Some(seen);
        }
        Ok(())
    }

    /// Moves the lower bound after a read. Rows in flight count, because they are still in the
    /// outbox and are read again if Kafka rejects their round. There is no lower bound after a read
    /// that was not full, because it reached the end of the outbox. Nor after a read that excluded
    /// rows, because the excluded rows may have lower ids.
    pub fn note(&mut self, batch: &Batch, in_flight: &[i64], has_excluded: bool) {
        if !batch.is_full || has_excluded {
            *self = Self::new();
            return;
        }
        self.has_backlog = true;
        let lowest = batch.rows.iter().map(|row| row.id).chain(in_flight.iter().copied()).min();
        if let Some(lowest) = lowest.filter(|lowest| *lowest <= self.settled) {
            self.first = lowest;
        }
    }
}

/// Reads the highest id, and the transactions that hold the lock of a writer.
///
/// A transaction locks the table before it takes an id, and holds the lock until it ends. Postgres
/// takes the snapshot of this statement before it reads the locks. So a transaction with an id
/// below `newest` is in `writers`, or it has ended and the next statement sees its rows.
async fn observe(db: &mut PgConnection) -> sqlx::Result<Observation> {
    let query = "select coalesce((select max(id) from outbox), 0),
                     array(select virtualtransaction from pg_locks
                           where locktype = 'relation' and mode = 'RowExclusiveLock' and relation = 'outbox'::regclass
                               and database = (select oid from pg_database where datname = current_database()))";
    let (newest, writers): (i64, Vec<String>) = sqlx::query_as(query).fetch_one(db).await?;
    Ok(Observation { newest, writers: writers.into_iter().collect() })
}
