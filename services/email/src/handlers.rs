//! The event handlers of the email service. Both are idempotent without an inbox: intents have a
//! unique business key, and for recipients the highest version wins.
//!
//! A delivery needs an intent and an address, which come from two topics in any order. Whichever
//! handler comes second makes the delivery claimable. Both lock the row of the user in `recipients`
//! first, and insert it empty if it is missing. So of two handlers at the same time one waits for
//! the other's commit and then sees what it wrote.

use std::collections::BTreeMap;

use shared::events::{Cause, UserEvent, UserState, mint_id};
use shared::fault;
use shared::messaging::{Failure, Handler, Outcome, Record};
use shared::platform::database;
use shared::platform::telemetry::TraceContext;
use sqlx::{PgConnection, PgPool};
use time::OffsetDateTime;
use tokio::time::Duration;
use uuid::Uuid;

use crate::deliveries::{self, interval};
use crate::mail;
use crate::metrics::DeliveryMetrics;

/// `user.events.v1` → intents. A registration causes one welcome mail, however often and in
/// whatever order it arrives.
#[derive(Clone)]
pub struct Welcome {
    pub db: PgPool,
    /// An intent whose event is older is held.
    pub max_age: Duration,
    pub metrics: DeliveryMetrics,
}

impl Handler for Welcome {
    type Event = UserEvent;

    const GROUP: &'static str = "email.welcome";

    async fn dependency_works(&self) -> bool {
        database::is_writable(&self.db).await
    }

    /// One transaction. Crash before the commit: the batch comes again. Crash after it: the batch
    /// comes again and changes nothing. Users are locked in the order of their ids, as in
    /// [`Recipients`]: two transactions that lock the same rows in opposite orders would deadlock.
    /// The effects commute, so the order of the records has no other meaning.
    async fn handle(&self, batch: &[Record<UserEvent>]) -> Result<Outcome, Failure> {
        let mut intents = Intents::default();
        let mut deleted: BTreeMap<Uuid, i64> = BTreeMap::new();
        let mut outcome = Outcome::default();
        for record in batch {
            match record.event {
                UserEvent::Registered(user) => intents.add(user.user_id, record),
                UserEvent::Deleted(user) => {
                    let version = deleted.entry(user.user_id).or_default();
                    *version = record.envelope.version.max(*version);
                }
                UserEvent::ProfileChanged(_) | UserEvent::EmailChanged(_) => outcome.applied += 1,
            }
        }
        let mut users: Vec<Uuid> = intents.users.iter().chain(deleted.keys()).copied().collect();
        users.sort();
        users.dedup();
        if users.is_empty() {
            return Ok(outcome);
        }
        let mut tx = self.db.begin().await?;
        deliveries::lock_recipients(&mut tx, &users).await?;
        outcome.applied += store(&mut tx, &intents, self.max_age).await?;
        let (erased, cancelled) = erase(&mut tx, &deleted).await?;
        outcome.applied += erased;
        outcome.duplicate = batch.len() as u64 - outcome.applied;
        fault::point("email.before_commit");
        tx.commit().await?;
        self.metrics.count_ended("cancelled", cancelled);
        Ok(outcome)
    }
}

/// The intents of a batch, as one array for each column.
#[derive(Default)]
struct Intents {
    ids: Vec<Uuid>,
    users: Vec<Uuid>,
    versions: Vec<i64>,
    requested_at: Vec<OffsetDateTime>,
    causations: Vec<Option<Uuid>>,
    correlations: Vec<Option<Uuid>>,
    owners: Vec<Option<Uuid>>,
    traceparents: Vec<Option<String>>,
    tracestates: Vec<Option<String>>,
}

impl Intents {
    fn add(&mut self, user: Uuid, record: &Record<UserEvent>) {
        let cause = Cause::event(&record.envelope);
        let trace = TraceContext::of(&record.envelope);
        self.ids.push(mint_id());
        self.users.push(user);
        self.versions.push(record.envelope.version);
        self.requested_at.push(record.envelope.time);
        self.causations.push(cause.causation);
        self.correlations.push(cause.correlation);
        self.owners.push(record.envelope.cause.actor);
        self.traceparents.push(trace.traceparent);
        self.tracestates.push(trace.tracestate);
    }
}

