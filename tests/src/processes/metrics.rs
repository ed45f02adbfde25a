//! Status and metrics of the services' first processes.

use serde_json::Value;
use topology::Service;

use super::Processes;
use super::admin::Admin;
use crate::services::service_of;
use crate::waiting::{eventually, eventually_eq};

/// The outcomes of a delivered record. Each record has exactly one.
pub const OUTCOMES: [&str; 5] = ["applied", "duplicate", "stale", "skipped", "dead_lettered"];

impl Processes {
    pub fn admin(&self, service: Service) -> Admin {
        self.addresses.admin(service)
    }

    /// The answer of `/status` as JSON: whether the service waits for nothing, and the body. `None`
    /// if there is no answer.
    pub async fn status(&self, service: Service) -> Option<(bool, Value)> {
        self.admin(service).status().await
    }

    /// Waits until `/status` answers that the service waits for something. Panics if `/livez` fails
    /// before that.
    pub async fn until_waiting(&self, service: Service) {
        let admin = self.admin(service);
        eventually(&format!("{} waits for something", service.name), async || {
            assert!(admin.is_alive().await, "/livez of {} fails: a supervisor would restart it", service.name);
            let (ok, _) = admin.status().await?;
            (!ok).then_some(())
        })
        .await;
    }

    /// The sum of a metric's series whose labels contain all of `labels` (`group="…"`). `None` if
    /// there is no such series, or no answer.
    pub async fn metric(&self, service: Service, name: &str, labels: &[&str]) -> Option<f64> {
        self.admin(service).metric(name, labels).await
    }

    /// A metric of a consumer group.
    pub async fn group_metric(&self, group: &str, name: &str) -> Option<f64> {
        self.metric(service_of(group), name, &[&format!("group=\"{group}\"")]).await
    }

    /// How many partitions of a group wait for a reason.
    pub async fn waiting_partitions(&self, group: &str, reason: &str) -> usize {
        let labels = [&*format!("group=\"{group}\""), &*format!("reason=\"{reason}\"")];
        self.metric(service_of(group), "consumer_partition_waits", &labels).await.unwrap_or(0.0) as usize
    }

    /// The components of a service whose reports contain `text`, after waiting until there is one.
    pub async fn until_reported(&self, service: Service, text: &str) -> Vec<String> {
        let what = format!("{} reports {text:?}", service.name);
        eventually(&what, async || {
            let (_, body) = self.admin(service).status().await?;
            let reported = body["waiting_for"].as_object()?;
            let named = reported.iter().filter(|(_, reason)| reason.as_str().unwrap_or_default().contains(text));
            Some(named.map(|(component, _)| component.clone()).collect::<Vec<_>>()).filter(|named| !named.is_empty())
        })
        .await
    }

    /// Waits until the parts of `/status` whose reason contains this text are exactly these: the
    /// groups of a service report one after another.
    pub async fn until_reported_by(&self, service: Service, text: &str, components: &[String]) {
        let what = format!("parts of {} that report {text:?}", service.name);
        let reported = async || self.until_reported(service, text).await;
        eventually_eq(&what, components.to_vec(), reported).await;
    }

    /// Waits until `/status` of a service reports nothing.
    pub async fn until_nothing_reported(&self, service: Service) {
        let what = format!("{} reports nothing", service.name);
        eventually(&what, async || self.admin(service).status().await?.0.then_some(())).await;
    }

    /// How many records of a group the running process has counted under an outcome.
    pub async fn counted(&self, group: &str, outcome: &str) -> f64 {
        let labels = [&*format!("group=\"{group}\""), &*format!("outcome=\"{outcome}\"")];
        self.metric(service_of(group), "events_consumed_total", &labels).await.unwrap_or(0.0)
    }

    /// How many records of a group the running process has counted, under any outcome.
    pub async fn counted_in_all(&self, group: &str) -> f64 {
        let mut all = 0.0;
        for outcome in OUTCOMES {
            all += self.counted(group, outcome).await;
        }
        all
    }

    /// How often the running process has retried batches of a group.
    pub async fn retries(&self, group: &str) -> f64 {
        self.group_metric(group, "consumer_retries_total").await.unwrap_or(0.0)
    }

    /// The number of a group's open dead letters, by the metric of the running process.
    pub async fn dead_letters_open(&self, group: &str) -> Option<f64> {
        self.group_metric(group, "dead_letters_open").await
    }
}
