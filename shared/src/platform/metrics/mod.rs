//! The metrics of a process, with their names and meanings. Each metric is described where it is
//! registered, and nowhere else: `docs/metrics.md` is written from these descriptions. The admin
//! port serves the values as OpenMetrics text at `/metrics`.
//!
//! A process registers what it has: one without an outbox has no metrics of an outbox.

mod labels;
mod description;
mod exemplars;
mod since;
mod process;

use std::sync::{Arc, Mutex, MutexGuard};

use prometheus_client::encoding::text;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::histogram::Histogram;
use prometheus_client::registry::Metric;
use serde_json::{Value, json};

pub use description::Description;
use description::Registered;
use exemplars::age_histogram;
pub(crate) use exemplars::observe;
pub use exemplars::{Ages, Exemplar, Exemplars, TracedHistogram, TracedHistograms};
pub use labels::{
    ConsumedLabels, GroupLabels, LimitLabels, PartitionLabels, RebalanceLabels, RefusalLabels, RequestLabels,
    RoundLabels, TopicLabels, WaitLabels,
};
use process::Process;
pub use since::{SecondsSince, now_ms};

/// Upper bounds in seconds, from a cache hit to a request that is about to time out.
const LATENCY_BUCKETS: [f64; 10] = [0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.5, 1.0, 5.0];
/// Upper bounds in seconds, from one record to a call that HANDLE_TIMEOUT_MS ends.
const HANDLER_BUCKETS: [f64; 10] = [0.001, 0.0025, 0.005, 0.01, 0.025, 0.1, 0.5, 1.0, 10.0, 60.0];
/// Upper bounds in records. The default of BATCH_RECORDS is 2,000.
const BATCH_BUCKETS: [f64; 9] = [1.0, 2.0, 5.0, 20.0, 100.0, 500.0, 1000.0, 2000.0, 10_000.0];

/// The outcomes of a delivered record.
const OUTCOMES: [&str; 5] = ["applied", "duplicate", "stale", "skipped", "dead_lettered"];

const LOCK: &str = "no thread panics while it holds the lock";

pub type Histograms<L> = Family<L, Histogram, fn() -> Histogram>;

