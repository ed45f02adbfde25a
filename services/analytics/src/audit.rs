//! The audit: who did what to a user, when, and because of what. One row per fact, never changed.
//! It has ids only, as the facts, so it is kept when the user is erased.

use std::collections::{BTreeMap, HashSet};

use shared::events::{Event, UserEvent};
use shared::messaging::{Failure, Handler, Outcome, Record, Recorded};
use shared::platform::database;
use sqlx::{PgConnection, PgPool};
use time::OffsetDateTime;
use uuid::Uuid;

/// `user.events.v1` → `audit`. The table is its own inbox: its key is the event's id, so a row that
/// exists shows that the event was handled. A projection that changes rows needs an inbox of its
/// own.
#[derive(Clone)]
pub struct Audit {
    pub db: PgPool,
}

impl Handler for Audit {
    type Event = UserEvent;

    const GROUP: &'static str = "analytics.audit";

    async fn dependency_works(&self) -> bool {
        database::is_writable(&self.db).await
    }

    /// One statement, which is one transaction. Crash before its commit: the batch comes again.
    /// Crash after it: the batch comes again, and every row exists. The rows are in the order of
    /// their keys: two statements that insert the same rows in opposite orders would deadlock.
    async fn handle(&self, batch: &[Record<UserEvent>]) -> Result<Outcome, Failure> {
        let mut rows = Rows::default();
        let facts: BTreeMap<Uuid, &Record<UserEvent>> =
            batch.iter().map(|record| (record.envelope.id, record)).collect();
        for record in facts.into_values() {
            rows.push(record);
        }
        let inserted = sqlx::query!(
            "insert into audit (event_id, user_id, version, type, occurred_at, actor, causation_id, correlation_id)
             select * from unnest($1::uuid[], $2::uuid[], $3::bigint[], $4::text[], $5::timestamptz[], $6::uuid[],
                                  $7::uuid[], $8::uuid[])
             on conflict do nothing",
            &rows.ids,
            &rows.users,
            &rows.versions,
            &rows.types,
            &rows.times,
            &rows.actors as &[Option<Uuid>],
            &rows.causations as &[Option<Uuid>],
            &rows.correlations as &[Option<Uuid>],
        );
        let applied = inserted.execute(&self.db).await?.rows_affected();
        Ok(Outcome { applied, duplicate: batch.len() as u64 - applied, stale: 0 })
    }
}

impl Recorded for Audit {
    async fn recorded(live: &mut PgConnection, ids: Vec<Uuid>) -> sqlx::Result<HashSet<Uuid>> {
        let known = sqlx::query_scalar!("select event_id from audit where event_id = any($1)", &ids);
        Ok(known.fetch_all(live).await?.into_iter().collect())
    }
}

/// The rows of a batch, as one array for each column.
#[derive(Default)]
struct Rows {
    ids: Vec<Uuid>,
    users: Vec<Uuid>,
    versions: Vec<i64>,
    types: Vec<String>,
    times: Vec<OffsetDateTime>,
    actors: Vec<Option<Uuid>>,
    causations: Vec<Option<Uuid>>,
    correlations: Vec<Option<Uuid>>,
}

impl Rows {
    fn push(&mut self, record: &Record<UserEvent>) {
        let envelope = &record.envelope;
        self.ids.push(envelope.id);
        self.users.push(record.event.user(envelope.key));
        self.versions.push(envelope.version);
        self.types.push(envelope.kind.clone());
        self.times.push(envelope.time);
        self.actors.push(envelope.cause.actor);
        self.causations.push(envelope.cause.causation);
        self.correlations.push(envelope.cause.correlation);
    }
}

#[cfg(test)]
mod tests {
    use shared::events::{UserRef, mint_id};

    use super::*;

    /// I7, I9: in any order and repeated, also within a batch, each fact has one row.
    #[tokio::test]
    async fn each_fact_has_one_row() {
        let db = testbed::testing::migrated_database(testbed::services::ANALYTICS, &crate::MIGRATIONS).await;
        let audit = Audit { db: db.clone() };
        let user = mint_id();
        let ids = [mint_id(), mint_id(), mint_id()];
        let record = |index: usize| {
            let events = [UserEvent::Registered, UserEvent::ProfileChanged, UserEvent::Deleted];
            let version = i64::try_from(index).unwrap() + 1;
            let mut record = Record::sample(user, version, events[index](UserRef { user_id: user }));
            record.envelope.id = ids[index];
            record
        };
        let outcome = async |batch: &[usize]| {
            let batch: Vec<_> = batch.iter().map(|index| record(*index)).collect();
            audit.handle(&batch).await.unwrap()
        };
        assert_eq!(outcome(&[2, 0, 2]).await, Outcome { applied: 2, duplicate: 1, stale: 0 });
        assert_eq!(outcome(&[0, 1]).await, Outcome { applied: 1, duplicate: 1, stale: 0 });
        assert_eq!(outcome(&[2, 1, 0]).await, Outcome { applied: 0, duplicate: 3, stale: 0 });
        let rows: Vec<(Uuid, i64)> =
            sqlx::query_as("select event_id, version from audit order by version").fetch_all(&db).await.unwrap();
        assert_eq!(rows, [(ids[0], 1), (ids[1], 2), (ids[2], 3)]);
    }
}
