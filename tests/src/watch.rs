//! Records what a run leaves behind and hands it to the checker.

use std::collections::{BTreeMap, BTreeSet};

use serde_json::Value;
use sqlx::PgPool;
use uuid::Uuid;

use crate::checker::{self, Analytics, Delivery, Email, History, Inserted, Known, Person, Violation};
use crate::consume::{part_of, topic_of};
use crate::load::Answered;
use crate::log::{GROUPS, Raw};
use crate::mailing::DIARY;
use crate::{DEADLINE, Part, System, eventually_eq};

/// The topics with facts and states.
const TOPICS: [&str; 3] = ["user.events.v1", "user.state.v1", "email.events.v1"];

/// Rows leave an outbox, so a trigger keeps what came. It writes in the inserting transaction: what is rolled back leaves no trace.
const LEDGER: &str = "
    create table if not exists ledger (event_id uuid primary key, topic text not null, key uuid not null);
    create or replace function keep() returns trigger language plpgsql as $$
    begin
        insert into ledger values (new.event_id, new.topic, new.aggregateid);
        return null;
    end $$;
    create or replace trigger keep after insert on outbox for each row execute function keep();";

/// All personal data that the load and the helpers of [`System`] ever write has one of these in it.
const PERSONAL: [&str; 2] = ["@example.com", "Lovelace"];
/// Where it belongs.
const ALLOWED: [&str; 4] = ["User public.users", "Email public.recipients", "topic user.state.v1", "cache"];

/// What is kept since the run began.
pub struct Watch {
    /// The user service's database.
    pub user: PgPool,
    email: Option<PgPool>,
}

impl System {
    /// From now on everything is recorded. The services that run have to have migrated their databases.
    pub async fn watch(&self) -> Watch {
        let user = self.database(Part::User).await;
        sqlx::raw_sql(LEDGER).execute(&user).await.unwrap();
        let mut email = None;
        if self.was_started(Part::Email) {
            let db = self.database(Part::Email).await;
            sqlx::raw_sql(LEDGER).execute(&db).await.unwrap();
            sqlx::raw_sql(DIARY).execute(&db).await.unwrap();
            email = Some(db);
        }
        Watch { user, email }
    }

    /// Waits until everything is drained, and judges the run.
    ///
    /// # Panics
    /// Violations, all of them; the whole history is written beside the services' logs.
    pub async fn check(&mut self, watch: &Watch, answered: &Answered) -> History {
        let (history, violations) = self.judge(watch, answered).await;
        if !violations.is_empty() {
            let file = self.evidence("history.txt");
            std::fs::write(&file, format!("{history:#?}")).unwrap();
            let list: Vec<String> = violations.iter().map(Violation::to_string).collect();
            panic!("{} violations, the history is in {}:\n{}", list.len(), file.display(), list.join("\n"));
        }
        history
    }

    /// The same, without a word.
    pub async fn judge(&mut self, watch: &Watch, answered: &Answered) -> (History, Vec<Violation>) {
        let behind = self.drain(DEADLINE).await;
        let mut history = self.history(watch, answered).await;
        history.behind = behind;
        let violations = checker::violations(&history);
        (history, violations)
    }

    async fn history(&mut self, watch: &Watch, answered: &Answered) -> History {
        let mut ended = self.ended();
        for part in self.running_parts() {
            let alive = self.alive(part).await;
            ended.extend((!alive).then(|| format!("{part:?} is not alive")));
        }
        let (mut letters, mut open) = (BTreeMap::new(), BTreeMap::new());
        for (group, _) in GROUPS {
            let letter = |letter: &Raw| !letter.headers.is_empty();
            letters.insert(group, self.read(&format!("{group}.dlq")).into_iter().filter(letter).collect());
            open.insert(group, self.dead_letters(group).into_values().collect());
        }
        let users: Vec<Row> = query(&watch.user, "select id, version, email, display_name from users").await;
        History {
            operations: answered.operations.clone(),
            users: users.into_iter().map(known).collect(),
            inserted: inserted(&watch.user).await,
            by_hand: self.written_by_hand(),
            facts: self.read("user.events.v1"),
            states: self.read("user.state.v1"),
            compacted: self.was_compacted(),
            email: match &watch.email {
                Some(db) => Some(self.email_side(db).await),
                None => None,
            },
            analytics: match self.was_started(Part::Analytics) {
                true => Some(analytics(&self.database(Part::Analytics).await).await),
                false => None,
            },
            cache: match self.was_started(Part::Cache) {
                true => Some(self.cached_profiles().await),
                false => None,
            },
            letters,
            open,
            counted: self.all_counted().await,
            behind: vec![],
            ended,
            leaks: self.leaks().await,
        }
    }

