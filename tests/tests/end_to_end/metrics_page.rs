//! `docs/metrics.md` is written from what the running services answer at `/metrics/descriptions`.
//! `cargo xtask metrics` writes it.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write;
use std::fs;
use std::path::PathBuf;

use serde_json::Value;
use tests::System;
use topology::{SERVICES, Service};

/// Set by `cargo xtask metrics`: the test writes the page instead of comparing it.
const WRITE: &str = "WAYBILL_WRITE_METRICS_PAGE";

const HEAD: &str = include_str!("metrics_page_head.md");

/// Metrics that may have no series yet in a system that has just started and has no faults.
const WITHOUT_SERIES: [&str; 5] = [
    "consumer_partition_waits",
    "consumer_refusals_total",
    "http_requests_limited_total",
    "topic_partitions_changed",
    "topic_settings_changed",
];

/// A metric, and the services that have it.
struct Metric {
    name: String,
    kind: String,
    unit: String,
    labels: Vec<String>,
    meaning: String,
    bad: String,
    services: Vec<&'static str>,
}

impl Metric {
    fn of(described: &Value) -> Self {
        let text = |field: &str| described[field].as_str().unwrap().to_owned();
        let labels = described["labels"].as_array().unwrap().iter();
        Self {
            name: text("name"),
            kind: text("type"),
            unit: text("unit"),
            labels: labels.map(|label| label.as_str().unwrap().to_owned()).collect(),
            meaning: text("meaning"),
            bad: text("bad"),
            services: vec![],
        }
    }

    fn row(&self) -> String {
        let Self { name, kind, unit, labels, meaning, bad, .. } = self;
        let labels: Vec<String> = labels.iter().map(|label| format!("`{label}`")).collect();
        let by = if labels.is_empty() { String::new() } else { format!("<br>by {}", labels.join(", ")) };
        format!("| `{name}`<br>{kind}, {unit}{by} | {meaning} | {bad} |")
    }
}

/// The metrics of all services, in the order in which they are registered.
async fn metrics(system: &System) -> Vec<Metric> {
    let mut metrics: Vec<Metric> = vec![];
    for service in SERVICES {
        for described in described(system, service).await {
            let metric = Metric::of(&described);
            let index = metrics.iter().position(|known| known.name == metric.name).unwrap_or_else(|| {
                metrics.push(metric);
                metrics.len() - 1
            });
            metrics[index].services.push(service.name);
        }
    }
    metrics
}

async fn described(system: &System, service: Service) -> Vec<Value> {
    let url = system.processes.admin(service).url("/metrics/descriptions");
    let text = reqwest::get(url).await.unwrap().text().await.unwrap();
    serde_json::from_str(&text).unwrap()
}

fn page(metrics: &[Metric]) -> String {
    let mut page = HEAD.to_owned();
    let mut owners: Vec<&[&str]> = vec![];
    for metric in metrics {
        if !owners.contains(&metric.services.as_slice()) {
            owners.push(&metric.services);
        }
    }
    for services in owners {
        writeln!(page, "\n## {}\n", title(services)).unwrap();
        page.push_str("| metric | meaning | bad values, and where to look |\n|---|---|---|\n");
        for metric in metrics.iter().filter(|metric| metric.services == services) {
            writeln!(page, "{}", metric.row()).unwrap();
        }
    }
    page
}

fn title(services: &[&str]) -> String {
    match services {
        [only] => format!("Only {only}"),
        all if all.len() == SERVICES.len() => "Every service".to_owned(),
        [first @ .., last] => format!("{} and {last}", first.join(", ")),
        [] => unreachable!("each metric is described by a service"),
    }
}

/// The page names every metric of every service, as the code describes it.
#[tokio::test(flavor = "multi_thread")]
async fn the_page_of_metrics_is_written_from_the_code() {
    let system = System::start().await;
    let current = page(&metrics(&system).await);
    let file = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../docs/metrics.md");
    if std::env::var_os(WRITE).is_some() {
        fs::write(&file, &current).unwrap();
    }
    let written = fs::read_to_string(&file).unwrap_or_default();
    assert!(written == current, "docs/metrics.md differs from the code: run `cargo xtask metrics`");
}

/// The labels of a description are those of the series. A service whose metrics nothing changes yet
/// has at least those of its requests and of its groups.
#[tokio::test(flavor = "multi_thread")]
async fn every_series_has_the_labels_that_its_description_names() {
    let system = System::start().await;
    let user = system.users.register().await;
    system.until_applied(&[user]).await;
    let metrics = metrics(&system).await;
    let mut seen = BTreeSet::new();
    for service in SERVICES {
        let page = system.processes.admin(service).metrics_page().await.unwrap();
        for (name, labels) in series(&page) {
            let metric =
                metrics.iter().find(|metric| names(metric).contains(&name)).unwrap_or_else(|| panic!("{name}"));
            let mut described: Vec<&str> = metric.labels.iter().map(String::as_str).collect();
            described.extend(name.ends_with("_bucket").then_some("le"));
            described.sort_unstable();
            assert_eq!(labels, described, "{}: labels of {name}, and labels of its description", service.name);
            assert!(metric.services.contains(&service.name), "{}: {name}", service.name);
            seen.insert(metric.name.clone());
        }
    }
    let unseen: BTreeSet<&str> =
        metrics.iter().map(|metric| &*metric.name).filter(|name| !seen.contains(*name)).collect();
    assert!(unseen.is_subset(&WITHOUT_SERIES.into()), "metrics without a series: {unseen:?}");
}

/// The names of a metric's series.
fn names(metric: &Metric) -> Vec<String> {
    let name = &metric.name;
    match metric.kind.as_str() {
        "histogram" => ["bucket", "count", "sum"].map(|part| format!("{name}_{part}")).to_vec(),
        _ => vec![name.clone()],
    }
}

/// The series of a page, each with the sorted names of its labels.
fn series(page: &str) -> BTreeMap<String, Vec<String>> {
    let lines = page.lines().filter(|line| !line.starts_with('#'));
    let series = lines.map(|line| {
        let line = line.split(" # ").next().unwrap();
        let (series, _value) = line.rsplit_once(' ').unwrap();
        let (name, labels) = series.split_once('{').unwrap_or((series, "}"));
        let labels = labels.strip_suffix('}').unwrap();
        // The routes contain braces and no comma, and no value contains `="`.
        let mut labels: Vec<String> =
            labels.split("\",").filter_map(|label| Some(label.split_once("=\"")?.0.to_owned())).collect();
        labels.sort_unstable();
        (name.to_owned(), labels)
    });
    series.collect()
}
