//! Dead letters: listed and redriven by an operator, and held up by a topic that refuses them.

mod list;
mod redrive;
mod unwritable;

use serde_json::Value;
use sqlx::PgPool;
use tests::System;
use tests::services::service_of;
use topology::{ANALYTICS, EMAIL, Service, USER};

/// Stands in keys and values of bad records, and must not appear in any output.
const SECRET: &str = "ada.lovelace@secret.example";

/// The analytics service and the services whose topics it reads, ready; and the analytics database.
pub async fn analytics() -> (System, PgPool) {
    analytics_with(&[]).await
}

/// As [`analytics`], with further variables for all services.
pub async fn analytics_with(settings: &[(&str, &str)]) -> (System, PgPool) {
    let mut system = System::empty().await;
    for (name, value) in settings {
        system.processes.set(name, value);
    }
    system.processes.start(&[USER, EMAIL, ANALYTICS]).await;
    let db = system.stores.database(ANALYTICS).await;
    (system, db)
}

/// Gives a handler a bug: its database refuses the rows of `table` that meet `condition`, as a wrong check would.
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

/// Redrives the dead letters of a group's service, and returns the last line that the subcommand prints about the group.
pub async fn redrive(system: &System, group: &str, options: &[&str]) -> String {
    let arguments: Vec<&str> = ["redrive"].iter().chain(options).copied().collect();
    let printed = system.processes.run(service_of(group), &arguments).await.unwrap();
    let line = printed.lines().filter_map(|line| line.strip_prefix(&format!("{group}: "))).next_back();
    line.unwrap_or_else(|| panic!("nothing about {group} in {printed}")).to_owned()
}

/// The number of attempts that a dead letter has had.
pub fn attempts(system: &System, group: &str, key: &str) -> u32 {
    system.kafka.dead_letters(group)[key].header("dlq-attempts").unwrap().parse().unwrap()
}

/// The lines of `dead-letters --json`.
async fn listed(system: &System, service: Service) -> Vec<Value> {
    let printed = system.processes.run(service, &["dead-letters", "--json"]).await.unwrap();
    assert!(!printed.contains(SECRET), "{printed}");
    printed.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}
