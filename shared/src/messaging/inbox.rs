//! The inbox: the ids of the events that a read model contains. They are in the model's database
//! and are written in the transaction of the effects. So an inbox makes every effect idempotent
//! that is a write to this database.

use std::collections::HashSet;
use std::sync::Arc;

use sqlx::{PgConnection, PgPool};
use uuid::Uuid;

use super::handler::{Failure, Handler, Outcome, Recorded};
use super::record::Record;
use crate::events::Event;
use crate::fault;
use crate::platform::database;

/// Folds events into tables. It uses no clock and no random numbers, so a rebuild from the same
/// events gives the same tables.
pub trait Projection: Send + Sync + 'static {
    type Event: Event;

    /// The consumer group, for example `analytics.users`. It is also the name that distinguishes
    /// the inboxes of one database.
    const GROUP: &'static str;

    /// Writes the effects of events that are not in the inbox yet, within the transaction that
    /// records their ids. Events may come in any order, and different topics are not ordered
    /// relative to each other, so effects must commute.
    fn apply(
        &self,
        tx: &mut PgConnection,
        fresh: &[&Record<Self::Event>],
    ) -> impl Future<Output = Result<(), Failure>> + Send;
}

/// A handler that passes each event to a [`Projection`] once.
pub struct Inbox<P> {
    db: PgPool,
    projection: Arc<P>,
}

impl<P: Projection> Inbox<P> {
    pub fn new(db: PgPool, projection: P) -> Self {
        Self { db, projection: Arc::new(projection) }
    }
}

impl<P> Clone for Inbox<P> {
    fn clone(&self) -> Self {
        Self { db: self.db.clone(), projection: Arc::clone(&self.projection) }
    }
}

impl<P: Projection> Handler for Inbox<P> {
    type Event = P::Event;

    const GROUP: &'static str = P::GROUP;

    async fn dependency_works(&self) -> bool {
        database::is_writable(&self.db).await
    }

    /// The ids and the effects are one transaction. Crash before the commit: neither is stored, and
    /// the batch comes again. Crash after it: the batch comes again, and every id is known. A
    /// second process with the same event waits at the insert for this commit, for at most
    /// `lock_timeout`.
    async fn handle(&self, batch: &[Record<P::Event>]) -> Result<Outcome, Failure> {
        let mut tx = self.db.begin().await?;
        let mut new = insert(&mut tx, P::GROUP, batch.iter().map(|record| record.envelope.id)).await?;
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

impl<P: Projection> Recorded for Inbox<P> {
    async fn recorded(live: &mut PgConnection, ids: Vec<Uuid>) -> sqlx::Result<HashSet<Uuid>> {
        let known: Vec<Uuid> =
            sqlx::query_scalar("select event_id from inbox where handler = $1 and event_id = any($2::uuid[])")
                .bind(P::GROUP)
                .bind(ids)
                .fetch_all(live)
                .await?;
        Ok(known.into_iter().collect())
    }
}

/// Records the ids and returns those that were not known. The ids are sorted: two batches that
/// insert the same ids in opposite orders would deadlock.
async fn insert(tx: &mut PgConnection, group: &str, ids: impl Iterator<Item = Uuid>) -> sqlx::Result<HashSet<Uuid>> {
    let mut ids: Vec<Uuid> = ids.collect();
    ids.sort_unstable();
    // One row with an array costs this process less than a row for each id.
    let new: Vec<Uuid> = sqlx::query_scalar(
        "with new as (
             insert into inbox (handler, event_id) select $1, unnest($2::uuid[]) on conflict do nothing returning event_id)
         select coalesce(array_agg(event_id), '{}') from new",
    )
    .bind(group)
    .bind(ids)
    .fetch_one(tx)
    .await?;
    Ok(new.into_iter().collect())
}
