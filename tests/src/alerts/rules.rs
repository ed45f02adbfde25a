//! The file with the alerts.

use std::time::Duration;

use serde_yaml_ng::Value;

use super::query::Query;

pub const RULES: &str = "deploy/observability/prometheus/alerts.yml";
pub const UNIT_TESTS: &str = "deploy/observability/prometheus/tests/alerts.yml";

#[derive(Debug)]
pub struct Rules {
    pub alerts: Vec<Alert>,
    /// The rules that record the result of a query under a name.
    pub records: Vec<(String, String)>,
}

#[derive(Debug)]
pub struct Alert {
    pub name: String,
    pub query: String,
    /// How long the query must have a result before the alert fires.
    pub pending: Duration,
    pub severity: String,
    pub summary: String,
    pub description: String,
    /// The path of a document from the root of the checkout, and a section of it.
    pub runbook: String,
}

impl Rules {
    /// # Panics
    /// The file is not valid.
    pub fn read() -> Self {
        let text = std::fs::read_to_string(testbed::paths::root().join(RULES)).unwrap();
        let file: Value = serde_yaml_ng::from_str(&text).unwrap();
        let mut rules = Self { alerts: vec![], records: vec![] };
        for group in file["groups"].as_sequence().unwrap() {
            for rule in group["rules"].as_sequence().unwrap() {
                match rule["record"].as_str() {
                    Some(name) => rules.records.push((name.to_owned(), text_of(&rule["expr"]))),
                    None => rules.alerts.push(Alert::of(rule)),
                }
            }
        }
        rules
    }

    pub fn alert(&self, name: &str) -> &Alert {
        let found = self.alerts.iter().find(|alert| alert.name == name);
        found.unwrap_or_else(|| panic!("{RULES} has no alert {name}"))
    }

    /// What a query reads, if what it reads was recorded by rules: the names of the scraped series.
    pub fn scraped(&self, query: &str) -> Query {
        let mut read = Query::parse(query).unwrap();
        for (name, recorded) in &self.records {
            if read.names.remove(name) {
                let recorded = Query::parse(recorded).unwrap();
                read.names.extend(recorded.names);
                read.labels.extend(recorded.labels);
            }
        }
        read
    }
}

impl Alert {
    fn of(rule: &Value) -> Self {
        let annotations = &rule["annotations"];
        Self {
            name: text_of(&rule["alert"]),
            query: text_of(&rule["expr"]),
            pending: rule["for"].as_str().map_or(Duration::ZERO, duration),
            severity: text_of(&rule["labels"]["severity"]),
            summary: text_of(&annotations["summary"]),
            description: text_of(&annotations["description"]),
            runbook: text_of(&annotations["runbook_url"]),
        }
    }
}

fn text_of(value: &Value) -> String {
    value.as_str().unwrap_or_default().trim().to_owned()
}

/// `90s`, `10m` or `1h`.
fn duration(text: &str) -> Duration {
    let (number, unit) = text.split_at(text.len() - 1);
    let seconds = match unit {
        "s" => 1,
        "m" => 60,
        "h" => 3600,
        _ => panic!("not a duration: {text}"),
    };
    Duration::from_secs(number.parse::<u64>().unwrap() * seconds)
}
