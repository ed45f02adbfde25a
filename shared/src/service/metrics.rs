//! Every metric's name, in one place. Served as OpenMetrics text at `/metrics` on the admin port.
//! No label has a value that a user chooses: not an id, an address or an unknown event's type.

use std::sync::{Arc, Mutex};

use prometheus_client::encoding::{EncodeLabelSet, text};
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::histogram::Histogram;
use prometheus_client::registry::{Metric, Registry};

/// Upper bounds in seconds: from a cache hit to a request that is about to time out.
const LATENCY_BUCKETS: [f64; 10] = [0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.5, 1.0, 5.0];
/// Upper bounds in seconds: from a live event to one that waited for a dependency all night.
const AGE_BUCKETS: [f64; 10] = [0.01, 0.05, 0.1, 0.25, 0.5, 1.0, 5.0, 60.0, 3600.0, 86400.0];

#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
pub struct Request {
    pub method: String,
    pub route: String,
    pub status: u16,
}

#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
pub struct Consumed {
    pub group: String,
    /// `applied`, `duplicate`, `stale`, `skipped` or `dead_lettered`: every delivered record is exactly one of them.
    pub outcome: &'static str,
}

#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
pub struct Group {
    pub group: String,
}

#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
pub struct Partition {
    pub group: String,
    pub topic: String,
    pub partition: i32,
}

#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
pub struct Round {
    /// `published` or `failed`.
    pub outcome: &'static str,
}

pub type Histograms<L> = Family<L, Histogram, fn() -> Histogram>;

/// What the messaging layer and the HTTP layer count. A clone counts into the same registry.
#[derive(Clone)]
pub struct Metrics {
    registry: Arc<Mutex<Registry>>,
    pub http_requests: Histograms<Request>,
    pub events_consumed: Family<Consumed, Counter>,
    pub event_age: Histograms<Group>,
    pub consumer_retries: Family<Group, Counter>,
    pub consumer_lag: Family<Partition, Gauge>,
    pub consumer_breaker_open: Family<Group, Gauge>,
    pub dead_letters_open: Family<Group, Gauge>,
    pub outbox_rows: Gauge,
    pub outbox_oldest_age: Gauge,
    pub outbox_dead_rows: Gauge,
    pub outbox_blocked_keys: Gauge,
    pub relay_rounds: Family<Round, Counter>,
}

impl Default for Metrics {
    fn default() -> Self {
        let metrics = Self {
            registry: Arc::default(),
            http_requests: Family::new_with_constructor(|| Histogram::new(LATENCY_BUCKETS)),
            events_consumed: Family::default(),
            event_age: Family::new_with_constructor(|| Histogram::new(AGE_BUCKETS)),
            consumer_retries: Family::default(),
            consumer_lag: Family::default(),
            consumer_breaker_open: Family::default(),
            dead_letters_open: Family::default(),
            outbox_rows: Gauge::default(),
            outbox_oldest_age: Gauge::default(),
            outbox_dead_rows: Gauge::default(),
            outbox_blocked_keys: Gauge::default(),
            relay_rounds: Family::default(),
        };
        metrics.register("http_request_duration_seconds", "Time to answer", &metrics.http_requests);
        metrics.register("events_consumed", "Records by what became of them", &metrics.events_consumed);
        metrics.register("event_age_seconds", "From the event to its effect, across services", &metrics.event_age);
        metrics.register(
            "consumer_retries",
            "Batches put off because a dependency was down",
            &metrics.consumer_retries,
        );
        metrics.register("consumer_lag", "Records behind the end of the partition", &metrics.consumer_lag);
        metrics.register(
            "consumer_breaker_open",
            "Consumers paused because they rejected too much",
            &metrics.consumer_breaker_open,
        );
        metrics.register("dead_letters_open", "Dead letters not yet redriven", &metrics.dead_letters_open);
        metrics.register("outbox_rows", "Events not yet published", &metrics.outbox_rows);
        metrics.register("outbox_oldest_age_seconds", "Age of the oldest of them", &metrics.outbox_oldest_age);
        metrics.register("outbox_dead_rows", "Events published and not yet vacuumed", &metrics.outbox_dead_rows);
        metrics.register(
            "outbox_blocked_keys",
            "Keys set aside because Kafka refuses a row",
            &metrics.outbox_blocked_keys,
        );
        metrics.register("relay_rounds", "Kafka transactions of the relay", &metrics.relay_rounds);
        metrics
    }
}

impl Metrics {
    /// Adds a metric of the service's own.
    pub fn register<M: Metric + Clone>(&self, name: &str, help: &str, metric: &M) {
        self.registry.lock().expect("no holder panics").register(name, help, metric.clone());
    }

    /// The page at `/metrics`.
    pub(crate) fn page(&self) -> String {
        let mut page = String::new();
        text::encode(&mut page, &self.registry.lock().expect("no holder panics"))
            .expect("writing to a string does not fail");
        page
    }
}
