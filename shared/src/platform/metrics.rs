//! All metrics of the messaging and HTTP layers, with their names. The admin port serves them as
//! OpenMetrics text at `/metrics`. No label has a value that a user chooses: no id, no address, no
//! type of an unknown event.

use std::sync::{Arc, Mutex};

use prometheus_client::encoding::{EncodeLabelSet, text};
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::histogram::Histogram;
use prometheus_client::registry::{Metric, Registry};

/// Upper bounds in seconds, from a cache hit to a request that is about to time out.
const LATENCY_BUCKETS: [f64; 10] = [0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.5, 1.0, 5.0];
/// Upper bounds in seconds, from a live event to one that waited a night for a dependency.
const AGE_BUCKETS: [f64; 10] = [0.01, 0.05, 0.1, 0.25, 0.5, 1.0, 5.0, 60.0, 3600.0, 86400.0];

#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
pub struct RequestLabels {
    pub method: &'static str,
    pub route: String,
    pub status: u16,
}

#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
pub struct LimitLabels {
    /// The kind of request, such as `requests` for all.
    pub limit: &'static str,
    /// `address` or `principal`.
    pub per: &'static str,
}

#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
pub struct ConsumedLabels {
    pub group: String,
    /// `applied`, `duplicate`, `stale`, `skipped` or `dead_lettered`. Every delivered record has
    /// exactly one outcome.
    pub outcome: &'static str,
}

#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
pub struct GroupLabels {
    pub group: String,
}

#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
pub struct PartitionLabels {
    pub group: String,
    pub topic: String,
    pub partition: i32,
}

#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
pub struct WaitLabels {
    pub group: String,
    pub topic: String,
    pub partition: i32,
    /// `failing_record`, `not_read` or `open_transaction`.
    pub reason: &'static str,
}

#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
pub struct RefusalLabels {
    pub group: String,
    /// The name of Kafka's error code.
    pub code: String,
}

#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
pub struct RoundLabels {
    /// `published` or `failed`.
    pub outcome: &'static str,
}

#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
pub struct TopicLabels {
    pub topic: String,
}

pub type Histograms<L> = Family<L, Histogram, fn() -> Histogram>;

/// The metrics of the messaging layer and the HTTP layer. Clones share one registry.
#[derive(Clone)]
pub struct Metrics {
    registry: Arc<Mutex<Registry>>,
    pub http_requests: Histograms<RequestLabels>,
    pub http_connections_refused: Counter,
    pub http_requests_limited: Family<LimitLabels, Counter>,
    pub trace_spans_ended: Counter,
    pub trace_spans_exported: Counter,
    pub trace_exports_failed: Counter,
    pub events_consumed: Family<ConsumedLabels, Counter>,
    pub event_age: Histograms<GroupLabels>,
    pub consumer_retries: Family<GroupLabels, Counter>,
    pub consumer_lag: Family<PartitionLabels, Gauge>,
    pub consumer_partition_waits: Family<WaitLabels, Gauge>,
    pub consumer_refusals: Family<RefusalLabels, Counter>,
    pub consumer_breaker_open: Family<GroupLabels, Gauge>,
    pub consumer_paused: Family<GroupLabels, Gauge>,
    pub dead_letters_open: Family<GroupLabels, Gauge>,
    pub outbox_rows: Gauge,
    pub outbox_oldest_age: Gauge,
    pub outbox_dead_rows: Gauge,
    pub outbox_blocked_topics: Gauge,
    pub outbox_blocked_partitions: Gauge,
    pub outbox_blocked_keys: Gauge,
    pub relay_leader: Gauge,
    pub topic_partitions_changed: Family<TopicLabels, Gauge>,
    pub topic_settings_changed: Family<TopicLabels, Gauge>,
    pub relay_rounds: Family<RoundLabels, Counter>,
}

impl Default for Metrics {
    fn default() -> Self {
        let metrics = Self {
            registry: Arc::default(),
            http_requests: Family::new_with_constructor(|| Histogram::new(LATENCY_BUCKETS)),
            http_connections_refused: Counter::default(),
            http_requests_limited: Family::default(),
            trace_spans_ended: Counter::default(),
            trace_spans_exported: Counter::default(),
            trace_exports_failed: Counter::default(),
            events_consumed: Family::default(),
            event_age: Family::new_with_constructor(|| Histogram::new(AGE_BUCKETS)),
            consumer_retries: Family::default(),
            consumer_lag: Family::default(),
            consumer_partition_waits: Family::default(),
            consumer_refusals: Family::default(),
            consumer_breaker_open: Family::default(),
            consumer_paused: Family::default(),
            dead_letters_open: Family::default(),
            outbox_rows: Gauge::default(),
            outbox_oldest_age: Gauge::default(),
            outbox_dead_rows: Gauge::default(),
            outbox_blocked_topics: Gauge::default(),
            outbox_blocked_partitions: Gauge::default(),
            outbox_blocked_keys: Gauge::default(),
            relay_leader: Gauge::default(),
            topic_partitions_changed: Family::default(),
            topic_settings_changed: Family::default(),
            relay_rounds: Family::default(),
        };
        metrics.register("http_request_duration_seconds", "Time to answer a request", &metrics.http_requests);
        metrics.register(
            "http_connections_refused",
            "Connections to the public port beyond HTTP_CONNECTIONS",
            &metrics.http_connections_refused,
        );
        metrics.register(
            "http_requests_limited",
            "Requests of callers that have sent too many, by limit",
            &metrics.http_requests_limited,
        );
        metrics.register_consumers();
        metrics.register_traces();
        metrics.register_outbox();
        metrics
    }
}