/// Stores the intents to send the welcome mail. The users' rows in `recipients` are locked. Returns
/// how many are new.
///
/// An intent whose event is old is held at once. If it were pending first, a replayed history would
/// delay all other mails.
async fn store(tx: &mut PgConnection, intents: &Intents, max_age: Duration) -> sqlx::Result<u64> {
    if intents.ids.is_empty() {
        return Ok(0);
    }
    let stored = sqlx::query_scalar!(
        r#"insert into deliveries
               (id, user_id, template, version, status, due_at, requested_at, causationid, correlationid, owner,
                traceparent, tracestate)
           select intent.id, intent.user_id, $10, intent.version, state.status,
               case state.status when 'pending' then now() end, intent.requested_at, intent.causationid,
               intent.correlationid, intent.owner, intent.traceparent, intent.tracestate
           from unnest($1::uuid[], $2::uuid[], $3::bigint[], $4::timestamptz[], $5::uuid[], $6::uuid[], $7::uuid[],
                       $8::text[], $9::text[])
               as intent (id, user_id, version, requested_at, causationid, correlationid, owner, traceparent, tracestate)
           join recipients r using (user_id)
           cross join lateral (select case when r.email is null and r.version > 0 then 'cancelled'
                                   when intent.requested_at <= now() - $11::interval then 'held'
                                   when r.email is null then 'unaddressed'
                                   else 'pending' end as status) state
           on conflict (user_id, template, version) do nothing
           returning status"#,
        &intents.ids,
        &intents.users,
        &intents.versions,
        &intents.requested_at,
        &intents.causations as &[Option<Uuid>],
        &intents.correlations as &[Option<Uuid>],
        &intents.owners as &[Option<Uuid>],
        &intents.traceparents as &[Option<String>],
        &intents.tracestates as &[Option<String>],
        mail::WELCOME.name,
        interval(max_age),
    );
    let stored = stored.fetch_all(tx).await?;
    let held = stored.iter().filter(|status| *status == "held").count();
    if held > 0 {
        tracing::warn!(
            deliveries = held,
            "deliveries are held: their events are older than MAX_AGE_HOURS; see `email send-held --help`"
        );
    }
    Ok(stored.len() as u64)
}

/// Erases the addresses, as the tombstones do: a consumer that was down for longer than Kafka keeps
/// tombstones never reads them. Cancels the mails of these users. Returns how many users' versions
/// are new, and how many deliveries it cancelled.
async fn erase(tx: &mut PgConnection, deleted: &BTreeMap<Uuid, i64>) -> sqlx::Result<(u64, u64)> {
    if deleted.is_empty() {
        return Ok((0, 0));
    }
    let users: Vec<Uuid> = deleted.keys().copied().collect();
    let versions: Vec<i64> = deleted.values().copied().collect();
    let erased = sqlx::query_scalar!(
        r#"update recipients r set version = deleted.version, email = null
           from unnest($1::uuid[], $2::bigint[]) as deleted (user_id, version)
           where r.user_id = deleted.user_id and r.version < deleted.version
           returning r.user_id"#,
        &users,
        &versions,
    );
    let erased = erased.fetch_all(&mut *tx).await?;
    let cancelled = deliveries::cancel(tx, &erased).await?;
    Ok((erased.len() as u64, cancelled))
}

/// `user.state.v1` → recipients. The highest version wins; an erased recipient keeps its version
/// and nothing else.
#[derive(Clone)]
pub struct Recipients {
    pub db: PgPool,
    pub metrics: DeliveryMetrics,
}

impl Handler for Recipients {
    type Event = UserState;

    const GROUP: &'static str = "email.recipients";

    async fn dependency_works(&self) -> bool {
        database::is_writable(&self.db).await
    }

    /// One transaction. A crash before or after its commit is harmless, because the highest version
    /// wins. Users are written, and so locked, in the order of their ids, as in [`Welcome`], and
    /// each once, because a statement may update a row only once. The deliveries are changed by
    /// statements of their own: a statement does not see what was committed while it waited for a
    /// lock.
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
        for (user, record) in newest {
            users.push(user);
            versions.push(record.envelope.version);
            emails.push(match &record.event {
                UserState::Current(profile) => Some(profile.email.clone()),
                UserState::Erased => None,
            });
        }
        let mut tx = self.db.begin().await?;
        let (applied, cancelled) = upsert(&mut tx, &users, &versions, &emails).await?;
        tx.commit().await?;
        self.metrics.count_ended("cancelled", cancelled);
        Ok(Outcome { applied, duplicate: 0, stale: batch.len() as u64 - applied })
    }
}

