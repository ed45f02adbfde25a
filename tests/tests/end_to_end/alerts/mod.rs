//! Each alert fires while its fault is there, and neither before nor after it: by the thresholds of
//! production, on the metrics of the real services.
//!
//! Faults that can be there at the same time are in one test.

mod consumers;
mod mail;
mod metrics;
mod processes;
mod publishing;
mod requests;

use tests::alerts::Recording;
use tests::{System, eventually_eq};
use topology::Service;

/// Records what Prometheus would scrape, from when these services wait for nothing. `None` without
/// promtool.
async fn record(system: &System, services: &[Service]) -> Option<Recording> {
    for service in services {
        system.processes.until_nothing_reported(*service).await;
        if !service.writes.is_empty() {
            until(system, *service, "relay_leader", &[], 1.0).await;
        }
    }
    Recording::start(&system.processes, services)
}

/// Waits until a metric has this value, summed over the series with these labels.
async fn until(system: &System, service: Service, name: &str, labels: &[&str], expected: f64) {
    let what = format!("{name} of {}", service.name);
    eventually_eq(&what, Some(expected), async || system.processes.metric(service, name, labels).await).await;
}

/// As [`until`], for at least this value.
async fn until_at_least(system: &System, service: Service, name: &str, labels: &[&str], expected: f64) {
    let what = format!("{name} of {} is at least {expected}", service.name);
    tests::eventually(&what, async || {
        system.processes.metric(service, name, labels).await.filter(|value| *value >= expected)
    })
    .await;
}
