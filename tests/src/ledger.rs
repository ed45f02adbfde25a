//! What the user service's outbox was ever given, and whether the topics have exactly that: invariants I3 and I4.

use std::collections::{BTreeMap, BTreeSet};

use reqwest::StatusCode;
use sqlx::PgPool;
use uuid::Uuid;

use crate::log::Raw;
use crate::{Part, System, eventually_eq};

/// The topics that the user service's relay writes.
pub const USER_TOPICS: [&str; 2] = ["user.events.v1", "user.state.v1"];

/// Rows leave the outbox, so a trigger keeps what came. It writes in the inserting transaction: what is rolled back leaves no trace.
const TRIGGER: &str = "
    create table ledger (event_id uuid primary key, topic text not null, key uuid not null, version bigint not null);
    create function keep() returns trigger language plpgsql as $$
    begin
        insert into ledger values (new.event_id, new.topic, new.aggregateid, new.version);
        return null;
    end $$;
    create trigger keep after insert on outbox for each row execute function keep();";

/// The ledger of one user database.
pub struct Ledger(pub PgPool);

impl System {
    /// From now on every insert into the user service's outbox is kept. The service has to have migrated its database.
    pub async fn keep_ledger(&self) -> Ledger {
        let db = self.database(Part::User).await;
        sqlx::raw_sql(TRIGGER).execute(&db).await.unwrap();
        Ledger(db)
    }

    /// Waits until the user service's relay has published everything.
    pub async fn until_published(&self, ledger: &Ledger) {
        eventually_eq("the outbox is empty", 0, async || ledger.count("select count(*) from outbox").await).await;
    }

    /// I3 and I4, once nothing is written any more: the topics hold what the outbox was given, each key in order, copies exact.
    pub async fn assert_log_is_the_ledger(&self, ledger: &Ledger) {
        self.until_published(ledger).await;
        for topic in USER_TOPICS {
            let records = self.read(topic);
            let logged: BTreeSet<Uuid> = records.iter().map(event_id).collect();
            let inserted = ledger.event_ids(topic).await;
            let lost: Vec<&Uuid> = inserted.difference(&logged).collect();
            assert!(lost.is_empty(), "I3: lost on the way to {topic}: {lost:?}");
            let uncommitted: Vec<&Uuid> = logged.difference(&inserted).collect();
            assert!(uncommitted.is_empty(), "I2: in {topic} without a commit: {uncommitted:?}");
            assert_ordered(topic, &records);
        }
        assert_newest_is_last(&self.read("user.state.v1"));
    }
}

impl System {
    /// I5: `(users, mails meant for them, users with more than one)`.
    pub async fn intents(&self) -> (i64, i64, i64) {
        let count = "select count(*), count(distinct user_id), count(*) - count(distinct user_id) from deliveries";
        let (mails, users, doubled): (i64, i64, i64) =
            sqlx::query_as(count).fetch_one(&self.database(Part::Email).await).await.unwrap();
        (users, mails, doubled)
    }

    /// I1, I5, I7, I8: every user was counted once, got one mail intent, and is in the cache as the user service has them.
    pub async fn assert_effects_once(&self, ledger: &Ledger) {
        self.until_drained().await;
        let users = ledger.count("select count(*) from users").await;
        assert_eq!(self.funnel().await.0, users, "I7: registrations counted, and users");
        assert_eq!(self.registrations().await, Some(users), "I7: registrations per bucket, and users");
        assert_eq!(self.intents().await, (users, users, 0), "I5: users mailed, mails, doubled mails");
        let rows: Vec<(Uuid, i64, bool)> =
            sqlx::query_as("select id, version, email is null from users").fetch_all(&ledger.0).await.unwrap();
        for (id, version, erased) in rows {
            let profile = self.profile(id, Some(version)).await.unwrap();
            let expected = if erased { StatusCode::NOT_FOUND } else { StatusCode::OK };
            assert_eq!(profile.status, expected, "I8: {id} at version {version}: {profile:?}");
        }
    }
}

impl Ledger {
    /// The answer to a `select count(*)`.
    pub async fn count(&self, question: &'static str) -> i64 {
        sqlx::query_scalar(question).fetch_one(&self.0).await.unwrap()
    }

    async fn event_ids(&self, topic: &str) -> BTreeSet<Uuid> {
        let ids = sqlx::query_scalar("select event_id from ledger where topic = $1").bind(topic);
        ids.fetch_all(&self.0).await.unwrap().into_iter().collect()
    }
}

pub fn event_id(record: &Raw) -> Uuid {
    record.header("ce_id").and_then(|id| id.parse().ok()).unwrap_or_else(|| panic!("no event id in {record:?}"))
}

/// How many records are copies of an earlier one.
pub fn copies(records: &[Raw]) -> usize {
    records.len() - records.iter().map(event_id).collect::<BTreeSet<_>>().len()
}

/// I4: per key the first occurrences are the versions 1, 2, 3, … in one partition, and every later copy is exact.
pub fn assert_ordered(topic: &str, records: &[Raw]) {
    for (key, records) in by_key(records) {
        let mut first: BTreeMap<Uuid, &Raw> = BTreeMap::new();
        let mut versions = vec![];
        for record in records {
            let original = first.entry(event_id(record)).or_insert_with(|| {
                versions.push(record.version());
                record
            });
            let copy = Raw { offset: original.offset, ..record.clone() };
            assert_eq!(&copy, *original, "I4: a copy in {topic} differs from its original");
        }
        let expected: Vec<i64> = (1..).take(versions.len()).collect();
        assert_eq!(versions, expected, "I4: the first occurrences of {key} in {topic}");
        let partitions: BTreeSet<i32> = first.values().map(|record| record.partition).collect();
        assert_eq!(partitions.len(), 1, "I4: the partitions of {key} in {topic}");
    }
}

/// I4, for a compacted topic, before and after its compaction: whoever reads the last record of a key has its newest state.
pub fn assert_newest_is_last(records: &[Raw]) {
    for (key, records) in by_key(records) {
        let highest = records.iter().map(|record| record.version()).max();
        assert_eq!(records.last().map(|record| record.version()), highest, "I4: the last state of {key}");
    }
}

/// In the order of the log, which per key is that of its one partition.
fn by_key(records: &[Raw]) -> BTreeMap<String, Vec<&Raw>> {
    let mut keys: BTreeMap<String, Vec<&Raw>> = BTreeMap::new();
    for record in records {
        keys.entry(record.key_text()).or_default().push(record);
    }
    keys
}