impl Metrics {
    fn register_traces(&self) {
        self.register("trace_spans_ended", "Spans that should be exported to the collector", &self.trace_spans_ended);
        self.register("trace_spans_exported", "Spans that the collector has accepted", &self.trace_spans_exported);
        self.register(
            "trace_exports_failed",
            "Batches of spans that the collector did not accept",
            &self.trace_exports_failed,
        );
    }

    /// The metrics of a service that consumes or owns topics.
    fn register_consumers(&self) {
        self.register("events_consumed", "Records that a consumer group finished, by outcome", &self.events_consumed);
        self.register(
            "event_age_seconds",
            "Time from an event to its effect, by the clocks of two services",
            &self.event_age,
        );
        self.register("consumer_retries", "Batches that failed and are retried later", &self.consumer_retries);
        self.register(
            "consumer_lag",
            "Records of the partition that the group has not handled yet, to the end of the log",
            &self.consumer_lag,
        );
        self.register(
            "consumer_partition_waits",
            "1 if the records of a partition wait although its consumer works, by reason",
            &self.consumer_partition_waits,
        );
        self.register(
            "consumer_refusals",
            "Requests of consumers that Kafka refused, by error code",
            &self.consumer_refusals,
        );
        self.register(
            "consumer_breaker_open",
            "Consumers that are paused because they rejected too many records",
            &self.consumer_breaker_open,
        );
        self.register("consumer_paused", "Consumers that an operator has paused", &self.consumer_paused);
        self.register(
            "topic_settings_changed",
            "Differences between a topic and its declaration",
            &self.topic_settings_changed,
        );
        self.register("dead_letters_open", "Dead letters that are not settled yet", &self.dead_letters_open);
    }

    /// The metrics of a service that has an outbox.
    fn register_outbox(&self) {
        self.register("outbox_rows", "Outbox rows that are not published yet", &self.outbox_rows);
        self.register(
            "outbox_oldest_age_seconds",
            "Age of the oldest outbox row that is not published yet",
            &self.outbox_oldest_age,
        );
        self.register(
            "outbox_dead_rows",
            "Deleted outbox rows that Postgres has not vacuumed yet",
            &self.outbox_dead_rows,
        );
        self.register(
            "outbox_blocked_keys",
            "Keys whose rows wait because Kafka rejected one of them",
            &self.outbox_blocked_keys,
        );
        self.register(
            "outbox_blocked_topics",
            "Topics whose rows wait because Kafka does not accept them",
            &self.outbox_blocked_topics,
        );
        self.register(
            "outbox_blocked_partitions",
            "Partitions whose rows wait because they have no leader or too few in-sync replicas",
            &self.outbox_blocked_partitions,
        );
        self.register("relay_leader", "1 if this process publishes the outbox", &self.relay_leader);
        self.register(
            "topic_partitions_changed",
            "1 if the number of partitions of a state topic differs from its declaration",
            &self.topic_partitions_changed,
        );
        self.register("relay_rounds", "Rounds of the outbox relay, by outcome", &self.relay_rounds);
    }

    /// Sets the metrics of what is blocked to 0, because another process reports them.
    pub(crate) fn reset_blocked(&self) {
        let gauges = [&self.outbox_blocked_topics, &self.outbox_blocked_partitions, &self.outbox_blocked_keys];
        for gauge in gauges {
            gauge.set(0);
        }
    }

    /// Registers a metric of a service.
    pub fn register<M: Metric + Clone>(&self, name: &str, help: &str, metric: &M) {
        self.registry.lock().expect("no thread panics while it holds the lock").register(name, help, metric.clone());
    }

    /// The page at `/metrics`.
    pub(crate) fn page(&self) -> String {
        let mut page = String::new();
        text::encode(&mut page, &self.registry.lock().expect("no thread panics while it holds the lock"))
            .expect("writing to a string does not fail");
        page
    }
}
