//! What the metrics show: exemplars that lead to a trace, ages, the lag in seconds, and rebalances.
//! The counters of records are in `outcome_counters`.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Instant;

use reqwest::{Client, StatusCode};
use serde_json::json;
use sqlx::{Connection, PgConnection};
use tests::clock::Clock;
use tests::http::send_with_retries;
use tests::otlp::Otlp;
use tests::services::{ANALYTICS_AUDIT, ANALYTICS_EMAILS, ANALYTICS_USERS, DEFAULT_CONSUMERS, groups, service_of};
use tests::users::address;
use tests::{System, eventually, eventually_eq};
use topology::{ANALYTICS, EMAIL, SERVICES, Service, USER};

const HOUR: i64 = 3600;
const PARTITIONS: usize = 6;
/// The trace of a caller.
const TRACE: &str = "0af7651916cd43dd8448eb211c80319c";
/// The histograms that have exemplars, with the service that observes the registration there.
const AGES: [(Service, &str); 2] = [(EMAIL, "mail_age_seconds"), (ANALYTICS, "event_age_seconds")];

/// Registers a user within [`TRACE`], and waits until the mail is sent and counted.
async fn register_in_trace(system: &System, flags: &str) {
    let url = system.users.url(USER, "/users");
    let body = json!({ "email": address(), "display_name": "Ada Lovelace" });
    let traceparent = format!("00-{TRACE}-b7ad6b7169203331-{flags}");
    let request = || Client::new().post(&url).json(&body).header("traceparent", &traceparent);
    let answer = send_with_retries(request).await;
    assert_eq!(answer.status, StatusCode::CREATED, "{answer:?}");
    system.users.until_mailed(answer.id()).await;
    system.users.until_counted(1, 1).await;
}

async fn page(system: &System, service: Service) -> String {
    system.processes.admin(service).metrics_page().await.unwrap()
}

/// The trace ids of the exemplars of a histogram.
fn exemplars(page: &str, name: &str) -> BTreeSet<String> {
    let buckets = page.lines().filter(|line| line.starts_with(&format!("{name}_bucket{{")));
    let exemplars = buckets.filter_map(|line| line.split_once(" # {trace_id=\"")?.1.split_once("\"} "));
    exemplars.map(|(trace, _value_and_time)| trace.to_owned()).collect()
}

/// The value of a metric for each partition that the first process of a group reports.
async fn by_partition(system: &System, group: &str, name: &str) -> BTreeMap<i32, f64> {
    let page = page(system, service_of(group)).await;
    let start = format!("{name}{{group=\"{group}\",");
    let values = page.lines().filter(|line| line.starts_with(&start)).map(|line| {
        let (series, value) = line.rsplit_once(' ').unwrap();
        let partition = series.split_once("partition=\"").unwrap().1.split('"').next().unwrap();
        (partition.parse().unwrap(), value.parse().unwrap())
    });
    values.collect()
}

/// Waits until the first process of a group reports these ages of its lag, from the greatest to the
/// smallest.
async fn until_lag_is(system: &System, group: &str, expected: &[f64]) {
    let ages = async || {
        let ages = by_partition(system, group, "consumer_lag_seconds").await;
        let mut ages: Vec<f64> = ages.into_values().collect();
        ages.sort_by(|one, other| other.total_cmp(one));
        ages
    };
    eventually_eq(&format!("the lag of {group} in seconds"), expected.to_vec(), ages).await;
}

/// T44: a slow request and a late effect lead to a trace that the collector has: that of the
/// registration, in each service. Only OpenMetrics text may have exemplars, and Prometheus decides
/// by the content type which text it is.
#[tokio::test(flavor = "multi_thread")]
async fn exemplars_lead_to_traces_that_the_collector_has() {
    let otlp = Otlp::start().await;
    let mut system = System::empty().await;
    system.processes.set("OTEL_EXPORTER_OTLP_ENDPOINT", &otlp.url());
    system.processes.set("OTEL_BSP_SCHEDULE_DELAY", "100");
    system.processes.set("TRUST_TRACE_CONTEXT", "true");
    system.processes.start(&SERVICES).await;
    register_in_trace(&system, "01").await;

    let answer = reqwest::get(system.processes.admin(USER).url("/metrics")).await.unwrap();
    let content_type = answer.headers()["content-type"].to_str().unwrap();
    assert_eq!(content_type, "application/openmetrics-text; version=1.0.0; charset=utf-8");
    let mut found = BTreeSet::new();
    for service in SERVICES {
        found.extend(exemplars(&page(&system, service).await, "http_request_duration_seconds"));
    }
    assert!(found.contains(TRACE), "the trace of the registration is not in {found:?}");
    for (service, name) in AGES {
        assert_eq!(exemplars(&page(&system, service).await, name), [TRACE.to_owned()].into(), "{name}");
    }
    let exported = async || {
        let traces: BTreeSet<String> = otlp.spans().into_iter().map(|span| span.trace).collect();
        found.difference(&traces).cloned().collect::<Vec<_>>()
    };
    eventually_eq("exemplars without a trace at the collector", vec![], exported).await;
}

