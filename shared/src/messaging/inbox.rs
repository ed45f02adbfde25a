//! The inbox: the ids of the events that a read model has in it, in the same database, written in the same transaction as
//! their effects. It makes any effect that is a database write idempotent.

use std::collections::HashSet;
use std::sync::Arc;

use sqlx::{PgConnection, PgPool};
use uuid::Uuid;

use super::{Failure, Handler, Outcome, Record};
use crate::events::Event;
use crate::fault;

/// Folds events into tables. A pure function of the events: no clock, no random numbers, so that a rebuild gives the same.
pub trait Projection: Send + Sync + 'static {
    type Event: Event;

    /// Writes the effects of events that were never seen before, within the transaction that records their ids.
    /// Different topics are not ordered among each other, and events may come in any order: effects commute.
    fn apply(
        &self,
        tx: &mut PgConnection,
        fresh: &[&Record<Self::Event>],
    ) -> impl Future<Output = Result<(), Failure>> + Send;
}

/// A handler that gives each event to a [`Projection`] once.
pub struct Inbox<P> {
    name: &'static str,
    db: PgPool,
    projection: Arc<P>,
}

impl<P: Projection> Inbox<P> {
    /// `name` keeps the inboxes of one database apart; it is the consumer group's.
    pub fn new(name: &'static str, db: PgPool, projection: P) -> Self {
        Self { name, db, projection: Arc::new(projection) }
    }
}

impl<P> Clone for Inbox<P> {
    fn clone(&self) -> Self {
        Self { name: self.name, db: self.db.clone(), projection: Arc::clone(&self.projection) }
    }
}

impl<P: Projection> Handler for Inbox<P> {
    type Event = P::Event;

    /// The ids and the effects are one transaction. Crash before the commit: neither is there, and the batch comes again.
    /// Crash after it: the batch comes again and every id is known. A second process with the same event waits at the insert
    /// for our commit, and no longer than `lock_timeout`.
    async fn handle(&self, batch: &[Record<P::Event>]) -> Result<Outcome, Failure> {
        let mut tx = self.db.begin().await?;
        let mut new = insert(&mut tx, self.name, batch.iter().map(|record| record.envelope.id)).await?;
        let fresh: Vec<_> = batch.iter().filter(|record| new.remove(&record.envelope.id)).collect();
        if !fresh.is_empty() {
            self.projection.apply(&mut tx, &fresh).await?;
        }
        fault::point("inbox.before_commit");
        tx.commit().await?;
        fault::point("inbox.after_commit");
        let applied = fresh.len() as u64;
        Ok(Outcome { applied, duplicate: batch.len() as u64 - applied, stale: 0 })
    }
}

/// Records the ids and returns those that were not there. Sorted, since two batches that insert the same ids in opposite
/// orders would deadlock.
async fn insert(tx: &mut PgConnection, name: &str, ids: impl Iterator<Item = Uuid>) -> sqlx::Result<HashSet<Uuid>> {
    let mut ids: Vec<Uuid> = ids.collect();
    ids.sort_unstable();
    let new: Vec<Uuid> = sqlx::query_scalar(
        "insert into inbox (handler, event_id) select $1, unnest($2::uuid[]) on conflict do nothing returning event_id",
    )
    .bind(name)
    .bind(ids)
    .fetch_all(tx)
    .await?;
    Ok(new.into_iter().collect())
}

/// Which of these events the read model has in it that `db` finds by its search path.
pub(super) async fn known(db: &mut PgConnection, name: &str, ids: Vec<Uuid>) -> sqlx::Result<HashSet<Uuid>> {
    let known: Vec<Uuid> =
        sqlx::query_scalar("select event_id from inbox where handler = $1 and event_id = any($2::uuid[])")
            .bind(name)
            .bind(ids)
            .fetch_all(db)
            .await?;
    Ok(known.into_iter().collect())
}