/// Stores the addresses, `None` for an erased user, and changes the deliveries to the users whose
/// versions are new. Returns how many users that are, and how many deliveries were cancelled.
async fn upsert(
    tx: &mut PgConnection,
    users: &[Uuid],
    versions: &[i64],
    emails: &[Option<String>],
) -> sqlx::Result<(u64, u64)> {
    let upserted = sqlx::query!(
        r#"insert into recipients as stored (user_id, version, email)
           select * from unnest($1::uuid[], $2::bigint[], $3::text[])
           on conflict (user_id) do update set version = excluded.version, email = excluded.email
               where stored.version < excluded.version
           returning user_id, email is not null as "addressed!""#,
        users,
        versions,
        emails as &[Option<String>],
    );
    let upserted = upserted.fetch_all(&mut *tx).await?;
    let mut addressed = vec![];
    let mut erased = vec![];
    for row in &upserted {
        if row.addressed { addressed.push(row.user_id) } else { erased.push(row.user_id) }
    }
    deliveries::address(tx, &addressed).await?;
    let cancelled = deliveries::cancel(tx, &erased).await?;
    Ok((upserted.len() as u64, cancelled))
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::sync::atomic::{AtomicBool, Ordering};

    use proptest::prelude::*;
    use proptest::sample::Index;
    use shared::events::{Event, Profile, UserRef};
    use sqlx::{Postgres, Transaction};
    use tokio::runtime::Runtime;
    use tokio::task::JoinSet;

    use super::*;
    use crate::operator;
    use crate::testing::database;

    /// Few, because each case is a whole history on a real database, which takes milliseconds per
    /// row.
    const CASES: u32 = 32;

    fn welcome(db: &PgPool) -> Welcome {
        let max_age = Duration::from_secs(3600);
        Welcome { db: db.clone(), max_age, metrics: DeliveryMetrics::default() }
    }

    fn recipients(db: &PgPool) -> Recipients {
        Recipients { db: db.clone(), metrics: DeliveryMetrics::default() }
    }

    fn profile(user: Uuid, version: i64) -> Record<UserState> {
        let profile = Profile {
            email: format!("v{version}@example.com"),
            display_name: format!("Version {version}"),
            owner: None,
        };
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
                let handler = recipients(&db);
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
                let handler = welcome(&db);
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
                    // Without a deletion the row is empty and has the version 0.
                    let known = deleted[user].or(registered[user].then_some(0));
                    prop_assert_eq!(recipient(&db, users[user]).await, known.map(|version| (version, None)));
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
        let handler = recipients(&db);
        let outcome = handler.handle(&[profile(user, 3), profile(user, 2), profile(user, 3)]).await.unwrap();
        assert_eq!(outcome, Outcome { applied: 1, duplicate: 0, stale: 2 });
        assert_eq!(recipient(&db, user).await, Some((3, Some("v3@example.com".to_owned()))));
    }

    /// I10: an older state that arrives later does not bring the address back.
    #[tokio::test]
    async fn the_fact_of_a_deletion_erases_the_recipient_permanently() {
        let db = database().await;
        let user = mint_id();
        let recipients = recipients(&db);
        recipients.handle(&[profile(user, 1)]).await.unwrap();
        let deleted = [Record::sample(user, 3, UserEvent::Deleted(UserRef { user_id: user }))];
        welcome(&db).handle(&deleted).await.unwrap();
        let outcome = recipients.handle(&[profile(user, 2)]).await.unwrap();
        assert_eq!(outcome.stale, 1);
        assert_eq!(recipient(&db, user).await, Some((3, None)));
    }

    /// I11: an outage of the database is not the record's fault.
    #[tokio::test]
    async fn a_database_that_is_down_causes_a_retry() {
        let db = database().await;
        db.close().await;
        let failure = recipients(&db).handle(&[profile(mint_id(), 1)]).await.unwrap_err();
        assert!(matches!(failure, Failure::Retry(_)), "{failure:?}");
    }

    fn registration(user: Uuid) -> Record<UserEvent> {
        Record::sample(user, 1, UserEvent::Registered(UserRef { user_id: user }))
    }

    async fn states(db: &PgPool, user: Uuid) -> Vec<String> {
        let query = sqlx::query_scalar("select status from deliveries where user_id = $1").bind(user);
        query.fetch_all(db).await.unwrap()
    }

    /// Runs `handle` while the caller's transaction is open, until it waits for a lock or is done.
    /// Then commits the transaction and waits for `handle`.
    async fn meet<F>(db: &PgPool, open: Transaction<'static, Postgres>, handle: F)
    where
        F: Future<Output = Result<Outcome, Failure>> + Send + 'static,
    {
        let mut second = JoinSet::new();
        let done = Arc::new(AtomicBool::new(false));
        let finished = done.clone();
        second.spawn(async move {
            let outcome = handle.await;
            finished.store(true, Ordering::SeqCst);
            outcome
        });
        let waits = "select count(*) from pg_stat_activity
                     where datname = current_database() and wait_event_type = 'Lock'";
        while !done.load(Ordering::SeqCst) {
            let waiting: i64 = sqlx::query_scalar(waits).fetch_one(db).await.unwrap();
            if waiting > 0 {
                break;
            }
        }
        open.commit().await.unwrap();
        second.join_next().await.unwrap().unwrap().unwrap();
    }

    /// T48, I5: the handlers of the fact and of the state run at the same time. Whichever commits
    /// first, the mail becomes claimable, or is cancelled if the state is the erasure.
    #[tokio::test(flavor = "multi_thread")]
    async fn a_fact_and_a_state_that_are_handled_at_once_do_not_miss_each_other() {
        let db = database().await;
        let ada = Some("ada@example.com".to_owned());
        for (email, version, status) in [(ada, 1, "pending"), (None, 2, "cancelled")] {
            let state = |user| if email.is_some() { profile(user, version) } else { tombstone(user, version) };
            let user = mint_id();
            let mut fact = db.begin().await.unwrap();
            let mut intents = Intents::default();
            intents.add(user, &registration(user));
            deliveries::lock_recipients(&mut fact, &[user]).await.unwrap();
            store(&mut fact, &intents, Duration::from_secs(3600)).await.unwrap();
            let second = recipients(&db);
            let record = state(user);
            meet(&db, fact, async move { second.handle(&[record]).await }).await;
            assert_eq!(states(&db, user).await, [status], "the fact commits first");

            let user = mint_id();
            let mut first = db.begin().await.unwrap();
            upsert(&mut first, &[user], &[version], std::slice::from_ref(&email)).await.unwrap();
            let fact = welcome(&db);
            meet(&db, first, async move { fact.handle(&[registration(user)]).await }).await;
            assert_eq!(states(&db, user).await, [status], "the state commits first");
        }
    }

    /// T48, I5: an operator releases a held mail while its address arrives for the first time, as
    /// after the loss of the database. Whichever commits first, the mail becomes claimable.
    #[tokio::test(flavor = "multi_thread")]
    async fn a_released_mail_and_its_address_do_not_miss_each_other() {
        let db = database().await;
        let held = async || {
            let user = mint_id();
            welcome(&db).handle(&[registration(user)]).await.unwrap();
            let hold = sqlx::query("update deliveries set status = 'held' where user_id = $1").bind(user);
            hold.execute(&db).await.unwrap();
            user
        };

        let user = held().await;
        let mut state = db.begin().await.unwrap();
        upsert(&mut state, &[user], &[1], &[Some("ada@example.com".to_owned())]).await.unwrap();
        let operator = db.clone();
        meet(&db, state, async move {
            let mut tx = operator.begin().await?;
            operator::release_held(&mut tx, None, Some(user)).await?;
            tx.commit().await?;
            Ok(Outcome::default())
        })
        .await;
        assert_eq!(states(&db, user).await, ["pending"], "the state commits first");

        let user = held().await;
        let mut release = db.begin().await.unwrap();
        operator::release_held(&mut release, None, Some(user)).await.unwrap();
        let second = recipients(&db);
        let record = profile(user, 1);
        meet(&db, release, async move { second.handle(&[record]).await }).await;
        assert_eq!(states(&db, user).await, ["pending"], "the release commits first");
    }
}
