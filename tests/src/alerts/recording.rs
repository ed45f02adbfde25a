//! A recorded fault: what Prometheus would have scraped before, while and after it was there, and
//! what the alerts make of it.

use std::fs;
use std::path::PathBuf;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use reqwest::Client;
use serde_json::{Value, json};
use tokio::task::JoinHandle;
use tokio::time::MissedTickBehavior;
use topology::Service;

use super::page::Page;
use super::promtool;
use super::rules::{Alert, RULES, Rules};
use super::series::{Scrape, input_series};
use crate::processes::Processes;
use crate::waiting::eventually;

/// Scrapes before a fault, while it shows, and after it. The axis of time is stretched so that the
/// fault shows for longer than an alert waits until it fires.
pub const SCRAPES: usize = 5;
const INTERVAL: Duration = Duration::from_secs(1);
/// Time for an answer. The scrape of a frozen process must not delay the next one.
const TIMEOUT: Duration = Duration::from_millis(800);
/// Added to each stretched phase, so that its length is not exactly that of the alert, in minutes.
const MARGIN: usize = 2;
/// The alert about services of which no process runs.
const SERVICE_MISSING: &str = "ServiceMissing";

/// Scrapes processes once a second until it is dropped.
pub struct Recording {
    scrapes: Arc<Mutex<Vec<Scrape>>>,
    scraper: JoinHandle<()>,
    promtool: PathBuf,
    file: PathBuf,
    /// The number of scrapes before the fault.
    begin: usize,
    /// The number of scrapes until the metrics show the fault.
    shown: usize,
    /// The number of scrapes until the fault was removed.
    end: usize,
}

impl Recording {
    /// Scrapes the first process of each of these services. `None` without promtool.
    pub fn start(processes: &Processes, services: &[Service]) -> Option<Self> {
        let promtool = promtool::find()?;
        let targets = services.iter().map(|service| (service.name, processes.admin(*service).url("/metrics")));
        let scrapes = Arc::default();
        let scraper = tokio::spawn(scrape(targets.collect(), Arc::clone(&scrapes)));
        let file = processes.file("alerts.yml");
        Some(Self { scrapes, scraper, promtool, file, begin: 0, shown: 0, end: 0 })
    }

    /// Waits for this many further scrapes.
    pub async fn scrapes(&self, count: usize) {
        // One of them may have begun already.
        let goal = self.count() + 1 + count;
        eventually("scrapes", async || (self.count() >= goal).then_some(())).await;
    }

    /// Call it after [`SCRAPES`] scrapes and before the fault is injected.
    pub fn fault_begins(&mut self) {
        self.begin = self.count();
    }

    /// Call it when the metrics show the fault.
    pub fn fault_shows(&mut self) {
        self.shown = self.count();
    }

    /// Call it before the fault is removed, and after [`SCRAPES`] scrapes that show it.
    pub fn fault_ends(&mut self) {
        self.end = self.count();
    }

    /// Checks with promtool that each of these alerts fires during the fault, and neither before
    /// nor after it, and that no other alert fires before the fault. Call it after [`SCRAPES`]
    /// scrapes that do not show the fault any more.
    pub fn check(self, expected: &[&str]) {
        let rules = Rules::read();
        for name in expected {
            rules.alert(name);
        }
        let scrapes = self.scrapes.lock().unwrap().clone();
        let tests = rules.alerts.iter().filter_map(|alert| {
            let is_expected = expected.contains(&&*alert.name);
            // A test that needs only some of the services does not start the others.
            let is_tested = is_expected || alert.name != SERVICE_MISSING;
            is_tested.then(|| self.test(alert, is_expected, &rules, &scrapes))
        });
        let tests: Vec<Value> = tests.collect();
        let file = json!({
            "rule_files": [testbed::paths::root().join(RULES)],
            "evaluation_interval": "1m",
            "tests": tests,
        });
        // JSON is YAML.
        fs::write(&self.file, serde_json::to_string_pretty(&file).unwrap()).unwrap();
        if let Err(output) = promtool::run(&self.promtool, &["test", "rules"], &self.file) {
            panic!("the alerts did not fire as they should, see {}:\n{output}", self.file.display());
        }
    }

    /// A test of one alert, which fires during the fault if it is expected to. The first and the
    /// last scrape are stretched further: to the time for which the past influences the alert.
    fn test(&self, alert: &Alert, is_expected: bool, rules: &Rules, scrapes: &[Scrape]) -> Value {
        let query = rules.scraped(&alert.query);
        let pending = minutes(alert.pending);
        let memory = pending + minutes(query.longest) + MARGIN;
        let shown = self.end - self.shown;
        let mut lengths = vec![(pending + MARGIN).div_ceil(shown); scrapes.len()];
        lengths[0] = memory;
        lengths[scrapes.len() - 1] = memory;
        let end_of = |count: usize| lengths[..count].iter().sum::<usize>() - 1;
        let series = input_series(scrapes, &query.names, &lengths).into_iter();
        let series: Vec<Value> = series.map(|(series, values)| json!({ "series": series, "values": values })).collect();
        let firing = format!("ALERTS{{alertname=\"{}\",alertstate=\"firing\"}}", alert.name);
        let is = |fires: bool, expression: &str, time: usize| {
            let samples = if fires { vec![json!({ "labels": "{}", "value": 1 })] } else { vec![] };
            json!({ "expr": expression, "eval_time": format!("{time}m"), "exp_samples": samples })
        };
        let within = |minutes: usize| format!("count(count_over_time({firing}[{minutes}m])) > bool 0");
        let before = end_of(self.begin);
        let mut checks = vec![is(false, &within(before), before)];
        if is_expected {
            let end = end_of(self.end);
            checks.push(is(true, &within(end - before), end));
            checks.push(is(false, &firing, end_of(scrapes.len())));
        }
        json!({ "interval": "1m", "input_series": series, "promql_expr_test": checks })
    }

    fn count(&self) -> usize {
        self.scrapes.lock().unwrap().len()
    }
}

impl Drop for Recording {
    fn drop(&mut self) {
        self.scraper.abort();
    }
}

fn minutes(duration: Duration) -> usize {
    usize::try_from(duration.as_secs().div_ceil(60)).unwrap()
}

async fn scrape(targets: Vec<(&'static str, String)>, scrapes: Arc<Mutex<Vec<Scrape>>>) {
    let client = Client::new();
    let mut timer = tokio::time::interval(INTERVAL);
    timer.set_missed_tick_behavior(MissedTickBehavior::Skip);
    loop {
        timer.tick().await;
        let pages = targets.iter().map(async |(job, url)| {
            let instance = url.trim_start_matches("http://").trim_end_matches("/metrics").to_owned();
            Some(((*job, instance), page(&client, url).await?))
        });
        let found = futures::future::join_all(pages).await.into_iter().flatten().collect();
        scrapes.lock().unwrap().push(found);
    }
}

/// The page of a process. The outer `None`: the process does not exist. Its address would be
/// missing in the answer of DNS, so Prometheus would not scrape it.
async fn page(client: &Client, url: &str) -> Option<Option<Page>> {
    let read = async { client.get(url).timeout(TIMEOUT).send().await?.error_for_status()?.text().await };
    match read.await {
        Ok(text) => Some(Some(Page::parse(&text))),
        Err(error) if error.is_connect() && !error.is_timeout() => None,
        Err(_) => Some(None),
    }
}
