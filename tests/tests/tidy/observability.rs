//! The alerts, the dashboards and the configuration of Prometheus: what can be checked without a
//! running system. `tests/end_to_end/alerts` checks that the alerts fire and that the metrics
//! exist.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use serde_json::Value as Json;
use serde_yaml_ng::Value;
use tests::alerts::{Alert, Query, RULES, Rules, UNIT_TESTS, promtool};
use topology::SERVICES;

use crate::tree::{files, read, root};

const OPERATIONS: &str = "docs/operations.md";
const DASHBOARDS: &str = "deploy/observability/grafana/dashboards";
const PROMETHEUS: &str = "deploy/observability/prometheus/prometheus.yml";
const FAULT_TESTS: &str = "tests/tests/end_to_end/alerts";

/// The longest time for which the past may influence an alert. Fault tests are stretched to it.
const LONGEST_RANGE: Duration = Duration::from_secs(15 * 60);

/// The parts of a section for the person who gets an alert.
const PARTS: [&str; 4] = ["What it means", "What to look at", "What to do", "What not to do"];

/// The sections of a document that begins with a heading: the text below each heading, by its
/// anchor.
fn sections(document: &str) -> BTreeMap<String, &str> {
    let sections = document.split("\n#").map(|section| section.split_once('\n').unwrap_or((section, "")));
    sections.map(|(heading, text)| (anchor(heading.trim_start_matches('#').trim()), text)).collect()
}

/// The anchor of a heading, as GitHub makes it.
fn anchor(heading: &str) -> String {
    let kept = heading.chars().filter(|letter| letter.is_alphanumeric() || " -_".contains(*letter));
    kept.map(|letter| if letter == ' ' { '-' } else { letter.to_ascii_lowercase() }).collect()
}

/// The parts that a section does not have, or that have no text.
fn missing_parts(section: &str) -> Vec<&'static str> {
    let has = |part: &str| {
        let label = format!("**{part}.** ");
        section.lines().any(|line| line.strip_prefix(&label).is_some_and(|text| !text.trim().is_empty()))
    };
    PARTS.into_iter().filter(|part| !has(part)).collect()
}

/// Why an alert does not help the person who gets it.
fn faults(alert: &Alert, sections: &BTreeMap<String, &str>) -> Vec<String> {
    let mut faults = vec![];
    if !["critical", "warning"].contains(&&*alert.severity) {
        faults.push(format!("severity {:?}", alert.severity));
    }
    if alert.summary.is_empty() || alert.description.is_empty() {
        faults.push("no summary or no description".to_owned());
    }
    match alert.runbook.split_once('#').map(|(document, anchor)| (document, sections.get(anchor))) {
        Some((OPERATIONS, Some(section))) => {
            let missing = missing_parts(section).into_iter();
            faults.extend(missing.map(|part| format!("{} has no part {part:?}", alert.runbook)));
        }
        _ => faults.push(format!("no such runbook: {:?}", alert.runbook)),
    }
    match Query::parse(&alert.query) {
        Ok(query) if query.longest <= LONGEST_RANGE => {}
        Ok(query) => faults.push(format!("a range of {:?}", query.longest)),
        Err(error) => faults.push(error),
    }
    faults
}

#[test]
fn every_alert_has_a_severity_a_text_and_a_runbook() {
    let operations = read(OPERATIONS);
    let sections = sections(&operations);
    let rules = Rules::read();
    assert!(rules.alerts.len() >= 20, "only {} alerts were found: the rule checks nothing", rules.alerts.len());
    for alert in &rules.alerts {
        assert_eq!(faults(alert, &sections), [""; 0], "{RULES}, {}", alert.name);
    }
}

/// The table in `docs/operations.md` names the alerts with their severities and sections.
#[test]
fn every_alert_is_in_the_table_of_the_operations_page() {
    let text = read(OPERATIONS);
    let (_, table) = text.split_once("\n### Alerts\n").unwrap();
    let rows = table.split("\n**").next().unwrap().lines().filter(|line| line.starts_with("| `"));
    let rows: BTreeSet<(String, String, String)> = rows
        .map(|row| {
            let cells: Vec<&str> = row.trim_matches('|').split(" | ").map(str::trim).collect();
            let section = cells[3].rsplit_once("(#").unwrap().1.trim_end_matches(')');
            (cells[0].trim_matches('`').to_owned(), cells[1].to_owned(), format!("{OPERATIONS}#{section}"))
        })
        .collect();
    let alerts = Rules::read().alerts.into_iter();
    assert_eq!(rows, alerts.map(|alert| (alert.name, alert.severity, alert.runbook)).collect());
}

/// Each alert has fired on a real fault, and its texts were checked.
#[test]
fn every_alert_has_a_fault_test_and_a_unit_test() {
    let unit_tests = read(UNIT_TESTS);
    let fault_tests: String = files(FAULT_TESTS, ".rs").into_values().collect();
    for alert in Rules::read().alerts {
        let name = alert.name;
        assert!(fault_tests.contains(&format!("\"{name}\"")), "no test in {FAULT_TESTS} lets {name} fire");
        assert!(unit_tests.contains(&format!("alertname: {name}\n")), "{UNIT_TESTS} has no test of {name}");
    }
}

#[test]
fn promtool_accepts_the_rules_and_their_unit_tests() {
    let Some(promtool) = promtool::find() else { return };
    for (arguments, file) in [(["check", "rules"], RULES), (["test", "rules"], UNIT_TESTS)] {
        let result = promtool::run(&promtool, &arguments, &root().join(file));
        assert!(result.is_ok(), "{}", result.unwrap_err());
    }
}