/// The metrics of the messaging layer and the HTTP layer. Clones share one registry.
#[derive(Clone)]
pub struct Metrics {
    registered: Arc<Mutex<Registered>>,
    process: Process,
    /// Makes the exemplars of this process.
    pub exemplars: Exemplars,
    pub waiting_components: Gauge,
    pub http_requests: TracedHistograms<RequestLabels>,
    pub http_connections_refused: Counter,
    pub http_requests_limited: Family<LimitLabels, Counter>,
    pub trace_spans_ended: Counter,
    pub trace_spans_exported: Counter,
    pub trace_exports_failed: Counter,
    pub events_consumed: Family<ConsumedLabels, Counter>,
    event_age: TracedHistograms<GroupLabels>,
    event_age_negative: Family<GroupLabels, Counter>,
    consumer_batch_records: Histograms<GroupLabels>,
    consumer_handler_duration: Histograms<GroupLabels>,
    pub consumer_retries: Family<GroupLabels, Counter>,
    pub consumer_rebalances: Family<RebalanceLabels, Counter>,
    pub consumer_partitions: Family<GroupLabels, Gauge>,
    pub consumer_lag: Family<PartitionLabels, Gauge>,
    pub consumer_lag_seconds: Family<PartitionLabels, SecondsSince>,
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

/// The metrics of one consumer group in this process, for each of its batches: without the look-up
/// by labels.
#[derive(Clone)]
pub struct GroupMetrics {
    pub applied: Counter,
    pub duplicate: Counter,
    pub stale: Counter,
    pub skipped: Counter,
    pub dead_lettered: Counter,
    pub ages: Ages,
    pub batch_records: Histogram,
    pub handler_duration: Histogram,
}

impl Metrics {
    /// The metrics that every process has. `exports_spans`: whether there is a collector for
    /// traces.
    pub fn new(exports_spans: bool) -> Self {
        let metrics = Self {
            registered: Arc::default(),
            process: Process::new(),
            exemplars: Exemplars::new(exports_spans),
            waiting_components: Gauge::default(),
            http_requests: Family::new_with_constructor(|| TracedHistogram::new(LATENCY_BUCKETS.into_iter())),
            http_connections_refused: Counter::default(),
            http_requests_limited: Family::default(),
            trace_spans_ended: Counter::default(),
            trace_spans_exported: Counter::default(),
            trace_exports_failed: Counter::default(),
            events_consumed: Family::default(),
            event_age: Family::new_with_constructor(age_histogram),
            event_age_negative: Family::default(),
            consumer_batch_records: Family::new_with_constructor(|| Histogram::new(BATCH_BUCKETS)),
            consumer_handler_duration: Family::new_with_constructor(|| Histogram::new(HANDLER_BUCKETS)),
            consumer_retries: Family::default(),
            consumer_rebalances: Family::default(),
            consumer_partitions: Family::default(),
            consumer_lag: Family::default(),
            consumer_lag_seconds: Family::default(),
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
        metrics.process.register(&mut metrics.registered());
        metrics.register_http();
        metrics.register_traces();
        metrics
    }

    fn register_http(&self) {
        let description = Description {
            name: "waiting_components",
            unit: "components",
            labels: &[],
            meaning: "Parts of the process that wait for something. /status names them",
            bad: "above 0 for minutes: [A service waits](operations.md#a-service-waits)",
        };
        self.register(description, &self.waiting_components);
        let description = Description {
            name: "http_request_duration_seconds",
            unit: "seconds",
            labels: &["method", "route", "status"],
            meaning: "Time to answer a request to the public port. The route has {id} instead of an id. The route is none \
                      if no route has this path, and for connections beyond HTTP_CONNECTIONS. With exemplars",
            bad: "many answers take more than 0.1 s, or have the status 409 or 5xx: \
                  [Requests are answered with 503 or 409](operations.md#requests-are-answered-with-503-or-409). They have \
                  401 or 403: [401 or 403](operations.md#requests-are-answered-with-401-or-403)",
        };
        self.register(description, &self.http_requests);
        let description = Description {
            name: "http_connections_refused",
            unit: "connections",
            labels: &[],
            meaning: "Connections to the public port beyond HTTP_CONNECTIONS",
            bad: "grows: [Requests are answered with 503 or 409](operations.md#requests-are-answered-with-503-or-409)",
        };
        self.register(description, &self.http_connections_refused);
        let description = Description {
            name: "http_requests_limited",
            unit: "requests",
            labels: &["limit", "per"],
            meaning: "Requests that were refused because their caller had sent too many. The label limit is requests, or \
                      the kind of request if that kind has a limit of its own. The label per is address or principal",
            bad: "grows fast: [Callers are answered with 429](operations.md#callers-are-answered-with-429)",
        };
        self.register(description, &self.http_requests_limited);
    }

    fn register_traces(&self) {
        let description = Description {
            name: "trace_spans_ended",
            unit: "spans",
            labels: &[],
            meaning: "Ended spans that are to be exported to the collector",
            bad: "no value is bad by itself. This minus `trace_spans_exported_total` is the number of spans that are lost or \
                  still wait. At most 2,560 wait",
        };
        self.register(description, &self.trace_spans_ended);
        let description = Description {
            name: "trace_spans_exported",
            unit: "spans",
            labels: &[],
            meaning: "Spans that the collector has accepted",
            bad: "stops while `trace_spans_ended_total` grows: [Traces are lost](operations.md#traces-are-lost)",
        };
        self.register(description, &self.trace_spans_exported);
        let description = Description {
            name: "trace_exports_failed",
            unit: "batches",
            labels: &[],
            meaning: "Batches of spans that the collector did not accept",
            bad: "grows: [Traces are lost](operations.md#traces-are-lost)",
        };
        self.register(description, &self.trace_exports_failed);
    }

    /// The metrics of a process that consumes topics.
    pub(crate) fn register_consumers(&self) {
        self.register_records();
        self.register_batches();
        self.register_lag();
        self.register_waits();
        self.register_topics();
    }

    /// What consumers did with records.
    fn register_records(&self) {
        let description = Description {
            name: "events_consumed",
            unit: "records",
            labels: &["group", "outcome"],
            meaning: "Records that a consumer group has finished. Each has one outcome: applied, duplicate (it had taken \
                      effect before), stale (a newer version had taken effect before), skipped (this release does not know \
                      its type) or dead_lettered",
            bad: "`skipped` grows: [Events are skipped](operations.md#events-are-skipped). `dead_lettered` grows: [There are \
                  dead letters](operations.md#there-are-dead-letters). Duplicates are harmless; many of them follow a \
                  crash, a rebalance, a replay or a relay that repeats a round",
        };
        self.register(description, &self.events_consumed);
        let description = Description {
            name: "event_age_seconds",
            unit: "seconds",
            labels: &["group"],
            meaning: "Time from an event to its effect. An event about a user has the time of its request. The value is \
                      the difference between the clocks of two services, for display only. Redriven records do not \
                      count. With exemplars",
            bad: "above a second without a backlog: [A consumer lags](operations.md#a-consumer-lags)",
        };
        self.register(description, &self.event_age);
        let description = Description {
            name: "event_age_negative",
            unit: "records",
            labels: &["group"],
            meaning: "Records whose event_age_seconds was negative and counts as 0, because the clock of the publishing \
                      service is ahead of this one",
            bad: "grows: the clocks differ, so `event_age_seconds` is wrong. Correct the clocks. Nothing else depends on them",
        };
        self.register(description, &self.event_age_negative);
        let description = Description {
            name: "dead_letters_open",
            unit: "dead letters",
            labels: &["group"],
            meaning: "Dead letters that are not settled yet. 0 until the process has counted them after its start",
            bad: "above 0: [There are dead letters](operations.md#there-are-dead-letters)",
        };
        self.register(description, &self.dead_letters_open);
    }

    /// How consumers work.
    fn register_batches(&self) {
        let description = Description {
            name: "consumer_batch_records",
            unit: "records",
            labels: &["group"],
            meaning: "Number of records in a batch that a consumer has finished",
            bad: "no value is bad by itself. Large batches show a backlog",
        };
        self.register(description, &self.consumer_batch_records);
        let description = Description {
            name: "consumer_handler_duration_seconds",
            unit: "seconds",
            labels: &["group"],
            meaning: "Duration of a call of the handler, which handles a batch or a single record of it. Failed calls \
                      included",
            bad: "near HANDLE_TIMEOUT_MS (60 s): the database or Valkey is slow: \
                  [A consumer waits for a dependency](operations.md#a-consumer-waits-for-a-dependency)",
        };
        self.register(description, &self.consumer_handler_duration);
        let description = Description {
            name: "consumer_retries",
            unit: "batches",
            labels: &["group"],
            meaning: "Failures of batches, which are then retried",
            bad: "grows for minutes: \
                  [A consumer waits for a dependency](operations.md#a-consumer-waits-for-a-dependency)",
        };
        self.register(description, &self.consumer_retries);
        let description = Description {
            name: "consumer_rebalances",
            unit: "changes",
            labels: &["group", "action"],
            meaning: "Times that partitions were assigned to a consumer of this process (assigned), taken from it (revoked), \
                      or had been given to another consumer before this one knew (lost)",
            bad: "grows without a deployment: processes join and leave, or do not reach Kafka in time. `lost` grows: the \
                  process did not poll or did not reach Kafka: [A consumer lags](operations.md#a-consumer-lags)",
        };
        self.register(description, &self.consumer_rebalances);
        let description = Description {
            name: "consumer_partitions",
            unit: "partitions",
            labels: &["group"],
            meaning: "Partitions that the consumers of this process read",
            bad: "the sum over all processes of a service is below the number of partitions of the topic (6) for a \
                  minute: some partitions have no consumer: [A service waits](operations.md#a-service-waits)",
        };
        self.register(description, &self.consumer_partitions);
    }

    fn register_lag(&self) {
        let description = Description {
            name: "consumer_lag",
            unit: "records",
            labels: &["group", "topic", "partition"],
            meaning: "Records of the partition that the group has not handled yet, to the end of the log. Reported by the \
                      process that reads the partition",
            bad: "grows for minutes: [A consumer lags](operations.md#a-consumer-lags)",
        };
        self.register(description, &self.consumer_lag);
        let description = Description {
            name: "consumer_lag_seconds",
            unit: "seconds",
            labels: &["group", "topic", "partition"],
            meaning: "Age of the oldest record of the partition that the group has not handled yet, by the record's \
                      timestamp. 0 if there is none. Absent while it is unknown",
            bad: "above a minute: [A consumer lags](operations.md#a-consumer-lags). Absent for a partition in all processes: \
                  no consumer reads it",
        };
        self.register(description, &self.consumer_lag_seconds);
    }

    /// Why consumers do not handle records.
    fn register_waits(&self) {
        let description = Description {
            name: "consumer_partition_waits",
            unit: "0 or 1",
            labels: &["group", "topic", "partition", "reason"],
            meaning: "1 if the records of a partition wait although its consumer works. The reason is failing_record, \
                      not_read or open_transaction. Absent otherwise",
            bad: "1: the reason says which section: [A service waits](operations.md#a-service-waits)",
        };
        self.register(description, &self.consumer_partition_waits);
        let description = Description {
            name: "consumer_refusals",
            unit: "requests",
            labels: &["group", "code"],
            meaning: "Requests of consumers that Kafka refused. The code is Kafka's error code",
            bad: "grows: [Kafka refuses requests of a consumer](operations.md#kafka-refuses-requests-of-a-consumer)",
        };
        self.register(description, &self.consumer_refusals);
        let description = Description {
            name: "consumer_breaker_open",
            unit: "consumers",
            labels: &["group"],
            meaning: "Consumers that are paused because they rejected too many records",
            bad: "above 0: [The breaker is open](operations.md#the-breaker-is-open)",
        };
        self.register(description, &self.consumer_breaker_open);
        let description = Description {
            name: "consumer_paused",
            unit: "consumers",
            labels: &["group"],
            meaning: "Consumers that an operator has paused",
            bad: "above 0 after the end of the work that needed the pause: \
                  [A consumer is paused](operations.md#a-consumer-is-paused)",
        };
        self.register(description, &self.consumer_paused);
    }

    /// The metrics of a process that watches topics.
    pub(crate) fn register_topics(&self) {
        let description = Description {
            name: "topic_settings_changed",
            unit: "differences",
            labels: &["topic"],
            meaning: "Differences between a topic and its declaration",
            bad: "above 0: [A topic differs from its declaration](operations.md#a-topic-differs-from-its-declaration)",
        };
        self.register(description, &self.topic_settings_changed);
    }

    /// The metrics of a process that publishes an outbox.
    pub(crate) fn register_outbox(&self) {
        self.register_outbox_rows();
        self.register_blocked_rows();
        let description = Description {
            name: "relay_leader",
            unit: "0 or 1",
            labels: &[],
            meaning: "1 if this process publishes the outbox",
            bad: "the sum over the replicas of a service is 0 for a minute: [No relay leads](operations.md#no-relay-leads)",
        };
        self.register(description, &self.relay_leader);
        let description = Description {
            name: "relay_rounds",
            unit: "rounds",
            labels: &["outcome"],
            meaning: "Rounds of the outbox relay: published or failed",
            bad: "`failed` grows: [Events are not published](operations.md#events-are-not-published)",
        };
        for outcome in ["published", "failed"] {
            self.relay_rounds.get_or_create(&RoundLabels { outcome }).inc_by(0);
        }
        self.register(description, &self.relay_rounds);
        let description = Description {
            name: "topic_partitions_changed",
            unit: "0 or 1",
            labels: &["topic"],
            meaning: "1 if the number of partitions of a state topic differs from its declaration",
            bad: "1: [The number of partitions of a state topic was changed]\
                  (operations.md#the-number-of-partitions-of-a-state-topic-was-changed)",
        };
        self.register(description, &self.topic_partitions_changed);
    }

    fn register_outbox_rows(&self) {
        let description = Description {
            name: "outbox_rows",
            unit: "rows",
            labels: &[],
            meaning: "Outbox rows that are not published yet, counted up to 10,000. Every replica reports the same outbox",
            bad: "grows: [Events are not published](operations.md#events-are-not-published)",
        };
        self.register(description, &self.outbox_rows);
        let description = Description {
            name: "outbox_oldest_age_seconds",
            unit: "seconds",
            labels: &[],
            meaning: "Age of the oldest outbox row that is not published yet. Every replica reports the same outbox",
            bad: "above a minute: [Events are not published](operations.md#events-are-not-published)",
        };
        self.register(description, &self.outbox_oldest_age);
        let description = Description {
            name: "outbox_dead_rows",
            unit: "rows",
            labels: &[],
            meaning: "Deleted outbox rows that Postgres has not vacuumed yet",
            bad: "stays above 50,000: [The outbox is slow](operations.md#the-outbox-is-slow)",
        };
        self.register(description, &self.outbox_dead_rows);
    }

    fn register_blocked_rows(&self) {
        const BAD: &str =
            "above 0: [Kafka does not accept some events](operations.md#kafka-does-not-accept-some-events)";
        let description = Description {
            name: "outbox_blocked_topics",
            unit: "topics",
            labels: &[],
            meaning: "Topics whose rows wait because Kafka does not accept them. Reported by the leader",
            bad: BAD,
        };
        self.register(description, &self.outbox_blocked_topics);
        let description = Description {
            name: "outbox_blocked_partitions",
            unit: "partitions",
            labels: &[],
            meaning: "Partitions whose rows wait because they have no leader or too few in-sync replicas. Reported by the \
                      leader",
            bad: BAD,
        };
        self.register(description, &self.outbox_blocked_partitions);
        let description = Description {
            name: "outbox_blocked_keys",
            unit: "keys",
            labels: &[],
            meaning: "Keys whose rows wait because Kafka rejected one of them. Reported by the leader",
            bad: BAD,
        };
        self.register(description, &self.outbox_blocked_keys);
    }

    /// The metrics of a consumer group. They start with 0: a counter that appears with its first
    /// increment would hide that increment.
    pub(crate) fn of_group(&self, group: &str) -> GroupMetrics {
        let group = GroupLabels { group: group.to_owned() };
        let [applied, duplicate, stale, skipped, dead_lettered] = OUTCOMES.map(|outcome| {
            let labels = ConsumedLabels { group: group.group.clone(), outcome };
            self.events_consumed.get_or_create_owned(&labels)
        });
        self.consumer_retries.get_or_create(&group).inc_by(0);
        self.consumer_breaker_open.get_or_create(&group).set(0);
        self.consumer_paused.get_or_create(&group).set(0);
        self.consumer_partitions.get_or_create(&group).set(0);
        for action in ["assigned", "revoked", "lost"] {
            let labels = RebalanceLabels { group: group.group.clone(), action };
            self.consumer_rebalances.get_or_create(&labels).inc_by(0);
        }
        GroupMetrics {
            applied,
            duplicate,
            stale,
            skipped,
            dead_lettered,
            ages: Ages {
                histogram: self.event_age.get_or_create_owned(&group),
                negative: self.event_age_negative.get_or_create_owned(&group),
            },
            batch_records: self.consumer_batch_records.get_or_create_owned(&group),
            handler_duration: self.consumer_handler_duration.get_or_create_owned(&group),
        }
    }

    /// Resets the metrics that only the leader of a relay knows, because another process leads.
    pub(crate) fn reset_leaders(&self) {
        self.topic_partitions_changed.clear();
        let gauges = [&self.outbox_blocked_topics, &self.outbox_blocked_partitions, &self.outbox_blocked_keys];
        for gauge in gauges {
            gauge.set(0);
        }
    }

    /// Registers a metric, of a service for example. A metric with this name that is registered
    /// already stays.
    pub fn register<M: Metric + Clone>(&self, description: Description, metric: &M) {
        self.registered().add(description, metric);
    }

    /// Registers ages: a histogram, and a counter of those that were negative.
    pub fn register_ages(&self, histogram: Description, negative: Description, ages: &Ages) {
        self.register(histogram, &ages.histogram);
        self.register(negative, &ages.negative);
    }

    /// The page at `/metrics`.
    pub(crate) fn page(&self) -> String {
        let mut page = String::new();
        let registered = self.registered();
        self.process.measure();
        text::encode(&mut page, &registered.registry).expect("writing to a string does not fail");
        page
    }

    /// What each metric means, for people.
    pub(crate) fn descriptions(&self) -> Value {
        json!(self.registered().descriptions)
    }

    fn registered(&self) -> MutexGuard<'_, Registered> {
        self.registered.lock().expect(LOCK)
    }
}
