//! Facts folded into tables. Each fact adds to a sum or lowers a minimum, so the order of facts
//! does not matter. The inbox passes each fact once.

use std::collections::BTreeMap;

use shared::events::{EmailEvent, Event, UserEvent};
use shared::messaging::{Failure, Projection, Record};
use sqlx::PgConnection;
use time::OffsetDateTime;
use uuid::Uuid;

/// What the tables say, for a comparison of two models: the sums over partitions. The order of the
/// facts decides which partition counts a user.
pub const SUMS: [(&str, &str); 2] = [
    ("registrations", "hour, sum(registrations) as registrations from {table} group by hour"),
    ("funnel_totals", "sum(registered) as registered, sum(mailed) as mailed from {table}"),
];

/// `user.events.v1` → `registrations`, `funnel`.
pub struct Registered;

impl Projection for Registered {
    type Event = UserEvent;

    const GROUP: &'static str = "analytics.users";

    async fn apply(&self, tx: &mut PgConnection, fresh: &[&Record<UserEvent>]) -> Result<(), Failure> {
        let mut hours: BTreeMap<(OffsetDateTime, i32), i64> = BTreeMap::new();
        let mut users = Users::new();
        for record in fresh {
            match record.event {
                UserEvent::Registered(user) => {
                    let partition = record.coordinates.partition;
                    *hours.entry((hour(record.envelope.time), partition)).or_default() += 1;
                    earliest(&mut users, user.user_id, record.envelope.time, partition);
                }
                UserEvent::ProfileChanged(_) | UserEvent::EmailChanged(_) | UserEvent::Deleted(_) => {}
            }
        }
        count(tx, hours).await?;
        let (users, times, partitions) = columns(users);
        sqlx::query!(
            "with facts as (select * from unnest($1::uuid[], $2::timestamptz[], $3::int[]) as fact (user_id, at, partition)),
             changed as (
                 insert into funnel as stored (user_id, registered_at) select user_id, at from facts
                 on conflict (user_id) do update set registered_at = least(stored.registered_at, excluded.registered_at)
                 returning new.user_id, old.registered_at is null as is_new, new.mailed_at is not null as is_mailed)
             insert into funnel_totals as stored (topic, partition, registered, mailed)
             select $4, partition, count(*), count(*) filter (where is_mailed)
             from changed join facts using (user_id) where is_new group by partition order by partition
             on conflict (topic, partition) do update
                 set registered = stored.registered + excluded.registered, mailed = stored.mailed + excluded.mailed",
            &users,
            &times,
            &partitions,
            UserEvent::TOPIC.name,
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

    const GROUP: &'static str = "analytics.emails";

    async fn apply(&self, tx: &mut PgConnection, fresh: &[&Record<EmailEvent>]) -> Result<(), Failure> {
        let mut users = Users::new();
        for record in fresh {
            let partition = record.coordinates.partition;
            match &record.event {
                EmailEvent::Sent(delivery) => earliest(&mut users, delivery.user_id, record.envelope.time, partition),
                EmailEvent::Failed(_) => {}
            }
        }
        let (users, times, partitions) = columns(users);
        sqlx::query!(
            "with facts as (select * from unnest($1::uuid[], $2::timestamptz[], $3::int[]) as fact (user_id, at, partition)),
             changed as (
                 insert into funnel as stored (user_id, mailed_at) select user_id, at from facts
                 on conflict (user_id) do update set mailed_at = least(stored.mailed_at, excluded.mailed_at)
                 returning new.user_id, old.mailed_at is null as is_new, new.registered_at is not null as is_registered)
             insert into funnel_totals as stored (topic, partition, registered, mailed)
             select $4, partition, 0, count(*)
             from changed join facts using (user_id) where is_new and is_registered group by partition order by partition
             on conflict (topic, partition) do update set mailed = stored.mailed + excluded.mailed",
            &users,
            &times,
            &partitions,
            EmailEvent::TOPIC.name,
        )
        .execute(tx)
        .await?;
        Ok(())
    }
}

/// Adds to the counts. Every statement here writes rows in the order of their keys: two
/// transactions that lock the same rows in opposite orders would deadlock.
async fn count(tx: &mut PgConnection, hours: BTreeMap<(OffsetDateTime, i32), i64>) -> sqlx::Result<()> {
    let (keys, registrations): (Vec<_>, Vec<_>) = hours.into_iter().unzip();
    let (hours, partitions): (Vec<_>, Vec<_>) = keys.into_iter().unzip();
    sqlx::query!(
        "insert into registrations as stored (hour, partition, registrations)
         select * from unnest($1::timestamptz[], $2::int[], $3::bigint[])
         on conflict (hour, partition) do update set registrations = stored.registrations + excluded.registrations",
        &hours,
        &partitions,
        &registrations,
    )
    .execute(tx)
    .await?;
    Ok(())
}

/// For each user the earliest time of a fact, and the partition of that fact. The lock on the row
/// of the user decides which of two different facts comes last and counts the second step.
type Users = BTreeMap<Uuid, (OffsetDateTime, i32)>;

/// A batch may have several facts about a user, but one statement may update a row only once.
fn earliest(users: &mut Users, user: Uuid, time: OffsetDateTime, partition: i32) {
    let fact = (time, partition);
    users.entry(user).and_modify(|known| *known = fact.min(*known)).or_insert(fact);
}

fn columns(users: Users) -> (Vec<Uuid>, Vec<OffsetDateTime>, Vec<i32>) {
    let (users, facts): (Vec<_>, Vec<_>) = users.into_iter().unzip();
    let (times, partitions) = facts.into_iter().unzip();
    (users, times, partitions)
}

fn hour(time: OffsetDateTime) -> OffsetDateTime {
    time.to_offset(time::UtcOffset::UTC).truncate_to_hour()
}

#[cfg(test)]
mod tests {
    use std::collections::{BTreeMap, BTreeSet};

    use proptest::prelude::*;
    use proptest::sample::Index;
    use shared::events::{EmailEvent, Event, UserEvent, UserRef, mint_id};
    use shared::messaging::{Handler, Inbox, Outcome};
    use sqlx::PgPool;
    use time::macros::datetime;
    use tokio::runtime::Runtime;

    use super::*;

    const CASES: u32 = 32;
    const FIRST_HOUR: OffsetDateTime = datetime!(2026-11-22 12:00 UTC);

    async fn database() -> PgPool {
        testbed::testing::migrated_database(testbed::services::ANALYTICS, &crate::MIGRATIONS).await
    }

    fn record<E: Event>(key: Uuid, id: Uuid, minutes: u8, event: E) -> Record<E> {
        let mut record = Record::sample(key, 1, event);
        record.envelope.id = id;
        record.envelope.time = FIRST_HOUR + time::Duration::minutes(minutes.into());
        record
    }

    #[derive(Clone, Copy, Debug)]
    struct Fact {
        id: Uuid,
        /// An index into the users of the test.
        user: usize,
        partition: i32,
        /// When it happened, in minutes after `FIRST_HOUR`.
        minutes: u8,
        /// Selects one of the event's samples.
        kind: Index,
    }

    impl Fact {
        fn time(&self) -> OffsetDateTime {
            FIRST_HOUR + time::Duration::minutes(self.minutes.into())
        }

        fn record<E: Event>(self, users: &[Uuid; 3]) -> Record<E> {
            let user = users[self.user];
            let mut samples = E::samples(user);
            let event = samples.swap_remove(self.kind.index(samples.len()));
            let mut record = record(user, self.id, self.minutes, event);
            record.coordinates.partition = self.partition;
            record
        }
    }

    fn facts() -> impl Strategy<Value = Vec<Fact>> {
        let fact = (0..3_usize, 0..3, 0..240_u8, any::<Index>());
        let fact =
            fact.prop_map(|(user, partition, minutes, kind)| Fact { id: mint_id(), user, partition, minutes, kind });
        prop::collection::vec(fact, 1..10)
    }

    /// How the facts of a topic are delivered.
    #[derive(Clone, Debug)]
    struct Schedule {
        /// Selects the facts, one after another, from those that are left.
        order: Vec<Index>,
        /// Selects the facts that are delivered again.
        repeated: Vec<Index>,
        /// Facts per batch.
        batch: usize,
    }

    fn schedule() -> impl Strategy<Value = Schedule> {
        let order = prop::collection::vec(any::<Index>(), 10);
        let repeated = prop::collection::vec(any::<Index>(), 0..8);
        let parameters = (order, repeated, 1..6_usize);
        parameters.prop_map(|(order, repeated, batch)| Schedule { order, repeated, batch })
    }

    impl Schedule {
        /// All facts in some order, with some of them repeated, divided into batches.
        fn batches(&self, facts: &[Fact]) -> Vec<Vec<Fact>> {
            let mut rest = facts.to_vec();
            let selected = self.order.iter().take(facts.len());
            let mut delivered: Vec<Fact> = selected.map(|index| rest.remove(index.index(rest.len()))).collect();
            for (shift, index) in self.repeated.iter().enumerate() {
                let fact = delivered[index.index(delivered.len())];
                delivered.insert(index.index(delivered.len() + 1).saturating_sub(shift), fact);
            }
            delivered.chunks(self.batch).map(<[_]>::to_vec).collect()
        }
    }

    #[derive(Debug, Default, PartialEq, Eq)]
    struct ReadModels {
        registrations: BTreeMap<OffsetDateTime, i64>,
        funnel: BTreeMap<Uuid, Steps>,
        /// How many users are registered, and how many of them mailed.
        totals: (i64, i64),
    }

    /// When a user was registered and mailed.
    #[derive(Debug, Default, PartialEq, Eq)]
    struct Steps {
        registered: Option<OffsetDateTime>,
        mailed: Option<OffsetDateTime>,
    }

    /// The expected read models, folded in memory.
    fn fold(users_facts: &[Fact], emails_facts: &[Fact], users: &[Uuid; 3]) -> ReadModels {
        let mut models = ReadModels::default();
        let earliest =
            |slot: &mut Option<OffsetDateTime>, time| *slot = Some(slot.map_or(time, |known| time.min(known)));
        for fact in users_facts {
            if let UserEvent::Registered(_) = fact.record(users).event {
                *models.registrations.entry(hour(fact.time())).or_default() += 1;
                earliest(&mut models.funnel.entry(users[fact.user]).or_default().registered, fact.time());
            }
        }
        for fact in emails_facts {
            if let EmailEvent::Sent(_) = fact.record(users).event {
                earliest(&mut models.funnel.entry(users[fact.user]).or_default().mailed, fact.time());
            }
        }
        let registered = models.funnel.values().filter(|steps| steps.registered.is_some());
        let mailed = registered.clone().filter(|steps| steps.mailed.is_some());
        models.totals = (registered.count() as i64, mailed.count() as i64);
        models
    }

    async fn read_models(db: &PgPool) -> ReadModels {
        let hours: Vec<(OffsetDateTime, i64)> =
            sqlx::query_as("select hour, sum(registrations)::bigint from registrations group by hour")
                .fetch_all(db)
                .await
                .unwrap();
        let totals = "select coalesce(sum(registered), 0)::bigint, coalesce(sum(mailed), 0)::bigint from funnel_totals";
        let totals: (i64, i64) = sqlx::query_as(totals).fetch_one(db).await.unwrap();
        let funnel: Vec<(Uuid, Option<OffsetDateTime>, Option<OffsetDateTime>)> =
            sqlx::query_as("select user_id, registered_at, mailed_at from funnel").fetch_all(db).await.unwrap();
        let hours = hours.into_iter().map(|(hour, count)| (hour.to_offset(time::UtcOffset::UTC), count));
        let funnel = funnel.into_iter().map(|(user, registered, mailed)| (user, Steps { registered, mailed }));
        ReadModels { registrations: hours.collect(), funnel: funnel.collect(), totals }
    }

    async fn empty(db: &PgPool) {
        sqlx::query("truncate inbox, registrations, funnel, funnel_totals").execute(db).await.unwrap();
    }

    /// T26, I7 I10.
    #[test]
    fn any_order_and_repetition_of_facts_gives_the_same_read_models() {
        let runtime = Runtime::new().unwrap();
        let db = runtime.block_on(database());
        let users_inbox = Inbox::new(db.clone(), Registered);
        let emails_inbox = Inbox::new(db.clone(), Mailed);
        let config = ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(CASES) };
        let histories = (facts(), facts(), schedule(), schedule(), any::<bool>());
        proptest!(config, |((users_facts, emails_facts, users_schedule, emails_schedule, users_first) in histories)| {
            runtime.block_on(async {
                empty(&db).await;
                let users = [(); 3].map(|()| mint_id());
                let users_batches = users_schedule.batches(&users_facts);
                let emails_batches = emails_schedule.batches(&emails_facts);
                if users_first {
                    handle(&users_inbox, &users_batches, &users).await;
                }
                handle(&emails_inbox, &emails_batches, &users).await;
                if !users_first {
                    handle(&users_inbox, &users_batches, &users).await;
                }
                prop_assert_eq!(read_models(&db).await, fold(&users_facts, &emails_facts, &users));
                Ok(())
            })?;
        });
    }

    /// Handles the batches. Each record is applied the first time and a duplicate after that (I11).
    async fn handle<P: Projection>(inbox: &Inbox<P>, batches: &[Vec<Fact>], users: &[Uuid; 3]) {
        let mut known = BTreeSet::new();
        for batch in batches {
            let fresh = batch.iter().filter(|fact| known.insert(fact.id)).count() as u64;
            let records: Vec<_> = batch.iter().map(|fact| fact.record(users)).collect();
            let outcome = inbox.handle(&records).await.unwrap();
            let expected = Outcome { applied: fresh, duplicate: batch.len() as u64 - fresh, stale: 0 };
            assert_eq!(outcome, expected);
        }
    }

    /// The same projection under another group.
    struct RegisteredElsewhere;

    impl Projection for RegisteredElsewhere {
        type Event = UserEvent;

        const GROUP: &'static str = "analytics.elsewhere";

        async fn apply(&self, tx: &mut PgConnection, fresh: &[&Record<UserEvent>]) -> Result<(), Failure> {
            Registered.apply(tx, fresh).await
        }
    }

    /// I7.
    #[tokio::test]
    async fn two_inboxes_of_one_database_do_not_hide_an_event_from_each_other() {
        let db = database().await;
        let user = mint_id();
        let fact = || [record(user, user, 0, UserEvent::Registered(UserRef { user_id: user }))];
        let registrations = async || read_models(&db).await.registrations.into_values().sum::<i64>();
        Inbox::new(db.clone(), Registered).handle(&fact()).await.unwrap();
        assert_eq!(registrations().await, 1);
        Inbox::new(db.clone(), RegisteredElsewhere).handle(&fact()).await.unwrap();
        assert_eq!(registrations().await, 2);
        Inbox::new(db.clone(), Registered).handle(&fact()).await.unwrap();
        assert_eq!(registrations().await, 2);
    }

    /// I9: the effects and the ids in the inbox are one transaction.
    #[tokio::test]
    async fn a_failed_effect_leaves_no_id_in_the_inbox() {
        let db = database().await;
        let user = mint_id();
        let fact = || [record(user, user, 0, UserEvent::Registered(UserRef { user_id: user }))];
        let inbox = Inbox::new(db.clone(), Registered);
        sqlx::query("alter table funnel add check (registered_at is null)").execute(&db).await.unwrap();
        inbox.handle(&fact()).await.unwrap_err();
        assert_eq!(read_models(&db).await, ReadModels::default());
        sqlx::query("alter table funnel drop constraint funnel_registered_at_check").execute(&db).await.unwrap();
        assert_eq!(inbox.handle(&fact()).await.unwrap().applied, 1);
    }
}
