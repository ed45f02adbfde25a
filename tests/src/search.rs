//! Where a text is found: in every table, topic, cache key, log and metrics page of a system. For what must be gone.

use redis::aio::MultiplexedConnection;
use reqwest::Client;
use sqlx::{AssertSqlSafe, PgPool};

use crate::log::GROUPS;
use crate::{Part, System};

/// Tables of every schema that is not Postgres' own.
const TABLES: &str = "select format('%I.%I', schemaname, tablename) from pg_tables
                      where schemaname not in ('pg_catalog', 'information_schema')";

impl System {
    /// The places that hold any of `texts`, sorted: `user public.users`, `topic user.state.v1`, `cache`, `log of email`, …
    pub async fn places_of(&self, texts: &[&str]) -> Vec<String> {
        let mut places = vec![];
        for part in self.started().into_iter().filter(|part| *part != Part::Cache) {
            places.extend(self.tables_with(part, texts).await);
        }
        let cached = cached(&mut self.valkey().await, &self.prefix).await;
        places.extend(holds(&cached, texts).then(|| "cache".to_owned()));
        places.extend(self.topics_with(texts));
        for (name, text) in self.all_logs() {
            places.extend(holds(&text, texts).then(|| format!("log of {name}")));
        }
        for part in self.running_parts() {
            places.extend(holds(&self.metrics_page(part).await, texts).then(|| format!("metrics of {part:?}")));
        }
        places.sort();
        places
    }

    pub async fn metrics_page(&self, part: Part) -> String {
        let page = Client::new().get(self.admin_url(part, "/metrics")).send().await.unwrap();
        page.text().await.unwrap()
    }

    async fn tables_with(&self, part: Part, texts: &[&str]) -> Vec<String> {
        let db: PgPool = self.database(part).await;
        let tables: Vec<String> = sqlx::query_scalar(TABLES).fetch_all(&db).await.unwrap();
        assert!(!tables.is_empty(), "{part:?} has no tables to search");
        let mut found = vec![];
        for table in tables {
            let rows = format!("select string_agg(t::text, E'\\n') from {table} t");
            let rows: Option<String> = sqlx::query_scalar(AssertSqlSafe(rows)).fetch_one(&db).await.unwrap();
            found.extend(holds(&rows.unwrap_or_default(), texts).then(|| format!("{part:?} {table}")));
        }
        found
    }

    fn topics_with(&self, texts: &[&str]) -> Vec<String> {
        let dead_letters = GROUPS.map(|(group, _)| format!("{group}.dlq"));
        let topics = ["user.events.v1", "user.state.v1", "email.events.v1"].map(str::to_owned);
        let topics = topics.into_iter().chain(dead_letters);
        let holding = topics.filter(|topic| self.read(topic).iter().any(|record| holds(&record.text(), texts)));
        holding.map(|topic| format!("topic {topic}")).collect()
    }
}

/// As it is, or as Postgres prints bytes.
fn holds(haystack: &str, texts: &[&str]) -> bool {
    let hex = |text: &str| text.bytes().map(|byte| format!("{byte:02x}")).collect::<String>();
    texts.iter().any(|text| haystack.contains(text) || haystack.contains(&hex(text)))
}

/// All that is under the system's prefix: keys, strings, hashes.
async fn cached(valkey: &mut MultiplexedConnection, prefix: &str) -> String {
    let mut cursor = 0_u64;
    let mut all = String::new();
    loop {
        let mut scan = redis::cmd("SCAN");
        scan.arg(cursor).arg("MATCH").arg(format!("{prefix}*")).arg("COUNT").arg(1000);
        let (next, keys): (u64, Vec<String>) = scan.query_async(valkey).await.unwrap();
        for key in keys {
            let kind: String = redis::cmd("TYPE").arg(&key).query_async(valkey).await.unwrap();
            let read = if kind == "hash" { "HGETALL" } else { "GET" };
            let value: redis::Value = redis::cmd(read).arg(&key).query_async(valkey).await.unwrap();
            all += &format!("{key} {}\n", text(&value));
        }
        cursor = next;
        if cursor == 0 {
            return all;
        }
    }
}

fn text(value: &redis::Value) -> String {
    match value {
        redis::Value::BulkString(bytes) => String::from_utf8_lossy(bytes).into_owned(),
        redis::Value::Array(values) => values.iter().map(text).collect::<Vec<_>>().join(" "),
        other => format!("{other:?}"),
    }
}
