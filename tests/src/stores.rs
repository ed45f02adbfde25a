//! The facet `stores`: the contents of the services' databases and of Valkey.

use std::collections::{BTreeMap, BTreeSet};

use redis::Client;
use redis::aio::MultiplexedConnection;
use serde_json::Value;
use sqlx::PgPool;
use testbed::postgres::Database;
use topology::{ANALYTICS, EMAIL, Service, USER};
use uuid::Uuid;

use crate::checker::{Analytics, Audited, Delivery, Inserted, Person, Recipient, Steps, StoredUser};
use crate::services::{TOPICS, topic_of};
use crate::waiting::eventually_eq;

/// A relay deletes the rows of its outbox, so a trigger keeps the id of each. The trigger writes in
/// the inserting transaction, so a transaction that rolls back leaves no entry.
const LEDGER: &str = "
    create table if not exists ledger (event_id uuid primary key, topic text not null, key uuid not null);
    create or replace function keep() returns trigger language plpgsql as $$
    begin
        insert into ledger values (new.event_id, new.topic, new.aggregateid);
        return null;
    end $$;
    create or replace trigger keep after insert on outbox for each row execute function keep();";

/// A trigger keeps every state of every delivery. A test that polls the deliveries would miss some.
const DIARY: &str = "
    create table if not exists delivery_diary (
        number bigint generated always as identity, delivery_id uuid not null, user_id uuid not null, status text not null
    );
    create or replace function keep_diary() returns trigger language plpgsql as $$ begin
        insert into delivery_diary (delivery_id, user_id, status) values (new.id, new.user_id, new.status);
        return null;
    end $$;
    create or replace trigger keep_diary after insert or update of status on deliveries for each row execute function keep_diary();";

pub struct Stores {
    /// Each service's database, by the service's name.
    databases: BTreeMap<&'static str, Database>,
    valkey: Client,
    prefix: String,
}

/// The answer of a database to a `select count(*)`.
pub async fn count(db: &PgPool, question: &'static str) -> i64 {
    sqlx::query_scalar(question).fetch_one(db).await.unwrap()
}

impl Stores {
    pub(crate) fn new(databases: BTreeMap<&'static str, Database>, valkey: Client, prefix: String) -> Self {
        Self { databases, valkey, prefix }
    }

    /// From now on the service has another database.
    pub fn set_database(&mut self, service: Service, database: Database) {
        self.databases.insert(service.name, database);
    }

    pub(crate) fn set_valkey(&mut self, url: String) {
        self.valkey = Client::open(url).unwrap();
    }

    /// A service's database, with the rights of the role that owns the tables: tests add triggers
    /// and lock tables.
    pub async fn database(&self, service: Service) -> PgPool {
        PgPool::connect(self.owner_url(service)).await.unwrap()
    }

    /// The URLs of a service's database.
    pub fn urls(&self, service: Service) -> &Database {
        &self.databases[service.name]
    }

    /// The URL with which `<service> migrate` and `analytics rebuild` run.
    pub fn owner_url(&self, service: Service) -> &str {
        &self.databases[service.name].owner_url
    }

    /// The answer of a service's database to a `select count(*)`.
    pub async fn count(&self, service: Service, question: &'static str) -> i64 {
        count(&self.database(service).await, question).await
    }

    pub async fn valkey(&self) -> MultiplexedConnection {
        self.valkey.get_multiplexed_async_connection().await.unwrap()
    }

    /// Deletes everything in Valkey.
    pub async fn flush_valkey(&self) {
        let () = redis::cmd("FLUSHALL").query_async(&mut self.valkey().await).await.unwrap();
    }

    /// Deletes the position that the cache stores for a partition, and returns whether there was
    /// one.
    pub async fn delete_cache_position(&self, topic: &str, partition: i32) -> bool {
        let key = format!("{}position:{topic}:{partition}", self.prefix);
        let deleted: i64 = redis::cmd("DEL").arg(key).query_async(&mut self.valkey().await).await.unwrap();
        deleted == 1
    }

    /// Deletes the profile of a user, as an eviction does. Returns the number of deleted keys.
    pub async fn delete_cached_profile(&self, user: Uuid) -> i64 {
        let key = format!("{}profile:{user}", self.prefix);
        redis::cmd("DEL").arg(key).query_async(&mut self.valkey().await).await.unwrap()
    }