/// Without a collector, and for a trace that is not sampled, an exemplar would lead nowhere.
#[tokio::test(flavor = "multi_thread")]
async fn there_is_no_exemplar_without_a_trace_at_the_collector() {
    let otlp = Otlp::start().await;
    for (endpoint, flags) in [(None, "01"), (Some(otlp.url()), "00")] {
        let mut system = System::empty().await;
        if let Some(endpoint) = &endpoint {
            system.processes.set("OTEL_EXPORTER_OTLP_ENDPOINT", endpoint);
        }
        system.processes.set("TRUST_TRACE_CONTEXT", "true");
        system.processes.start(&SERVICES).await;
        register_in_trace(&system, flags).await;
        for (service, name) in AGES {
            assert_eq!(exemplars(&page(&system, service).await, name), [].into(), "{name} with {endpoint:?}, {flags}");
        }
        let requests = exemplars(&page(&system, USER).await, "http_request_duration_seconds");
        assert!(!requests.contains(TRACE), "with {endpoint:?}, {flags}");
        if endpoint.is_none() {
            let pages = [page(&system, USER).await, page(&system, ANALYTICS).await].concat();
            assert!(!pages.contains(" # {"), "an exemplar without a collector");
        }
    }
}

/// T39: the clock of the user service is two hours fast, so its events are younger than nothing.
/// Their ages count as 0, and as negative. Events of the email service, whose clock is right, are
/// not counted.
#[tokio::test(flavor = "multi_thread")]
async fn negative_ages_count_as_zero_and_are_counted() {
    let clock = Clock::off_by(2 * HOUR);
    let mut system = System::empty().await;
    let settings = clock.settings();
    let settings: Vec<(&str, &str)> = settings.iter().map(|(name, value)| (&**name, &**value)).collect();
    system.processes.spawn_with(USER, &settings);
    system.processes.start(&[EMAIL, ANALYTICS]).await;
    system.processes.until_ready(&[USER]).await;
    let user = system.users.register().await;
    system.users.until_mailed(user).await;
    system.users.until_counted(1, 1).await;

    let of_group = async |name: &str, group: &str| system.processes.group_metric(group, name).await;
    for group in [ANALYTICS_USERS, ANALYTICS_AUDIT] {
        assert_eq!(of_group("event_age_negative_total", group).await, Some(1.0), "{group}");
        assert_eq!(of_group("event_age_seconds_count", group).await, Some(1.0), "{group}");
        assert_eq!(of_group("event_age_seconds_sum", group).await, Some(0.0), "{group}");
    }
    assert_eq!(of_group("event_age_negative_total", ANALYTICS_EMAILS).await, Some(0.0));
    assert_eq!(of_group("event_age_seconds_count", ANALYTICS_EMAILS).await, Some(1.0));
    let mails = async |name: &str| system.processes.metric(EMAIL, name, &[]).await;
    assert_eq!(mails("mail_age_negative_total").await, Some(1.0));
    assert_eq!(mails("mail_age_seconds_count").await, Some(1.0));
    assert_eq!(mails("mail_age_seconds_sum").await, Some(0.0));
}

