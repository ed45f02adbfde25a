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

/// What a statement saw.
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

    /// Determines the settled ids from time to time, while there is a backlog. A transaction that
    /// is open for long prevents it. Then each read begins where it began before.
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

    /// Notes what was read from [`LowerBound::first`] on. The rows in flight have not been deleted, and
    /// are read again if Kafka rejects their round. A read that is not full has reached the end of
    /// the outbox: the next one begins at the beginning again. So does a read that excludes rows,
    /// because they have lower ids.
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

/// A transaction locks the table before it takes an id, and until its end. So a transaction that took
/// an id below `newest` holds its lock when the locks are read, or its end is visible to the next
/// statement. The statement sees the rows first: Postgres takes its snapshot before it reads the locks.
async fn observe(db: &mut PgConnection) -> sqlx::Result<Observation> {
    let query = "select coalesce((select max(id) from outbox), 0),
                     array(select virtualtransaction from pg_locks
                           where locktype = 'relation' and mode = 'RowExclusiveLock' and relation = 'outbox'::regclass
                               and database = (select oid from pg_database where datname = current_database()))";
    let (newest, writers): (i64, Vec<String>) = sqlx::query_as(query).fetch_one(db).await?;
    Ok(Observation { newest, writers: writers.into_iter().collect() })
}
