//! What the email service does with events. Both handlers are idempotent by keys of their own business, without an inbox: a
//! unique key for intents, the highest version for recipients.

use std::collections::BTreeMap;

use shared::events::{UserEvent, UserState, mint_id};
use shared::fault;
use shared::messaging::{Failure, Handler, Outcome, Record};
use shared::service::telemetry::TraceContext;
use sqlx::{PgConnection, PgPool};
use uuid::Uuid;

/// `user.events.v1` → intents. A registration wants one welcome mail, however often and in whatever order it comes.
#[derive(Clone)]
pub struct Welcome {
    pub db: PgPool,
}

impl Handler for Welcome {
    type Event = UserEvent;

    /// One transaction. Crash before the commit: the batch comes again. Crash after it: it comes again and changes nothing.
    /// Users are written in the order of their ids, as in [`Recipients`]: two transactions that lock the same rows in opposite
    /// orders would deadlock. The effects commute, so the order has no other meaning.
    async fn handle(&self, batch: &[Record<UserEvent>]) -> Result<Outcome, Failure> {
        let mut batch: Vec<_> = batch.iter().collect();
        batch.sort_by_key(|record| record.envelope.key);
        let mut tx = self.db.begin().await?;
        let mut outcome = Outcome::default();
        for record in batch {
            let applied = match record.event {
                UserEvent::Registered(user) => {
                    let trace = TraceContext::of(&record.envelope);
                    intend(&mut tx, user.user_id, record.envelope.version, record.envelope.time, trace).await?
                }
                UserEvent::Deleted(user) => erase(&mut tx, user.user_id, record.envelope.version).await?,
                UserEvent::ProfileChanged(_) | UserEvent::EmailChanged(_) => true,
            };
            if applied { outcome.applied += 1 } else { outcome.duplicate += 1 }
        }
        fault::point("email.before_commit");
        tx.commit().await?;
        Ok(outcome)
    }
}

async fn intend(
    tx: &mut PgConnection,
    user: Uuid,
    version: i64,
    requested_at: time::OffsetDateTime,
    trace: TraceContext,
) -> sqlx::Result<bool> {
    let inserted = sqlx::query!(
        "insert into deliveries (id, user_id, template, version, requested_at, traceparent, tracestate)
         values ($1, $2, 'welcome', $3, $4, $5, $6)
         on conflict (user_id, template, version) do nothing",
        mint_id(),
        user,
        version,
        requested_at,
        trace.traceparent,
        trace.tracestate,
    );
    Ok(inserted.execute(tx).await?.rows_affected() == 1)
}

/// The fact erases too: a consumer that was away for longer than Kafka keeps tombstones would miss the tombstone.
async fn erase(tx: &mut PgConnection, user: Uuid, version: i64) -> sqlx::Result<bool> {
    let erased = sqlx::query!(
        "insert into recipients as stored (user_id, version) values ($1, $2)
         on conflict (user_id) do update set version = excluded.version, email = null, display_name = null
             where stored.version < excluded.version",
        user,
        version,
    );
    Ok(erased.execute(tx).await?.rows_affected() == 1)
}

/// `user.state.v1` → recipients. The highest version wins; an erased recipient keeps its version and nothing else.
#[derive(Clone)]
pub struct Recipients {
    pub db: PgPool,
}

impl Handler for Recipients {
    type Event = UserState;