/// T57: while a handler waits for its database, the lag in seconds grows for the partition of the
/// record, and for no other partition and no other group. Afterwards it is 0. While Kafka does not
/// answer, no process knows whether there are records: the lag is absent, and not 0.
#[tokio::test(flavor = "multi_thread")]
async fn the_lag_in_seconds_grows_while_a_handler_is_blocked_and_is_absent_while_it_is_unknown() {
    let mut system = System::empty().await;
    let (_kafka, proxy) = system.own_kafka().await;
    system.processes.start(&[USER, EMAIL]).await;
    system.processes.set("KAFKA_BROKERS", &proxy.address());
    system.processes.start(&[ANALYTICS]).await;
    let caught_up = [0.0; PARTITIONS];
    until_lag_is(&system, ANALYTICS_USERS, &caught_up).await;

    let mut lock: PgConnection = system.stores.database(ANALYTICS).await.acquire().await.unwrap().detach();
    sqlx::raw_sql("begin; lock table funnel").execute(&mut lock).await.unwrap();
    system.users.register().await;
    let registered = Instant::now();
    for seconds in [1.0, 3.0] {
        let lag = eventually(&format!("a lag of {seconds} s"), async || {
            let ages = by_partition(&system, ANALYTICS_USERS, "consumer_lag_seconds").await;
            assert_eq!(ages.len(), PARTITIONS, "{ages:?}");
            let ages: Vec<f64> = ages.into_values().filter(|age| *age > 0.0).collect();
            assert!(ages.len() <= 1, "there is one record, and {ages:?}");
            ages.into_iter().find(|age| *age >= seconds)
        })
        .await;
        // The lag counts from the record, and not from when the handler failed.
        let age = registered.elapsed().as_secs_f64();
        assert!((age - 1.0..age + 1.0).contains(&lag), "{lag} s after {age} s");
    }
    until_lag_is(&system, ANALYTICS_AUDIT, &caught_up).await;
    assert!(system.processes.metric(ANALYTICS, "consumer_handler_duration_seconds_count", &[]).await > Some(0.0));
    lock.close().await.unwrap();
    until_lag_is(&system, ANALYTICS_USERS, &caught_up).await;

    proxy.cut();
    until_lag_is(&system, ANALYTICS_USERS, &[]).await;
    assert!(
        by_partition(&system, ANALYTICS_USERS, "consumer_lag").await.is_empty(),
        "the number of records is unknown"
    );
    eventually("waiting components", async || {
        system.processes.metric(ANALYTICS, "waiting_components", &[]).await.filter(|components| *components >= 3.0)
    })
    .await;
    proxy.heal();
    until_lag_is(&system, ANALYTICS_USERS, &caught_up).await;
    let waiting = async || system.processes.metric(ANALYTICS, "waiting_components", &[]).await;
    eventually_eq("waiting components", Some(0.0), waiting).await;
}

/// T17: a second process joins the groups of a service, and dies. The first one counts that it
/// loses partitions and gets them back, and each partition is read by one of them.
#[tokio::test(flavor = "multi_thread")]
async fn rebalances_are_counted_and_each_partition_has_one_process() {
    let system = System::start_with(&[USER, EMAIL, ANALYTICS], &DEFAULT_CONSUMERS).await;
    let partitions =
        async |system: &System| system.processes.group_metric(ANALYTICS_USERS, "consumer_partitions").await;
    eventually_eq("partitions of the only process", Some(PARTITIONS as f64), async || partitions(&system).await).await;
    let rebalances = async |system: &System, action: &str| {
        let labels = [format!("group=\"{ANALYTICS_USERS}\""), format!("action=\"{action}\"")];
        system.processes.metric(ANALYTICS, "consumer_rebalances_total", &[&labels[0], &labels[1]]).await
    };
    assert_eq!(rebalances(&system, "assigned").await, Some(1.0));
    assert_eq!(rebalances(&system, "revoked").await, Some(0.0));

    let mut other = system.processes.spawn_another(ANALYTICS);
    other.until_ready().await;
    eventually_eq("partitions of the first process", Some(3.0), async || partitions(&system).await).await;
    assert_eq!(rebalances(&system, "revoked").await, Some(1.0));
    until_lag_is(&system, ANALYTICS_USERS, &[0.0; 3]).await;
    other.kill();
    eventually_eq("partitions of the process that is left", Some(PARTITIONS as f64), async || {
        partitions(&system).await
    })
    .await;
    assert_eq!(rebalances(&system, "assigned").await, Some(2.0));
    assert_eq!(rebalances(&system, "lost").await, Some(0.0));
    until_lag_is(&system, ANALYTICS_USERS, &[0.0; PARTITIONS]).await;
    for group in groups().filter(|group| service_of(group) != topology::CACHE) {
        let actions = system.processes.group_metric(group, "consumer_rebalances_total").await;
        assert!(actions.is_some_and(|count| count >= 1.0), "{group}: {actions:?}");
    }
}
