//! Facts folded into tables. The folds commute: each fact adds to a sum or sets a minimum, so their order does not matter,
//! and the inbox sees to it that each comes once.

use std::collections::BTreeMap;

use shared::events::{EmailEvent, UserEvent};
use shared::messaging::{Failure, Projection, Record};
use sqlx::PgConnection;
use time::OffsetDateTime;
use uuid::Uuid;

/// `user.events.v1` → `registrations`, `funnel`.
pub struct Registered;

impl Projection for Registered {
    type Event = UserEvent;

    async fn apply(&self, tx: &mut PgConnection, fresh: &[&Record<UserEvent>]) -> Result<(), Failure> {
        let mut hours: BTreeMap<OffsetDateTime, i64> = BTreeMap::new();
        let mut users = BTreeMap::new();
        for record in fresh {
            match record.event {
                UserEvent::Registered(user) => {
                    *hours.entry(hour(record.envelope.time)).or_default() += 1;
                    earliest(&mut users, user.user_id, record.envelope.time);
                }
                UserEvent::ProfileChanged(_) | UserEvent::EmailChanged(_) | UserEvent::Deleted(_) => {}
            }
        }
        count(tx, hours).await?;
        let (users, times): (Vec<_>, Vec<_>) = users.into_iter().unzip();
        sqlx::query!(
            "insert into funnel as stored (user_id, registered_at)
             select * from unnest($1::uuid[], $2::timestamptz[])
             on conflict (user_id) do update set registered_at = least(stored.registered_at, excluded.registered_at)",
            &users,
            &times,
        )
        .execute(tx)
        .await?;
        Ok(())
    }
}

/// `email.events.v1` → `funnel`.
pub struct Mailed;

impl Projection for Mailed {
    type Event = EmailEvent;

    async fn apply(&self, tx: &mut PgConnection, fresh: &[&Record<EmailEvent>]) -> Result<(), Failure> {
        let mut users = BTreeMap::new();
        for record in fresh {
            match &record.event {
                EmailEvent::Sent(delivery) => earliest(&mut users, delivery.user_id, record.envelope.time),
                EmailEvent::Failed(_) => {}
            }
        }
        let (users, times): (Vec<_>, Vec<_>) = users.into_iter().unzip();
        sqlx::query!(
            "insert into funnel as stored (user_id, mailed_at)
             select * from unnest($1::uuid[], $2::timestamptz[])
             on conflict (user_id) do update set mailed_at = least(stored.mailed_at, excluded.mailed_at)",
            &users,
            &times,
        )
        .execute(tx)
        .await?;
        Ok(())
    }
}

/// Rows are written in the order of their keys: two transactions that lock the same rows in opposite orders would deadlock.
async fn count(tx: &mut PgConnection, hours: BTreeMap<OffsetDateTime, i64>) -> sqlx::Result<()> {
    let (hours, registrations): (Vec<_>, Vec<_>) = hours.into_iter().unzip();
    sqlx::query!(
        "insert into registrations as stored (hour, registrations)
         select * from unnest($1::timestamptz[], $2::bigint[])
         on conflict (hour) do update set registrations = stored.registrations + excluded.registrations",
        &hours,
        &registrations,
    )
    .execute(tx)
    .await?;
    Ok(())
}

/// A statement may touch a row once, so what a batch says about a user is folded first.
fn earliest(users: &mut BTreeMap<Uuid, OffsetDateTime>, user: Uuid, time: OffsetDateTime) {
    users.entry(user).and_modify(|known| *known = time.min(*known)).or_insert(time);
}

fn hour(time: OffsetDateTime) -> OffsetDateTime {
    time.to_offset(time::UtcOffset::UTC).truncate_to_hour()
}

#[cfg(test)]
mod tests {
    use std::collections::{BTreeMap, BTreeSet};

    use proptest::prelude::*;
    use proptest::sample::Index;
    use shared::events::{Delivery, EmailEvent, Envelope, Event, Undelivered, UserRef, mint_id};
    use shared::messaging::{Handler, Inbox, Outcome, Source};
    use sqlx::PgPool;
    use time::macros::datetime;
    use tokio::runtime::Runtime;

    use super::*;

