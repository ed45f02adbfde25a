//! The dashboards and the rules name metrics that exist.

use std::collections::{BTreeMap, BTreeSet};

use reqwest::{Client, Method};
use serde_json::Value;
use tests::System;
use tests::alerts::{Page, Query, Rules};
use topology::{CACHE, SERVICES};
use uuid::Uuid;

const DASHBOARDS: &str = "deploy/observability/grafana/dashboards";

/// The labels that Prometheus adds, or that a histogram or an alert has.
const FURTHER_LABELS: [&str; 5] = ["alertstate", "instance", "job", "le", "severity"];
/// The series that Prometheus makes.
const OF_PROMETHEUS: [&str; 2] = ["ALERTS", "up"];

/// Metrics that have no series before the first fault. The fault tests show that the rules find them.
const SERIES_OF_FAULTS: [&str; 2] = ["consumer_partition_waits", "consumer_refusals_total"];

/// Every query of a dashboard, with the file and the panel. Of a variable: the series that it asks
/// for.
fn queries_of_dashboards() -> Vec<(String, String)> {
    let mut queries = vec![];
    for file in std::fs::read_dir(testbed::paths::root().join(DASHBOARDS)).unwrap() {
        let path = file.unwrap().path();
        let name = path.file_name().unwrap().to_string_lossy().into_owned();
        let dashboard: Value = serde_json::from_str(&std::fs::read_to_string(path).unwrap()).unwrap();
        for panel in dashboard["panels"].as_array().unwrap() {
            let title = panel["title"].as_str().unwrap();
            let targets = panel["targets"].as_array().unwrap().iter();
            queries.extend(
                targets.map(|target| (format!("{name}, {title}"), target["expr"].as_str().unwrap().to_owned())),
            );
        }
        for variable in dashboard["templating"]["list"].as_array().unwrap() {
            if let Some(query) = variable["query"]["query"].as_str() {
                let series = query.strip_prefix("label_values(").unwrap().split(',').next().unwrap();
                queries.push((format!("{name}, a variable"), series.to_owned()));
            }
        }
    }
    queries
}

/// Each name in a dashboard is that of a series in the scrapes of a system that has worked, or one of
/// [`SERIES_OF_FAULTS`]. Each name in a rule is that of a metric, and the fault tests show that the
/// rule finds its series. Each label is one that the program gives to one of the metrics.
#[tokio::test(flavor = "multi_thread")]
async fn every_metric_of_a_dashboard_or_a_rule_exists() {
    let mut system = System::empty().await;
    system.processes.set_own(CACHE, &[("HTTP_RATE_PER_ADDRESS", "1".to_owned())]);
    system.processes.start_all().await;
    let user = system.users.register().await;
    system.users.until_mailed(user).await;
    system.until_drained().await;
    for _ in 0..20 {
        let path = format!("/profiles/{}", Uuid::now_v7());
        let _ = system.users.request(Method::GET, CACHE, &path).send().await;
    }
    let mut scraped = BTreeSet::new();
    let mut labels: BTreeMap<String, BTreeSet<String>> = BTreeMap::new();
    for service in SERVICES {
        let admin = system.processes.admin(service);
        scraped.extend(Page::parse(&admin.metrics_page().await.unwrap()).samples.into_keys().map(|(name, _)| name));
        let described = Client::new().get(admin.url("/metrics/descriptions")).send().await.unwrap();
        for metric in described.json::<Vec<Value>>().await.unwrap() {
            let names = metric["labels"].as_array().unwrap().iter().map(|label| label.as_str().unwrap().to_owned());
            labels.entry(metric["name"].as_str().unwrap().to_owned()).or_default().extend(names);
        }
    }

    let rules = Rules::read();
    let exists = |name: &String| {
        let known = [&OF_PROMETHEUS[..], &SERIES_OF_FAULTS].concat();
        scraped.contains(name) || known.contains(&&**name)
    };
    let mut wrong = vec![];
    for (place, text) in queries_of_dashboards() {
        let Query { names, labels: used, .. } = rules.scraped(&text);
        wrong.extend(names.iter().filter(|name| !exists(name)).map(|name| format!("{place}: {name}")));
        wrong.extend(unknown_labels(&names, &used, &labels).map(|label| format!("{place}: label {label}")));
    }
    for alert in &rules.alerts {
        let Query { names, labels: used, .. } = rules.scraped(&alert.query);
        let described = |name: &String| exists(name) || labels.contains_key(name);
        wrong.extend(names.iter().filter(|name| !described(name)).map(|name| format!("{}: {name}", alert.name)));
        wrong.extend(unknown_labels(&names, &used, &labels).map(|label| format!("{}: label {label}", alert.name)));
    }
    assert_eq!(wrong, [""; 0], "metrics and labels that do not exist");
}

/// The labels that none of the metrics has.
fn unknown_labels(
    names: &BTreeSet<String>,
    used: &BTreeSet<String>,
    labels: &BTreeMap<String, BTreeSet<String>>,
) -> impl Iterator<Item = String> {
    let metric = |name: &String| {
        let suffixes = ["_bucket", "_count", "_sum"];
        let of_histogram = suffixes.iter().find_map(|suffix| name.strip_suffix(suffix)).unwrap_or(name);
        labels.get(name).or_else(|| labels.get(of_histogram)).cloned().unwrap_or_default()
    };
    let known: BTreeSet<String> = names.iter().flat_map(metric).collect();
    let unknown = used.iter().filter(move |label| !known.contains(*label) && !FURTHER_LABELS.contains(&&***label));
    unknown.cloned().collect::<Vec<_>>().into_iter()
}