/// Prometheus scrapes every service at its admin port, by a name that leads to all replicas, and
/// the alerts about missing processes name every service.
#[test]
fn prometheus_scrapes_every_service() {
    let config: Value = serde_yaml_ng::from_str(&read(PROMETHEUS)).unwrap();
    let jobs: BTreeSet<(String, String, u64)> = config["scrape_configs"]
        .as_sequence()
        .unwrap()
        .iter()
        .map(|job| {
            let dns = &job["dns_sd_configs"][0];
            let text = |value: &Value| value.as_str().unwrap().to_owned();
            (text(&job["job_name"]), text(&dns["names"][0]), dns["port"].as_u64().unwrap())
        })
        .collect();
    let services = SERVICES.map(|service| (service.name.to_owned(), service.name.to_owned(), service.admin.into()));
    assert_eq!(jobs, services.into());
    let rules = Rules::read();
    let all = SERVICES.map(|service| service.name).join("|");
    for name in ["TargetDown", "RestartLoop"] {
        let query = &rules.alert(name).query;
        assert!(query.contains(&format!("{{job=~\"{all}\"}}")), "{name}: {query}");
    }
    let missing = SERVICES.map(|service| format!("absent(up{{job=\"{}\"}})", service.name)).join(" or ");
    assert_eq!(rules.alert("ServiceMissing").query, missing);
}

/// Every panel says what it shows, leads to a section, and has queries that can be parsed.
#[test]
fn every_panel_has_a_description_a_runbook_and_valid_queries() {
    let operations = read(OPERATIONS);
    let sections = sections(&operations);
    let dashboards = files(DASHBOARDS, ".json");
    assert_eq!(dashboards.len(), 5, "the dashboards");
    let mut ids = BTreeSet::new();
    for (path, text) in dashboards {
        let dashboard: Json = serde_json::from_str(&text).unwrap();
        assert!(ids.insert(dashboard["uid"].as_str().unwrap().to_owned()), "{path}: its uid is taken");
        for panel in dashboard["panels"].as_array().unwrap() {
            let title = panel["title"].as_str().unwrap();
            let url = panel["links"][0]["url"].as_str().unwrap();
            let section = url.strip_prefix("${docs}/operations.md#").unwrap_or_default();
            assert!(sections.contains_key(section), "{path}, {title}: no such section: {url}");
            let description = panel["description"].as_str().unwrap();
            let runbook = format!("\n\nRunbook: {OPERATIONS}#{section}");
            let shows = description.strip_suffix(&runbook).unwrap_or_default();
            assert!(shows.len() > 20, "{path}, {title}: {description:?}");
            for target in panel["targets"].as_array().unwrap() {
                let query = target["expr"].as_str().unwrap();
                Query::parse(query).unwrap_or_else(|error| panic!("{path}, {title}: {error}"));
            }
        }
    }
}

#[test]
fn anchors_are_those_of_github() {
    assert_eq!(anchor("user.state.v1 has lost records"), "userstatev1-has-lost-records");
    assert_eq!(anchor("Requests are answered with 401 or 403"), "requests-are-answered-with-401-or-403");
}

#[test]
fn a_section_ends_at_the_next_heading() {
    let found = sections("# Page\n\nAll of it.\n\n## A part\n\nSome of it.\n\n### The rest\n");
    let expected = [("page", "\nAll of it.\n"), ("a-part", "\nSome of it.\n"), ("the-rest", "")];
    assert_eq!(found, BTreeMap::from(expected.map(|(anchor, text)| (anchor.to_owned(), text))));
}

/// A section that has every part.
fn complete() -> String {
    PARTS.map(|part| format!("**{part}.** Text.\n")).join("\n")
}

#[test]
fn missing_parts_of_a_section_are_found() {
    assert_eq!(missing_parts(""), PARTS);
    let complete = complete();
    assert_eq!(missing_parts(&complete), [""; 0]);
    let without_label = complete.replace("**What to look at.** ", "");
    assert_eq!(missing_parts(&without_label), ["What to look at"]);
    let without_text = complete.replace("**What not to do.** Text.", "**What not to do.** ");
    assert_eq!(missing_parts(&without_text), ["What not to do"]);
    let mentioned = complete.replace("**What to do.** ", "See **What to do.** ");
    assert_eq!(missing_parts(&mentioned), ["What to do"]);
}

#[test]
fn faults_of_an_alert_are_found() {
    let alert = Alert {
        name: "Bad".to_owned(),
        query: "increase(x[1h]) > 0".to_owned(),
        pending: Duration::ZERO,
        severity: "page".to_owned(),
        summary: "text".to_owned(),
        description: String::new(),
        runbook: format!("{OPERATIONS}#nowhere"),
    };
    assert_eq!(faults(&alert, &BTreeMap::new()).len(), 4);
    let alert = Alert {
        query: "x > 0".to_owned(),
        severity: "warning".to_owned(),
        description: "text".to_owned(),
        runbook: format!("{OPERATIONS}#here"),
        ..alert
    };
    let complete = complete();
    assert_eq!(faults(&alert, &BTreeMap::from([("here".to_owned(), &*complete)])), [""; 0]);
    assert_eq!(faults(&alert, &BTreeMap::from([("here".to_owned(), "Text.")])).len(), PARTS.len());
}