    /// Waits until the relay of a service has published everything.
    pub async fn until_outbox_empty(&self, service: Service) {
        let db = self.database(service).await;
        let what = format!("rows in the outbox of {}", service.name);
        eventually_eq(&what, 0, async || count(&db, "select count(*) from outbox").await).await;
    }

    /// From now on every row that is inserted into the outbox of a service is recorded.
    pub async fn record_outbox(&self, service: Service) {
        sqlx::raw_sql(LEDGER).execute(&self.database(service).await).await.unwrap();
    }

    /// The rows that a service inserted into its outbox since [`Stores::record_outbox`].
    pub async fn outbox_record(&self, service: Service) -> Vec<Inserted> {
        let rows: Vec<(Uuid, String)> =
            query(&self.database(service).await, "select event_id, topic from ledger").await;
        let topic = |name: &str| TOPICS.into_iter().find(|topic| *topic == name).expect("an outbox has known topics");
        rows.into_iter().map(|(event_id, name)| Inserted { event_id, topic: topic(&name) }).collect()
    }

    /// From now on every state of every delivery is recorded.
    pub async fn record_deliveries(&self) {
        sqlx::raw_sql(DIARY).execute(&self.database(EMAIL).await).await.unwrap();
    }

    /// The states of a user's deliveries since [`Stores::record_deliveries`], in order and
    /// separated by blanks. Without `unaddressed`: whether a delivery had this state depends on
    /// which of two topics was read first.
    pub async fn delivery_states(&self, user: Uuid) -> String {
        delivery_states(&self.database(EMAIL).await, user).await
    }

    /// Waits until the user's deliveries have had exactly these states since
    /// [`Stores::record_deliveries`].
    pub async fn until_delivery_states(&self, user: Uuid, states: &str) {
        let db = self.database(EMAIL).await;
        let found = async || delivery_states(&db, user).await;
        eventually_eq("the delivery's states", states.to_owned(), found).await;
    }

    /// Every delivery with its states since [`Stores::record_deliveries`].
    pub async fn deliveries(&self) -> Vec<Delivery> {
        let deliveries = "select id, user_id,
                              array(select status from delivery_diary where delivery_id = id order by number)
                          from deliveries";
        let deliveries: Vec<(Uuid, Uuid, Vec<String>)> = query(&self.database(EMAIL).await, deliveries).await;
        deliveries.into_iter().map(|(id, user, states)| Delivery { id, user, states }).collect()
    }

    /// The email service's version and address of a user. The address of an erased user is `None`.
    pub async fn recipient(&self, id: Uuid) -> Option<(i64, Option<String>)> {
        sqlx::query_as("select version, email from recipients where user_id = $1")
            .bind(id)
            .fetch_optional(&self.database(EMAIL).await)
            .await
            .unwrap()
    }

    /// Every user whose state the email service knows.
    pub async fn recipients(&self) -> BTreeMap<Uuid, Recipient> {
        let recipients = "select user_id, version, email from recipients where version > 0";
        let recipients: Vec<(Uuid, i64, Option<String>)> = query(&self.database(EMAIL).await, recipients).await;
        recipients.into_iter().map(|(user, version, email)| (user, Recipient { version, email })).collect()
    }

    /// The user service's table `users`.
    pub async fn users(&self) -> BTreeMap<Uuid, StoredUser> {
        let users = "select id, version, email, display_name from users";
        let users: Vec<Row> = query(&self.database(USER).await, users).await;
        users.into_iter().map(stored_user).collect()
    }

    /// The profiles in Valkey, including those that the cache service would not return.
    pub async fn cached_profiles(&self) -> BTreeMap<Uuid, StoredUser> {
        let mut valkey = self.valkey().await;
        let prefix = format!("{}profile:", self.prefix);
        let keys: Vec<String> = redis::cmd("KEYS").arg(format!("{prefix}*")).query_async(&mut valkey).await.unwrap();
        let mut profiles = BTreeMap::new();
        for key in keys {
            let (version, profile): (i64, String) =
                redis::cmd("HMGET").arg(&key).arg("version").arg("profile").query_async(&mut valkey).await.unwrap();
            let profile = serde_json::from_str::<Value>(&profile).ok();
            let person = profile.map(|profile| Person::of(&profile).expect("a profile has address and name"));
            profiles.insert(key[prefix.len()..].parse().unwrap(), StoredUser { version, person });
        }
        profiles
    }