    const CASES: u32 = 32;
    const BEGINNING: OffsetDateTime = datetime!(2026-11-22 12:00 UTC);

    async fn database() -> PgPool {
        testbed::testing::migrated_database(testbed::services::ANALYTICS, &crate::MIGRATIONS).await
    }

    fn record<E: Event>(key: Uuid, id: Uuid, minutes: u8, event: E) -> Record<E> {
        let time = BEGINNING + time::Duration::minutes(minutes.into());
        let (kind, source, version) = (event.encode().0.to_owned(), "/test".to_owned(), 1);
        let envelope = Envelope { id, kind, source, key, version, time, traceparent: None, tracestate: None };
        let source = Source { topic: E::TOPIC.name.to_owned(), partition: 0, offset: 0 };
        Record { event, envelope, source, after: None }
    }

    /// Some events, each with its id, user and time; the last number says what it is.
    type Fact = (Uuid, usize, u8, u8);

    fn facts() -> impl Strategy<Value = Vec<Fact>> {
        let fact = (0..3_usize, 0..240_u8, 0..4_u8).prop_map(|(user, minutes, kind)| (mint_id(), user, minutes, kind));
        prop::collection::vec(fact, 1..10)
    }

    /// All of them in some order, then any of them again; cut into batches.
    fn deliveries(facts: &[Fact], order: &[Index], again: &[Index], batch: usize) -> Vec<Vec<Fact>> {
        let mut rest = facts.to_vec();
        let mut delivered: Vec<Fact> =
            order.iter().take(facts.len()).map(|index| rest.remove(index.index(rest.len()))).collect();
        for (place, index) in again.iter().enumerate() {
            let fact = delivered[index.index(delivered.len())];
            delivered.insert(index.index(delivered.len() + 1).saturating_sub(place), fact);
        }
        delivered.chunks(batch).map(<[_]>::to_vec).collect()
    }

    fn user_event((id, user, minutes, kind): Fact, users: &[Uuid; 3]) -> Record<UserEvent> {
        let facts = [UserEvent::Registered, UserEvent::ProfileChanged, UserEvent::EmailChanged, UserEvent::Deleted];
        record(users[user], id, minutes, facts[usize::from(kind)](UserRef { user_id: users[user] }))
    }

    fn email_event((id, user, minutes, kind): Fact, users: &[Uuid; 3]) -> Record<EmailEvent> {
        let delivery = Delivery { delivery_id: id, user_id: users[user], template: "welcome".to_owned() };
        let event = match kind {
            0 => EmailEvent::Failed(Undelivered { delivery, smtp_code: 550 }),
            _ => EmailEvent::Sent(delivery),
        };
        record(id, id, minutes, event)
    }

    type ReadModels = (BTreeMap<OffsetDateTime, i64>, BTreeMap<Uuid, (Option<OffsetDateTime>, Option<OffsetDateTime>)>);

    /// The fold as it is meant, in memory.
    fn fold(users_facts: &[Fact], emails_facts: &[Fact], users: &[Uuid; 3]) -> ReadModels {
        let (mut hours, mut funnel) = ReadModels::default();
        let earliest =
            |slot: &mut Option<OffsetDateTime>, time| *slot = Some(slot.map_or(time, |known| time.min(known)));
        for (_, user, minutes, kind) in users_facts {
            let time = BEGINNING + time::Duration::minutes((*minutes).into());
            if *kind == 0 {
                *hours.entry(hour(time)).or_default() += 1;
                earliest(&mut funnel.entry(users[*user]).or_default().0, time);
            }
        }
        for (_, user, minutes, kind) in emails_facts {
            let time = BEGINNING + time::Duration::minutes((*minutes).into());
            if *kind != 0 {
                earliest(&mut funnel.entry(users[*user]).or_default().1, time);
            }
        }
        (hours, funnel)
    }

