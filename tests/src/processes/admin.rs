//! The admin port of a service: status, readiness, liveness and metrics.

use std::time::Duration;

use reqwest::Client;
use serde_json::Value;

use crate::http::send;

/// How long a live process may take to answer.
const LIVENESS_LIMIT: Duration = Duration::from_secs(3);

#[derive(Clone, Debug)]
pub struct Admin {
    url: String,
}

impl Admin {
    pub(super) fn new(url: String) -> Self {
        Self { url }
    }

    pub fn url(&self, path: &str) -> String {
        format!("{}{path}", self.url)
    }

    /// The answer of `/status` as JSON: whether the service waits for nothing, and the body. `None`
    /// if there is no answer.
    pub async fn status(&self) -> Option<(bool, Value)> {
        let answer = send(Client::new().get(self.url("/status")).header("accept", "application/json")).await.ok()?;
        Some((answer.status.is_success(), answer.body))
    }

    /// Whether `/readyz` answers that the service can answer its own requests. `None` if there is
    /// no answer.
    pub async fn is_ready(&self) -> Option<bool> {
        let answer = send(Client::new().get(self.url("/readyz"))).await.ok()?;
        Some(answer.status.is_success())
    }

    /// Whether `/livez` succeeds. A supervisor restarts a process for which it does not.
    pub async fn is_alive(&self) -> bool {
        let answer = Client::new().get(self.url("/livez")).timeout(LIVENESS_LIMIT).send().await;
        answer.is_ok_and(|answer| answer.status().is_success())
    }

    /// The text of `/metrics`. `None` if there is no answer.
    pub async fn metrics_page(&self) -> Option<String> {
        Client::new().get(self.url("/metrics")).send().await.ok()?.text().await.ok()
    }

    /// The sum of a metric's series whose labels contain all of `labels` (`group="…"`). `None` if
    /// there is no such series, or no answer.
    pub async fn metric(&self, name: &str, labels: &[&str]) -> Option<f64> {
        sum(&self.metrics_page().await?, name, labels)
    }
}

fn sum(page: &str, name: &str, labels: &[&str]) -> Option<f64> {
    let lines = page.lines().filter(|line| !line.starts_with('#'));
    let without_exemplars = lines.map(|line| line.split_once(" # ").map_or(line, |(line, _)| line));
    let series = without_exemplars.filter_map(|line| line.rsplit_once(' '));
    let named = series.filter(|(series, _)| series.split('{').next() == Some(name));
    let matching = named.filter(|(series, _)| labels.iter().all(|label| series.contains(label)));
    let values: Vec<f64> = matching.filter_map(|(_, value)| value.parse().ok()).collect();
    (!values.is_empty()).then(|| values.iter().sum())
}

#[cfg(test)]
mod tests {
    use super::sum;

    #[test]
    fn a_metric_is_the_sum_of_the_series_with_all_labels() {
        let page = "# TYPE rounds counter\nrounds_total{outcome=\"a\",x=\"1\"} 2\nrounds_total{outcome=\"a\"} 3\n\
                    rounds_total{outcome=\"b\"} 5\nrounds_total_other 7\n\
                    seconds_bucket{le=\"1.0\"} 9 # {trace_id=\"a b\"} 0.5 17.25\n";
        assert_eq!(sum(page, "rounds_total", &["outcome=\"a\""]), Some(5.0));
        assert_eq!(sum(page, "rounds_total", &[]), Some(10.0));
        assert_eq!(sum(page, "rounds_total", &["outcome=\"c\""]), None);
        assert_eq!(sum(page, "seconds_bucket", &[]), Some(9.0), "the exemplar is no part of the value");
    }
}