    async fn email_side(&self, db: &PgPool) -> Email {
        let deliveries: Vec<(Uuid, Uuid, Vec<String>)> = query(
            db,
            "select id, user_id, array(select status from delivery_diary where delivery_id = id order by number)
             from deliveries",
        )
        .await;
        let recipients: Vec<Row> = query(db, "select user_id, version, email, display_name from recipients").await;
        Email {
            deliveries: deliveries.into_iter().map(|(id, user, states)| Delivery { id, user, states }).collect(),
            recipients: recipients.into_iter().map(known).collect(),
            inserted: inserted(db).await,
            facts: self.read("email.events.v1"),
            mails: self.sink.mails(),
        }
    }

    /// The view as it lies in Valkey, whatever the cache service would answer.
    async fn cached_profiles(&self) -> BTreeMap<Uuid, Known> {
        let mut valkey = self.valkey().await;
        let prefix = self.prefixed("profile:");
        let keys: Vec<String> = redis::cmd("KEYS").arg(format!("{prefix}*")).query_async(&mut valkey).await.unwrap();
        let mut profiles = BTreeMap::new();
        for key in keys {
            let (version, profile): (i64, String) =
                redis::cmd("HMGET").arg(&key).arg("version").arg("profile").query_async(&mut valkey).await.unwrap();
            let profile = serde_json::from_str::<Value>(&profile).ok();
            let person = profile.map(|profile| Person::of(&profile).expect("a profile"));
            profiles.insert(key[prefix.len()..].parse().unwrap(), Known { version, person });
        }
        profiles
    }

    /// I11, where the counters have lived as long as the run.
    async fn all_counted(&self) -> BTreeMap<&'static str, u64> {
        let mut counted = BTreeMap::new();
        for (group, _) in GROUPS {
            let part = part_of(group);
            if self.has_run_alone(part) && self.running_parts().contains(&part) {
                counted.insert(group, self.counted_in_all(group).await as u64);
            }
        }
        counted
    }

    async fn leaks(&self) -> Vec<String> {
        let mut places = self.places_of(&PERSONAL).await;
        places.retain(|place| !ALLOWED.contains(&place.as_str()));
        places
    }

    /// Waits until the user service's relay has published everything.
    pub async fn until_published(&self, watch: &Watch) {
        eventually_eq("the outbox is empty", 0, async || watch.count("select count(*) from outbox").await).await;
    }
}

impl Watch {
    /// The answer of the user service's database to a `select count(*)`.
    pub async fn count(&self, question: &'static str) -> i64 {
        sqlx::query_scalar(question).fetch_one(&self.user).await.unwrap()
    }
}

/// How many records are copies of an earlier one.
pub fn copies(records: &[Raw]) -> usize {
    records.len() - records.iter().map(|record| record.header("ce_id")).collect::<BTreeSet<_>>().len()
}

type Row = (Uuid, i64, Option<String>, Option<String>);

fn known((user, version, email, display_name): Row) -> (Uuid, Known) {
    let person = email.zip(display_name).map(|(email, display_name)| Person { email, display_name });
    (user, Known { version, person })
}

async fn query<R>(db: &PgPool, question: &'static str) -> Vec<R>
where
    R: for<'r> sqlx::FromRow<'r, sqlx::postgres::PgRow> + Send + Unpin,
{
    sqlx::query_as(question).fetch_all(db).await.unwrap()
}

async fn inserted(db: &PgPool) -> Vec<Inserted> {
    let rows: Vec<(Uuid, String)> = query(db, "select event_id, topic from ledger").await;
    let topic = |name: &str| TOPICS.into_iter().find(|topic| *topic == name).expect("an outbox has known topics");
    rows.into_iter().map(|(event_id, name)| Inserted { event_id, topic: topic(&name) }).collect()
}

/// The read models as the tables have them.
pub async fn analytics(db: &PgPool) -> Analytics {
    let hours = "select extract(epoch from hour)::bigint, registrations from registrations";
    let funnel = "select user_id, (extract(epoch from registered_at) * 1000000)::bigint,
                      (extract(epoch from mailed_at) * 1000000)::bigint from funnel";
    let funnel: Vec<(Uuid, Option<i64>, Option<i64>)> = query(db, funnel).await;
    let mut inbox: BTreeMap<&'static str, BTreeSet<Uuid>> = BTreeMap::new();
    let rows: Vec<(String, Uuid)> = query(db, "select handler, event_id from inbox").await;
    for (handler, event) in rows {
        inbox.entry(topic_of(&handler)).or_default().insert(event);
    }
    Analytics {
        registrations: query::<(i64, i64)>(db, hours).await.into_iter().collect(),
        funnel: funnel.into_iter().map(|(user, registered, mailed)| (user, (registered, mailed))).collect(),
        inbox,
    }
}