    async fn read_models(db: &PgPool) -> ReadModels {
        let hours: Vec<(OffsetDateTime, i64)> =
            sqlx::query_as("select hour, registrations from registrations").fetch_all(db).await.unwrap();
        let funnel: Vec<(Uuid, Option<OffsetDateTime>, Option<OffsetDateTime>)> =
            sqlx::query_as("select user_id, registered_at, mailed_at from funnel").fetch_all(db).await.unwrap();
        (
            hours.into_iter().map(|(hour, count)| (hour.to_offset(time::UtcOffset::UTC), count)).collect(),
            funnel.into_iter().map(|(user, registered, mailed)| (user, (registered, mailed))).collect(),
        )
    }

    async fn forget(db: &PgPool) {
        sqlx::query("truncate inbox, registrations, funnel").execute(db).await.unwrap();
    }

    /// T26, I7 I10: the read models are the fold of the facts, each once, in any order of both topics and with any repetition.
    #[test]
    fn every_permutation_and_repetition_folds_to_the_same() {
        let runtime = Runtime::new().unwrap();
        let db = runtime.block_on(database());
        let (users_inbox, emails_inbox) =
            (Inbox::new("users", db.clone(), Registered), Inbox::new("emails", db.clone(), Mailed));
        let order =
            || (prop::collection::vec(any::<Index>(), 10), prop::collection::vec(any::<Index>(), 0..8), 1..6_usize);
        let config = ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(CASES) };
        let histories = (facts(), facts(), order(), order(), any::<bool>());
        proptest!(config, |((users_facts, emails_facts, first, second, users_first) in histories)| {
            runtime.block_on(async {
                forget(&db).await;
                let users = [(); 3].map(|()| mint_id());
                let users_batches = deliveries(&users_facts, &first.0, &first.1, first.2);
                let emails_batches = deliveries(&emails_facts, &second.0, &second.1, second.2);
                if users_first {
                    give(&users_inbox, &users_batches, |fact| user_event(fact, &users)).await;
                }
                give(&emails_inbox, &emails_batches, |fact| email_event(fact, &users)).await;
                if !users_first {
                    give(&users_inbox, &users_batches, |fact| user_event(fact, &users)).await;
                }
                prop_assert_eq!(read_models(&db).await, fold(&users_facts, &emails_facts, &users));
                Ok(())
            })?;
        });
    }

    /// Hands out the batches; each record is applied the first time and a duplicate after that (I11).
    async fn give<P: Projection>(inbox: &Inbox<P>, batches: &[Vec<Fact>], event: impl Fn(Fact) -> Record<P::Event>) {
        let mut known = BTreeSet::new();
        for batch in batches {
            let fresh = batch.iter().filter(|(id, ..)| known.insert(*id)).count() as u64;
            let records: Vec<_> = batch.iter().map(|fact| event(*fact)).collect();
            let outcome = inbox.handle(&records).await.unwrap();
            let expected = Outcome { applied: fresh, duplicate: batch.len() as u64 - fresh, stale: 0 };
            assert_eq!(outcome, expected);
        }
    }

    /// I7: two inboxes of one database do not hide an event from each other.
    #[tokio::test]
    async fn inboxes_are_kept_apart_by_name() {
        let db = database().await;
        let user = mint_id();
        let fact = || [record(user, user, 0, UserEvent::Registered(UserRef { user_id: user }))];
        for (inbox, registrations) in [("one", 1), ("another", 2), ("one", 2)] {
            Inbox::new(inbox, db.clone(), Registered).handle(&fact()).await.unwrap();
            assert_eq!(read_models(&db).await.0.into_values().sum::<i64>(), registrations, "after {inbox}");
        }
    }

    /// I9: what the projection did and what the inbox knows are one transaction.
    #[tokio::test]
    async fn an_effect_that_fails_leaves_no_trace_in_the_inbox() {
        let db = database().await;
        let user = mint_id();
        let fact = || [record(user, user, 0, UserEvent::Registered(UserRef { user_id: user }))];
        let inbox = Inbox::new("users", db.clone(), Registered);
        sqlx::query("alter table funnel add check (registered_at is null)").execute(&db).await.unwrap();
        inbox.handle(&fact()).await.unwrap_err();
        assert_eq!(read_models(&db).await, ReadModels::default());
        sqlx::query("alter table funnel drop constraint funnel_registered_at_check").execute(&db).await.unwrap();
        assert_eq!(inbox.handle(&fact()).await.unwrap().applied, 1);
    }
}