    /// The analytics service's read models and inbox.
    pub async fn analytics(&self) -> Analytics {
        let db = self.database(ANALYTICS).await;
        let hours =
            "select extract(epoch from hour)::bigint, sum(registrations)::bigint from registrations group by hour";
        let totals = "select coalesce(sum(registered), 0)::bigint, coalesce(sum(mailed), 0)::bigint from funnel_totals";
        let funnel = "select user_id, (extract(epoch from registered_at) * 1000000)::bigint,
                          (extract(epoch from mailed_at) * 1000000)::bigint from funnel";
        let funnel: Vec<(Uuid, Option<i64>, Option<i64>)> = query(&db, funnel).await;
        let mut inbox: BTreeMap<&'static str, BTreeSet<Uuid>> = BTreeMap::new();
        let rows: Vec<(String, Uuid)> = query(&db, "select handler, event_id from inbox").await;
        for (handler, event) in rows {
            inbox.entry(topic_of(&handler)).or_default().insert(event);
        }
        Analytics {
            registrations: query::<(i64, i64)>(&db, hours).await.into_iter().collect(),
            funnel: funnel.into_iter().map(|(user, registered, mailed)| (user, Steps { registered, mailed })).collect(),
            totals: query::<(i64, i64)>(&db, totals).await[0],
            inbox,
            audit: query::<(Uuid, Uuid, String)>(&db, "select event_id, user_id, type from audit")
                .await
                .into_iter()
                .map(|(event, user, kind)| Audited { event, user, kind })
                .collect(),
        }
    }

    /// Everything under the prefix of the test in Valkey, as text: keys, strings and hashes.
    pub async fn valkey_text(&self) -> String {
        let mut valkey = self.valkey().await;
        let mut cursor = 0_u64;
        let mut all = String::new();
        loop {
            let mut scan = redis::cmd("SCAN");
            scan.arg(cursor).arg("MATCH").arg(format!("{}*", self.prefix)).arg("COUNT").arg(1000);
            let (next, keys): (u64, Vec<String>) = scan.query_async(&mut valkey).await.unwrap();
            for key in keys {
                let kind: String = redis::cmd("TYPE").arg(&key).query_async(&mut valkey).await.unwrap();
                let read = if kind == "hash" { "HGETALL" } else { "GET" };
                let value: redis::Value = redis::cmd(read).arg(&key).query_async(&mut valkey).await.unwrap();
                all += &format!("{key} {}\n", text(&value));
            }
            cursor = next;
            if cursor == 0 {
                return all;
            }
        }
    }
}

type Row = (Uuid, i64, Option<String>, Option<String>);

fn stored_user((user, version, email, display_name): Row) -> (Uuid, StoredUser) {
    let person = email.zip(display_name).map(|(email, display_name)| Person { email, display_name });
    (user, StoredUser { version, person })
}

async fn delivery_states(db: &PgPool, user: Uuid) -> String {
    let states = sqlx::query_scalar(
        "select string_agg(status, ' ' order by number) from delivery_diary
                            where user_id = $1 and status <> 'unaddressed'",
    );
    let states: Option<String> = states.bind(user).fetch_one(db).await.unwrap();
    states.unwrap_or_default()
}

async fn query<R>(db: &PgPool, question: &'static str) -> Vec<R>
where
    R: for<'r> sqlx::FromRow<'r, sqlx::postgres::PgRow> + Send + Unpin,
{
    sqlx::query_as(question).fetch_all(db).await.unwrap()
}

fn text(value: &redis::Value) -> String {
    match value {
        redis::Value::BulkString(bytes) => String::from_utf8_lossy(bytes).into_owned(),
        redis::Value::Array(values) => values.iter().map(text).collect::<Vec<_>>().join(" "),
        other => format!("{other:?}"),
    }
}
