//! Dead letters: an operator lists, shows, redrives and discards them, and a consumer waits while
//! they cannot be written.

mod list;
mod pages;
mod show;
mod redrive;
mod progress;
mod discard;
mod many;
mod unwritable;

use serde_json::Value;
use sqlx::PgPool;
use tests::System;
use tests::record::Draft;
use tests::services::{ANALYTICS_USERS, USER_EVENTS, service_of};
use topology::{ANALYTICS, EMAIL, Service, USER};
use uuid::Uuid;

/// Part of keys and values of bad records. It must not appear in the output of a command.
const SECRET: &str = "ada.lovelace@secret.example";

/// The analytics service with the services whose topics it reads, all ready, and its database.
pub async fn analytics() -> (System, PgPool) {
    analytics_with(&[]).await
}

/// As [`analytics`], with further variables for all services.
pub async fn analytics_with(settings: &[(&str, &str)]) -> (System, PgPool) {
    let mut system = System::empty().await;
    system.processes.set_all(settings);
    system.processes.start(&[USER, EMAIL, ANALYTICS]).await;
    let db = system.stores.database(ANALYTICS).await;
    (system, db)
}

/// Gives a handler a bug: its database rejects the rows of `table` that meet `condition`, as a
/// wrong check constraint would.
pub async fn add_bug(db: &PgPool, table: &str, condition: &str) {
    let sql = format!(
        "create function bug() returns trigger language plpgsql as
             $$ begin if {condition} then raise check_violation; end if; return new; end $$;
         create trigger bug before insert or update on {table} for each row execute function bug()"
    );
    sqlx::raw_sql(sqlx::AssertSqlSafe(sql.as_str())).execute(db).await.unwrap();
}

pub async fn remove_bug(db: &PgPool) {
    sqlx::raw_sql("drop function bug() cascade").execute(db).await.unwrap();
}

/// Redrives the dead letters of a group's service, and returns the last line that the subcommand
/// prints about the group, without the group's name.
pub async fn redrive(system: &System, group: &str, options: &[&str]) -> String {
    let arguments: Vec<&str> = ["redrive"].iter().chain(options).copied().collect();
    let printed = system.processes.run(service_of(group), &arguments).await.unwrap();
    let line = printed.lines().filter_map(|line| line.strip_prefix(&format!("{group}: "))).next_back();
    line.unwrap_or_else(|| panic!("no line about {group} in {printed}")).to_owned()
}

/// How often the record of a dead letter was tried.
pub fn attempts(system: &System, group: &str, key: &str) -> u32 {
    system.kafka.dead_letters(group)[key].header("dlq-attempts").unwrap().parse().unwrap()
}

/// The letters of a group in the output of `dead-letters --json`, which has one value per line.
async fn listed(system: &System, group: &str) -> Vec<Value> {
    let printed = system.processes.run(service_of(group), &["dead-letters", "--json"]).await.unwrap();
    assert!(!printed.contains(SECRET), "{printed}");
    let letters = printed.lines().map(|line| serde_json::from_str::<Value>(line).unwrap());
    letters.filter(|letter| letter["group"] == group).collect()
}

/// What operators did, newest first, as the subcommand `actions` of this service lists it.
pub async fn actions(system: &System, service: Service) -> Vec<Value> {
    let printed = system.processes.run(service, &["actions", "--json"]).await.unwrap();
    printed.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

/// Name of the action, its target and its outcome.
pub fn summary(action: &Value) -> (String, String, Option<String>) {
    let text = |name: &str| action[name].as_str().map(str::to_owned);
    (text("action").unwrap(), text("target").unwrap(), text("outcome"))
}

/// Writes facts that cannot be decoded, and waits for their dead letters in `analytics.users`.
/// Every other group that reads the topic has them too. Returns the letters' keys.
pub async fn malformed_facts(system: &System, count: usize) -> Vec<String> {
    let bad = |_| Draft::user_event("user.registered", Uuid::now_v7(), 1).with_value(b"?").on(0);
    let facts: Vec<Draft> = (0..count).map(bad).collect();
    let written = system.kafka.write_all(USER_EVENTS, &facts).await;
    system.kafka.until_dead_letters(ANALYTICS_USERS, &written).await;
    written.into_iter().map(|record| system.kafka.letter_key(ANALYTICS_USERS, record)).collect()
}