    /// One statement. Users are written in the order of their ids, as in [`Welcome`]; and each once, since a statement may touch
    /// a row only once.
    async fn handle(&self, batch: &[Record<UserState>]) -> Result<Outcome, Failure> {
        let mut newest: BTreeMap<Uuid, &Record<UserState>> = BTreeMap::new();
        for record in batch {
            let known = newest.entry(record.envelope.key).or_insert(record);
            if known.envelope.version < record.envelope.version {
                *known = record;
            }
        }
        let (mut users, mut versions, mut emails, mut names) = (vec![], vec![], vec![], vec![]);
        for (user, record) in newest {
            let profile = match &record.event {
                UserState::Current(profile) => Some(profile),
                UserState::Erased => None,
            };
            users.push(user);
            versions.push(record.envelope.version);
            emails.push(profile.map(|profile| profile.email.clone()));
            names.push(profile.map(|profile| profile.display_name.clone()));
        }
        let upserted = sqlx::query!(
            "insert into recipients as stored (user_id, version, email, display_name)
             select * from unnest($1::uuid[], $2::bigint[], $3::text[], $4::text[])
             on conflict (user_id) do update set
                 version = excluded.version, email = excluded.email, display_name = excluded.display_name
                 where stored.version < excluded.version",
            &users,
            &versions,
            &emails as &[Option<String>],
            &names as &[Option<String>],
        );
        let applied = upserted.execute(&self.db).await?.rows_affected();
        Ok(Outcome { applied, duplicate: 0, stale: batch.len() as u64 - applied })
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use proptest::sample::Index;
    use shared::events::{Envelope, Event, Profile, UserRef, now};
    use shared::messaging::Source;
    use tokio::runtime::Runtime;

    use super::*;

    /// Real rows on a real database cost milliseconds, so few cases; each is a whole history.
    const CASES: u32 = 32;

    async fn database() -> PgPool {
        testbed::testing::migrated_database(testbed::services::EMAIL, &crate::MIGRATIONS).await
    }

    fn record<E: Event>(user: Uuid, version: i64, event: E) -> Record<E> {
        let (kind, key, id) = (event.encode().0.to_owned(), user, mint_id());
        let (source, traceparent, tracestate) = ("/test".to_owned(), None, None);
        let envelope = Envelope { id, kind, source, key, version, time: now(), traceparent, tracestate };
        let source = Source { topic: E::TOPIC.name.to_owned(), partition: 0, offset: version };
        Record { event, envelope, source, after: None }
    }

    fn state(user: Uuid, version: i64, erased: bool) -> Record<UserState> {
        let profile = Profile { email: format!("v{version}@example.com"), display_name: format!("Version {version}") };
        record(user, version, if erased { UserState::Erased } else { UserState::Current(profile) })
    }

    async fn recipient(db: &PgPool, user: Uuid) -> Option<(i64, Option<String>)> {
        let query = sqlx::query_as("select version, email from recipients where user_id = $1").bind(user);
        query.fetch_optional(db).await.unwrap()
    }

    /// What a handler was given of a history: any of its records, in any order, any number of times, in batches of any size.
    /// Gaps come by themselves.
    fn deliveries() -> impl Strategy<Value = Vec<Vec<(usize, Index)>>> {
        prop::collection::vec(prop::collection::vec((0..3_usize, any::<Index>()), 1..6), 1..6)
    }

    /// T26, I10: whatever comes of three users' states, in whatever order, the highest version seen is what is there, and who
    /// was erased with it has no address.
    #[test]
    fn the_highest_state_wins_in_any_order() {
        let runtime = Runtime::new().unwrap();
        let db = runtime.block_on(database());
        let lengths = prop::array::uniform3((1..6_i64, any::<bool>()));
        let config = ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(CASES) };
        proptest!(config, |(histories in lengths, batches in deliveries())| {
            runtime.block_on(async {
                let users = [(); 3].map(|()| mint_id());
                let mut highest = [0; 3];
                let handler = Recipients { db: db.clone() };
                for batch in batches {
                    let records: Vec<_> = batch.iter().map(|(user, index)| {
                        let (last, erased) = histories[*user];
                        let version = 1 + index.index(last as usize) as i64;
                        highest[*user] = version.max(highest[*user]);
                        state(users[*user], version, erased && version == last)
                    }).collect();
                    let outcome = handler.handle(&records).await.unwrap();
                    assert_eq!(outcome.applied + outcome.duplicate + outcome.stale, records.len() as u64);
                    for ((user, highest), (last, erased)) in users.iter().zip(highest).zip(histories) {
                        let address = (!(erased && highest == last)).then(|| format!("v{highest}@example.com"));
                        let expected = (highest > 0).then_some((highest, address));
                        prop_assert_eq!(recipient(&db, *user).await, expected);
                    }
                }
                Ok(())
            })?;
        });
    }

