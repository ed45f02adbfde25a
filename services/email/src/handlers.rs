//! The event handlers of the email service. Both are idempotent without an inbox: intents have a
//! unique business key, and for recipients the highest version wins.

use std::collections::BTreeMap;

use shared::events::{UserEvent, UserState, mint_id};
use shared::fault;
use shared::messaging::{Failure, Handler, Outcome, Record};
use shared::platform::telemetry::TraceContext;
use sqlx::{PgConnection, PgPool};
use uuid::Uuid;

/// `user.events.v1` → intents. A registration causes one welcome mail, however often and in
/// whatever order it arrives.
#[derive(Clone)]
pub struct Welcome {
    pub db: PgPool,
}

impl Handler for Welcome {
    type Event = UserEvent;

    const GROUP: &'static str = "email.welcome";

    /// One transaction. Crash before the commit: the batch comes again. Crash after it: the batch
    /// comes again and changes nothing. Users are written in the order of their ids, as in
    /// [`Recipients`]: two transactions that lock the same rows in opposite orders would deadlock.
    /// The effects commute, so the order has no other meaning.
    async fn handle(&self, batch: &[Record<UserEvent>]) -> Result<Outcome, Failure> {
        let mut batch: Vec<_> = batch.iter().collect();
        batch.sort_by_key(|record| record.envelope.key);
        let mut tx = self.db.begin().await?;
        let mut outcome = Outcome::default();
        for record in batch {
            let applied = match record.event {
                UserEvent::Registered(user) => {
                    let trace = TraceContext::of(&record.envelope);
                    store_intent(&mut tx, user.user_id, record.envelope.version, record.envelope.time, trace).await?
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

/// Stores the intent to send the welcome mail. Returns whether it is new.
async fn store_intent(
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

/// Erases the address, as the tombstone does: a consumer that was down for longer than Kafka keeps
/// tombstones never reads the tombstone. Returns whether the user's version is new.
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

/// `user.state.v1` → recipients. The highest version wins; an erased recipient keeps its version
/// and nothing else.
#[derive(Clone)]
pub struct Recipients {
    pub db: PgPool,
}

impl Handler for Recipients {
    type Event = UserState;

    const GROUP: &'static str = "email.recipients";

    /// One statement. Users are written in the order of their ids, as in [`Welcome`], and each
    /// once, because a statement may update a row only once.
    async fn handle(&self, batch: &[Record<UserState>]) -> Result<Outcome, Failure> {
        let mut newest: BTreeMap<Uuid, &Record<UserState>> = BTreeMap::new();
        for record in batch {
            let known = newest.entry(record.envelope.key).or_insert(record);
            if known.envelope.version < record.envelope.version {
                *known = record;
            }
        }
        let mut users = vec![];
        let mut versions = vec![];
        let mut emails = vec![];
        let mut names = vec![];
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
    use shared::events::{Event, Profile, UserRef};
    use tokio::runtime::Runtime;

    use super::*;

    /// Few, because each case is a whole history on a real database, which takes milliseconds per
    /// row.
    const CASES: u32 = 32;

    async fn database() -> PgPool {
        testbed::testing::migrated_database(testbed::services::EMAIL, &crate::MIGRATIONS).await
    }

    fn profile(user: Uuid, version: i64) -> Record<UserState> {
        let profile = Profile { email: format!("v{version}@example.com"), display_name: format!("Version {version}") };
        Record::sample(user, version, UserState::Current(profile))
    }

    fn tombstone(user: Uuid, version: i64) -> Record<UserState> {
        Record::sample(user, version, UserState::Erased)
    }

    async fn recipient(db: &PgPool, user: Uuid) -> Option<(i64, Option<String>)> {
        let query = sqlx::query_as("select version, email from recipients where user_id = $1").bind(user);
        query.fetch_optional(db).await.unwrap()
    }

    /// Records of a history in batches of any size, in any order, with repetitions and gaps.
    fn deliveries() -> impl Strategy<Value = Vec<Vec<(usize, Index)>>> {
        prop::collection::vec(prop::collection::vec((0..3_usize, any::<Index>()), 1..6), 1..6)
    }

    /// T26, I10: a user whose highest version is the erasure has no address.
    #[test]
    fn the_highest_version_of_a_state_wins_in_any_order() {
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
                        let state = if erased && version == last { tombstone } else { profile };
                        state(users[*user], version)
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

    /// T26, I5: even after the user was erased.
    #[test]
    fn a_registration_makes_one_intent_in_any_order_and_repetition() {
        let runtime = Runtime::new().unwrap();
        let db = runtime.block_on(database());
        let config = ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(CASES) };
        proptest!(config, |(batches in deliveries())| {
            runtime.block_on(async {
                let users = [(); 3].map(|()| mint_id());
                let mut registered = [false; 3];
                // The version of the deletion, which is the same in each copy.
                let mut deleted = [None; 3];
                let handler = Welcome { db: db.clone() };
                for batch in batches {
                    let records: Vec<_> = batch.iter().map(|(user, index)| {
                        let mut samples = UserEvent::samples(users[*user]);
                        let fact = index.index(samples.len());
                        let event = samples.swap_remove(fact);
                        let version = fact as i64 + 1;
                        registered[*user] |= matches!(event, UserEvent::Registered(_));
                        if matches!(event, UserEvent::Deleted(_)) {
                            deleted[*user] = Some(version);
                        }
                        Record::sample(users[*user], version, event)
                    }).collect();
                    let outcome = handler.handle(&records).await.unwrap();
                    assert_eq!(outcome.applied + outcome.duplicate + outcome.stale, records.len() as u64);
                }
                for user in 0..3 {
                    prop_assert_eq!(intents(&db, users[user]).await, i64::from(registered[user]));
                    prop_assert_eq!(recipient(&db, users[user]).await, deleted[user].map(|version| (version, None)));
                }
                Ok(())
            })?;
        });
    }

    async fn intents(db: &PgPool, user: Uuid) -> i64 {
        let query = sqlx::query_scalar("select count(*) from deliveries where user_id = $1").bind(user);
        query.fetch_one(db).await.unwrap()
    }

    /// I10: a statement may update a row only once.
    #[tokio::test]
    async fn a_batch_may_contain_a_user_twice() {
        let db = database().await;
        let user = mint_id();
        let handler = Recipients { db: db.clone() };
        let outcome = handler.handle(&[profile(user, 3), profile(user, 2), profile(user, 3)]).await.unwrap();
        assert_eq!(outcome, Outcome { applied: 1, duplicate: 0, stale: 2 });
        assert_eq!(recipient(&db, user).await, Some((3, Some("v3@example.com".to_owned()))));
    }

    /// I10: an older state that arrives later does not bring the address back.
    #[tokio::test]
    async fn the_fact_of_a_deletion_erases_the_recipient_permanently() {
        let db = database().await;
        let user = mint_id();
        let recipients = Recipients { db: db.clone() };
        recipients.handle(&[profile(user, 1)]).await.unwrap();
        let deleted = [Record::sample(user, 3, UserEvent::Deleted(UserRef { user_id: user }))];
        Welcome { db: db.clone() }.handle(&deleted).await.unwrap();
        let outcome = recipients.handle(&[profile(user, 2)]).await.unwrap();
        assert_eq!(outcome.stale, 1);
        assert_eq!(recipient(&db, user).await, Some((3, None)));
    }

    /// I11: an outage of the database is not the record's fault.
    #[tokio::test]
    async fn a_database_that_is_down_causes_a_retry() {
        let db = database().await;
        db.close().await;
        let failure = Recipients { db }.handle(&[profile(mint_id(), 1)]).await.unwrap_err();
        assert!(matches!(failure, Failure::Retry(_)), "{failure:?}");
    }
}
