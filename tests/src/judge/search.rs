//! Searches every table, topic, cache key, log and metrics page of a system for texts that must not
//! be there.

use sqlx::AssertSqlSafe;
use topology::Service;

use crate::services::{OPERATOR_ACTIONS, TOPICS, dead_letters_of, groups};
use crate::system::System;

/// Tables of every schema except Postgres' own.
const TABLES: &str = "select format('%I.%I', schemaname, tablename) from pg_tables
                      where schemaname not in ('pg_catalog', 'information_schema')";

/// The places with any of `texts`, sorted: `user public.users`, `topic user.state.v1`, `cache`,
/// `log of email`, …
pub async fn places_of(system: &System, texts: &[&str]) -> Vec<String> {
    let mut places = vec![];
    for service in system.processes.started().filter(|service| service.has_database) {
        places.extend(tables_with(system, service, texts).await);
    }
    places.extend(contains(&system.stores.valkey_text().await, texts).then(|| "cache".to_owned()));
    places.extend(topics_with(system, texts));
    for (name, text) in system.processes.all_logs() {
        places.extend(contains(&text, texts).then(|| format!("log of {name}")));
    }
    for service in system.processes.should_run() {
        let page = system.processes.admin(service).metrics_page().await.expect("a running service has metrics");
        places.extend(contains(&page, texts).then(|| format!("metrics of {}", service.name)));
    }
    places.sort();
    places
}

async fn tables_with(system: &System, service: Service, texts: &[&str]) -> Vec<String> {
    let db = system.stores.database(service).await;
    let tables: Vec<String> = sqlx::query_scalar(TABLES).fetch_all(&db).await.unwrap();
    assert!(!tables.is_empty(), "{} has no tables to search", service.name);
    let mut found = vec![];
    for table in tables {
        let rows = format!("select string_agg(t::text, E'\\n') from {table} t");
        let rows: Option<String> = sqlx::query_scalar(AssertSqlSafe(rows)).fetch_one(&db).await.unwrap();
        found.extend(contains(&rows.unwrap_or_default(), texts).then(|| format!("{} {table}", service.name)));
    }
    found
}

fn topics_with(system: &System, texts: &[&str]) -> Vec<String> {
    let dead_letters = groups().map(dead_letters_of);
    let topics = TOPICS.into_iter().chain([OPERATOR_ACTIONS]).map(str::to_owned).chain(dead_letters);
    let with = topics.filter(|topic| system.kafka.read(topic).iter().any(|record| contains(&record.text(), texts)));
    with.map(|topic| format!("topic {topic}")).collect()
}

/// Also finds the hexadecimal form in which Postgres prints bytes.
fn contains(haystack: &str, texts: &[&str]) -> bool {
    let hex = |text: &str| text.bytes().map(|byte| format!("{byte:02x}")).collect::<String>();
    texts.iter().any(|text| haystack.contains(text) || haystack.contains(&hex(text)))
}