    /// T26, I5: one intent per registration, in any order and any number of times, also after the user is gone.
    #[test]
    fn a_registration_is_one_intent_in_any_order() {
        let runtime = Runtime::new().unwrap();
        let db = runtime.block_on(database());
        let facts = [UserEvent::Registered, UserEvent::ProfileChanged, UserEvent::EmailChanged, UserEvent::Deleted];
        let config = ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(CASES) };
        proptest!(config, |(batches in deliveries())| {
            runtime.block_on(async {
                let users = [(); 3].map(|()| mint_id());
                let (mut registered, mut deleted) = ([false; 3], [false; 3]);
                let handler = Welcome { db: db.clone() };
                for batch in batches {
                    let records: Vec<_> = batch.iter().map(|(user, index)| {
                        let fact = index.index(facts.len());
                        registered[*user] |= fact == 0;
                        deleted[*user] |= fact == 3;
                        record(users[*user], fact as i64 + 1, facts[fact](UserRef { user_id: users[*user] }))
                    }).collect();
                    let outcome = handler.handle(&records).await.unwrap();
                    assert_eq!(outcome.applied + outcome.duplicate + outcome.stale, records.len() as u64);
                }
                for user in 0..3 {
                    prop_assert_eq!(intents(&db, users[user]).await, i64::from(registered[user]));
                    prop_assert_eq!(recipient(&db, users[user]).await, deleted[user].then_some((4, None)));
                }
                Ok(())
            })?;
        });
    }

    async fn intents(db: &PgPool, user: Uuid) -> i64 {
        let query = sqlx::query_scalar("select count(*) from deliveries where user_id = $1").bind(user);
        query.fetch_one(db).await.unwrap()
    }

    /// I10: a statement may touch a row once, and a batch may hold a user twice.
    #[tokio::test]
    async fn a_batch_may_hold_a_user_twice() {
        let db = database().await;
        let user = mint_id();
        let handler = Recipients { db: db.clone() };
        let outcome =
            handler.handle(&[state(user, 3, false), state(user, 2, false), state(user, 3, false)]).await.unwrap();
        assert_eq!(outcome, Outcome { applied: 1, duplicate: 0, stale: 2 });
        assert_eq!(recipient(&db, user).await, Some((3, Some("v3@example.com".to_owned()))));
    }

    /// I10: the fact erases like the tombstone, and an address that comes later stays out.
    #[tokio::test]
    async fn the_fact_of_a_deletion_erases_for_good() {
        let db = database().await;
        let user = mint_id();
        let recipients = Recipients { db: db.clone() };
        recipients.handle(&[state(user, 1, false)]).await.unwrap();
        let deleted = [record(user, 3, UserEvent::Deleted(UserRef { user_id: user }))];
        Welcome { db: db.clone() }.handle(&deleted).await.unwrap();
        let outcome = recipients.handle(&[state(user, 2, false)]).await.unwrap();
        assert_eq!(outcome.stale, 1);
        assert_eq!(recipient(&db, user).await, Some((3, None)));
    }

    /// I11: a database that is away is no fault of the record.
    #[tokio::test]
    async fn a_database_that_is_away_is_a_retry() {
        let db = database().await;
        db.close().await;
        let failure = Recipients { db }.handle(&[state(mint_id(), 1, false)]).await.unwrap_err();
        assert!(matches!(failure, Failure::Retry(_)), "{failure:?}");
    }
}
