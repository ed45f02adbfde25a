//! What is known about each metric. It is stated once, where the metric is registered: a scrape
//! shows it as HELP and UNIT, and `docs/metrics.md` is written from it.

use prometheus_client::metrics::MetricType;
use prometheus_client::registry::{Metric, Registry, Unit};
use serde::Serialize;

/// A metric, in the words of its readers.
#[derive(Clone, Copy, Debug)]
pub struct Description {
    /// The name, without the `_total` of a counter. If it is measured in seconds or bytes, it ends
    /// with its unit.
    pub name: &'static str,
    /// `seconds`, `bytes`, or what is counted. `0 or 1` for a gauge that is a flag.
    pub unit: &'static str,
    pub labels: &'static [&'static str],
    /// One or two sentences without a full stop at the end, for the HELP text.
    pub meaning: &'static str,
    /// Which values are bad, and where to look then, as Markdown in a page in `docs`.
    pub bad: &'static str,
}

/// A registered metric. `/metrics/descriptions` answers a list of these.
#[derive(Clone, Debug, Serialize)]
pub(super) struct Described {
    /// The name in a query. A histogram has the series `<name>_bucket`, `<name>_count` and
    /// `<name>_sum`.
    name: String,
    #[serde(rename = "type")]
    kind: String,
    unit: &'static str,
    labels: &'static [&'static str],
    meaning: &'static str,
    bad: &'static str,
}

#[derive(Default)]
pub(super) struct Registered {
    pub registry: Registry,
    pub descriptions: Vec<Described>,
}

impl Registered {
    /// Registers a metric. A name that is registered already is left as it is: a process may have
    /// several consumers, for example.
    pub fn add<M: Metric + Clone>(&mut self, description: Description, metric: &M) {
        let Description { name, unit, labels, meaning, bad } = description;
        let kind = metric.metric_type();
        let name_in_queries = match kind {
            MetricType::Counter => format!("{name}_total"),
            _ => name.to_owned(),
        };
        if self.descriptions.iter().any(|described| described.name == name_in_queries) {
            return;
        }
        match (name.strip_suffix("_seconds"), name.strip_suffix("_bytes")) {
            (Some(stem), _) => self.registry.register_with_unit(stem, meaning, Unit::Seconds, metric.clone()),
            (_, Some(stem)) => self.registry.register_with_unit(stem, meaning, Unit::Bytes, metric.clone()),
            _ => self.registry.register(name, meaning, metric.clone()),
        }
        let kind = kind.as_str().to_owned();
        self.descriptions.push(Described { name: name_in_queries, kind, unit, labels, meaning, bad });
    }
}
