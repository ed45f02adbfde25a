//! One trace from the caller's request to the last effect, across four processes and three topics,
//! and the log lines that name it.

use std::collections::BTreeSet;

use reqwest::{Client, StatusCode};
use serde_json::{Value, json};
use tests::http::send_with_retries;
use tests::otlp::{Otlp, Span};
use tests::record::Record;
use tests::services::{CONSUMERS, EMAIL_EVENTS, USER_EVENTS, USER_STATE};
use tests::users::address;
use tests::{System, eventually, eventually_eq};
use topology::{ANALYTICS, CACHE, EMAIL, Service, USER};
use uuid::Uuid;

/// The trace and the span of a caller: the example of the W3C recommendation.
const TRACE: &str = "0af7651916cd43dd8448eb211c80319c";
const CALLER: &str = "b7ad6b7169203331";

/// The four services, ready. They send their spans to `otlp` ten times a second and log each record
/// that they handle.
async fn start_traced(otlp: &Otlp, trust_callers: bool) -> System {
    let mut system = System::empty().await;
    system.processes.set("OTEL_EXPORTER_OTLP_ENDPOINT", &otlp.url());
    system.processes.set("OTEL_BSP_SCHEDULE_DELAY", "100");
    system.processes.set("TRUST_TRACE_CONTEXT", if trust_callers { "true" } else { "false" });
    system.processes.set("RUST_LOG", "warn,user=info,email=info,analytics=info,cache=info,shared=debug");
    system.processes.start(&[USER, EMAIL, ANALYTICS, CACHE]).await;
    system
}

/// Registers a user with this trace context, and waits for the mail.
async fn register(system: &System, email: &str, traceparent: &str) -> Uuid {
    let url = system.users.url(USER, "/users");
    let body = json!({ "email": email, "display_name": "Ada Lovelace" });
    let request = || {
        let request = Client::new().post(&url).json(&body);
        request.header("tracestate", "vendor=1").header("traceparent", traceparent)
    };
    let answer = send_with_retries(request).await;
    assert_eq!(answer.status, StatusCode::CREATED, "{traceparent}: {answer:?}");
    system.users.until_mailed(answer.id()).await;
    answer.id()
}

/// The spans of a trace, each as `service: span < service: parent`.
fn spans_with_parents(spans: &[Span], trace: &str) -> BTreeSet<String> {
    let spans: Vec<&Span> = spans.iter().filter(|span| span.trace == trace).collect();
    let name = |span: &Span| format!("{}: {}", span.service, span.name);
    let parent = |id: &str| match spans.iter().find(|span| span.id == id) {
        Some(parent) => name(parent),
        None if id == CALLER => "the caller".to_owned(),
        None if id.is_empty() => "no parent".to_owned(),
        None => format!("unknown {id}"),
    };
    spans.iter().map(|span| format!("{} < {}", name(span), parent(&span.parent))).collect()
}

/// The spans of a registration, with their parents. `root` is the parent of the request's span.
fn spans_of_a_registration(root: &str) -> BTreeSet<String> {
    let spans = [
        format!("user: request < {root}"),
        "email: process user.registered < user: request".to_owned(),
        "email: process user.state < user: request".to_owned(),
        "email: send < user: request".to_owned(),
        "analytics: process user.registered < user: request".to_owned(),
        "analytics: process email.sent < email: send".to_owned(),
        "cache: process user.state < user: request".to_owned(),
    ];
    spans.into()
}

/// The spans `name` of a service that link to the span `target` of [`TRACE`], each with whether it
/// is in another trace.
fn linking_spans(spans: &[Span], service: &str, name: &str, target: &str) -> BTreeSet<String> {
    let is_target = |span: &&Span| span.trace == TRACE && format!("{}: {}", span.service, span.name) == target;
    let Some(target) = spans.iter().find(is_target) else { return BTreeSet::new() };
    let link = (target.trace.clone(), target.id.clone());
    let named = spans.iter().filter(|span| span.service == service && span.name == name);
    let linking = named.filter(|span| span.links.contains(&link));
    linking.map(|span| format!("{service}: {name}, in another trace: {}", span.trace != TRACE)).collect()
}

/// The lines of a service's log. All of them are JSON.
fn log_lines(system: &System, service: Service) -> Vec<Value> {
    let log = system.processes.log(service);
    log.lines().filter_map(|line| serde_json::from_str(line).ok()).collect()
}

/// Checks that a service has logged a line that contains all of these values.
fn assert_logged(system: &System, service: Service, values: &[&str]) {
    let lines = log_lines(system, service);
    let has_values = |line: &Value| values.iter().all(|value| line.to_string().contains(&format!("\"{value}\"")));
    assert!(lines.iter().any(has_values), "no line of {} has {values:?}: {lines:#?}", service.name);
}

/// The first record about this user.
fn record_of(system: &System, topic: &str, user: Uuid) -> Record {
    system.kafka.read_key(topic, user).remove(0)
}

/// The trace in the `traceparent` of a record.
fn trace_of(record: &Record) -> String {
    record.header("traceparent").unwrap().split('-').nth(1).unwrap().to_owned()
}

/// T44, I14: a registration with a caller's trace context is one trace over four processes. A
/// consumer handles a record in a child of the span that caused the record. A relay's span covers
/// many records and links to the cause of each. Log lines name the trace and the event. No span has
/// personal data.
#[tokio::test(flavor = "multi_thread")]
async fn one_registration_is_one_trace_across_the_four_services() {
    let otlp = Otlp::start().await;
    let system = start_traced(&otlp, true).await;
    let email = address();
    let id = register(&system, &email, &format!("00-{TRACE}-{CALLER}-01")).await;
    let spans = async || spans_with_parents(&otlp.spans(), TRACE);
    eventually_eq("the spans of the caller's trace", spans_of_a_registration("the caller"), spans).await;
    for (service, cause) in [("user", "user: request"), ("email", "email: send")] {
        let expected = [format!("{service}: publish, in another trace: true")].into();
        let linking = async || linking_spans(&otlp.spans(), service, "publish", cause);
        eventually_eq("the relay's span that links to its cause", expected, linking).await;
    }
    let received = otlp.text();
    assert!(received.contains("user.registered"), "the text of the spans must include their names and attributes");
    assert!(!received.contains(&email), "a span has the address");
    assert!(!received.contains("Ada Lovelace"), "a span has the display name");

    let fact = record_of(&system, USER_EVENTS, id);
    let sent = system.kafka.read(EMAIL_EVENTS).remove(0);
    for record in [&fact, &sent] {
        assert_eq!(record.header("tracestate"), Some("vendor=1"), "the tracestate must be the caller's");
    }
    assert_logged(&system, USER, &[TRACE]);
    for service in [EMAIL, ANALYTICS] {
        assert_logged(&system, service, &[TRACE, fact.header("ce_id").unwrap()]);
    }
    let state = record_of(&system, USER_STATE, id);
    assert_logged(&system, CACHE, &[TRACE, state.header("ce_id").unwrap()]);
}

/// T44, I14: by default a request starts a new trace, which links to the caller's. The text of a
/// stranger's `tracestate` is neither stored nor published.
#[tokio::test(flavor = "multi_thread")]
async fn the_trace_of_an_untrusted_caller_is_linked_and_its_text_is_not_kept() {
    let otlp = Otlp::start().await;
    let system = start_traced(&otlp, false).await;
    let id = register(&system, &address(), &format!("00-{TRACE}-{CALLER}-01")).await;
    let fact = record_of(&system, USER_EVENTS, id);
    let trace = trace_of(&fact);
    assert_ne!(trace, TRACE, "the request must start its own trace");
    let spans = async || spans_with_parents(&otlp.spans(), &trace);
    eventually_eq("the spans of the new trace", spans_of_a_registration("no parent"), spans).await;
    let request = otlp.spans().into_iter().find(|span| span.trace == trace && span.name == "request").unwrap();
    assert!(request.links.contains(&(TRACE.to_owned(), CALLER.to_owned())), "{:?}", request.links);
    for record in [fact, system.kafka.read(EMAIL_EVENTS).remove(0)] {
        assert_eq!(record.header("tracestate"), None, "a stranger's text is in a fact");
    }
    let stored = "select count(*) from deliveries where tracestate is not null";
    assert_eq!(system.stores.count(EMAIL, stored).await, 0, "a stranger's text is in the database");
}

/// T44: a request with a malformed context succeeds and starts a new trace, which reaches as far as
/// any other.
#[tokio::test(flavor = "multi_thread")]
async fn a_malformed_traceparent_is_ignored() {
    let otlp = Otlp::start().await;
    let system = start_traced(&otlp, true).await;
    let invalid_trace = format!("00-{}-{CALLER}-01", "0".repeat(32));
    let invalid_span = format!("00-{TRACE}-{}-01", "0".repeat(16));
    let truncated = format!("00-{TRACE}-{CALLER}");
    for traceparent in ["nonsense", &invalid_trace, &invalid_span, &truncated] {
        let id = register(&system, &address(), traceparent).await;
        let trace = trace_of(&record_of(&system, USER_EVENTS, id));
        assert_ne!(trace, TRACE, "{traceparent}");
        let spans = async || spans_with_parents(&otlp.spans(), &trace);
        let what = format!("the spans of the trace that was started for {traceparent}");
        eventually_eq(&what, spans_of_a_registration("no parent"), spans).await;
    }
}

/// T44: the service that starts a trace decides whether it is exported, and the others follow. With
/// a share of a half, each registration is exported by all four services or by none. With a share
/// of 0, none is exported, except that of a trusted caller who exports its own spans.
#[tokio::test(flavor = "multi_thread")]
async fn a_sampled_trace_is_exported_by_every_service_or_by_none() {
    const REGISTRATIONS: usize = 24;
    let otlp = Otlp::start().await;
    let mut system = start_traced(&otlp, true).await;
    system.processes.start_with(USER, &[("OTEL_TRACES_SAMPLER_ARG", "0.5")]).await;
    let mut traces = BTreeSet::new();
    for _ in 0..REGISTRATIONS {
        let id = register(&system, &address(), "no context").await;
        traces.insert(trace_of(&record_of(&system, USER_EVENTS, id)));
    }
    assert_eq!(traces.len(), REGISTRATIONS);
    system.until_drained().await;
    let exported =
        |spans: &[Span]| traces.iter().filter(|trace| spans.iter().any(|span| span.trace == **trace)).count();
    eventually("each exported trace is complete", async || {
        let spans = otlp.spans();
        let expected = spans_of_a_registration("no parent");
        let mut found = traces.iter().map(|trace| spans_with_parents(&spans, trace));
        (exported(&spans) > 0 && found.all(|found| found.is_empty() || found == expected)).then_some(())
    })
    .await;
    let count = exported(&otlp.spans());
    assert!((1..REGISTRATIONS).contains(&count), "{count} of {REGISTRATIONS} traces were exported");

    let settings = [("OTEL_TRACES_SAMPLER", "parentbased_traceidratio"), ("OTEL_TRACES_SAMPLER_ARG", "0")];
    system.processes.start_with(USER, &settings).await;
    let id = register(&system, &address(), "no context").await;
    let unsampled = trace_of(&record_of(&system, USER_EVENTS, id));
    register(&system, &address(), &format!("00-{TRACE}-{CALLER}-01")).await;
    let spans = async || spans_with_parents(&otlp.spans(), TRACE);
    eventually_eq("the spans of the caller's trace", spans_of_a_registration("the caller"), spans).await;
    let spans = otlp.spans();
    assert!(spans.iter().all(|span| span.trace != unsampled), "a trace that is not sampled was exported");
}

/// A collector that accepts connections and answers nothing. The service says once that traces are
/// lost, counts every batch, and works as usual.
#[tokio::test(flavor = "multi_thread")]
async fn a_collector_that_does_not_answer_is_reported_once_and_counted() {
    let silent = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let mut system = System::empty().await;
    let endpoint = format!("http://{}", silent.local_addr().unwrap());
    system.processes.set("OTEL_EXPORTER_OTLP_ENDPOINT", &endpoint);
    system.processes.set("OTEL_EXPORTER_OTLP_TIMEOUT", "200");
    system.processes.set("OTEL_BSP_SCHEDULE_DELAY", "100");
    system.processes.start(&[USER]).await;
    let metric = async |name: &str| system.processes.metric(USER, name, &[]).await.unwrap_or(0.0);
    eventually("three batches were lost", async || {
        system.users.register().await;
        (metric("trace_exports_failed_total").await >= 3.0).then_some(())
    })
    .await;
    assert_eq!(metric("trace_spans_exported_total").await, 0.0);
    assert!(metric("trace_spans_ended_total").await >= 3.0);
    let log = system.processes.log(USER);
    let reports = log.lines().filter(|line| line.contains("the collector does not accept traces")).count();
    assert_eq!(reports, 1, "{log}");
}

/// The content of the log line about a handled event.
#[derive(Debug, PartialEq, Eq, PartialOrd, Ord)]
struct HandledEvent {
    id: String,
    kind: String,
    user: String,
    trace: String,
}

impl HandledEvent {
    /// The line that this record must leave. A state has its user only in its key.
    fn of(record: &Record) -> Self {
        let data: Option<Value> = record.value.as_deref().map(|value| serde_json::from_slice(value).unwrap());
        let user = data.and_then(|data| data["user_id"].as_str().map(str::to_owned));
        Self {
            id: record.header("ce_id").unwrap().to_owned(),
            kind: record.header("ce_type").unwrap().to_owned(),
            user: user.unwrap_or_else(|| record.key_text()),
            trace: trace_of(record),
        }
    }
}

/// The lines "event handled" of a service, sorted.
fn handled_events(system: &System, service: Service) -> Vec<HandledEvent> {
    let text = |line: &Value, name: &str| line[name].as_str().unwrap_or_default().to_owned();
    let lines = log_lines(system, service).into_iter().filter(|line| line["message"] == "event handled");
    let mut events: Vec<HandledEvent> = lines
        .map(|line| HandledEvent {
            id: text(&line, "event.id"),
            kind: text(&line, "event.type"),
            user: text(&line, "user.id"),
            trace: text(&line, "trace.id"),
        })
        .collect();
    events.sort();
    events
}

/// With `LOG_EVENTS=true` a service logs one line for each event that it handles, on each of the
/// three topics. The events are published before analytics and the cache start, so that a batch has
/// several events: each line names the trace of its own event. Without the setting a service logs
/// no such line.
#[tokio::test(flavor = "multi_thread")]
async fn log_events_writes_one_line_per_handled_event() {
    let mut system = System::start_only(&[USER, EMAIL]).await;
    let users = system.users.register_many(3).await;
    for user in &users {
        system.users.until_mailed(*user).await;
    }
    assert_eq!(system.users.erase(users[0]).await.unwrap().status, StatusCode::NO_CONTENT);
    for service in [USER, EMAIL] {
        system.stores.until_outbox_empty(service).await;
    }
    for service in [ANALYTICS, CACHE] {
        system.processes.start_with(service, &[("LOG_EVENTS", "true")]).await;
    }
    for group in CONSUMERS.iter().flat_map(|service| service.groups) {
        system.kafka.until_caught_up(group.name).await;
    }

    let events = |topics: &[&str]| {
        let records = topics.iter().flat_map(|topic| system.kafka.read(topic));
        let mut events: Vec<HandledEvent> = records.map(|record| HandledEvent::of(&record)).collect();
        events.sort();
        events
    };
    let topics: Vec<&str> = ANALYTICS.groups.iter().map(|group| group.topic).collect();
    let facts = events(&topics);
    assert_eq!(facts.len(), 4 + 3 + 4, "facts of the users and of their mails, by each group");
    eventually_eq("events that analytics has logged", facts, async || handled_events(&system, ANALYTICS)).await;
    let states = events(&[USER_STATE]);
    assert_eq!(states.len(), 4, "states and the tombstone");
    eventually_eq("events that the cache has logged", states, async || handled_events(&system, CACHE)).await;
    assert_eq!(handled_events(&system, EMAIL), [], "events that a service without the setting has logged");
}

/// I15: all events that follow from one request have one correlation id, which we make. An event
/// about a mail names the registration that caused it. Text of the caller is in none of them.
#[tokio::test(flavor = "multi_thread")]
async fn the_events_of_one_request_name_their_cause() {
    const REQUEST_ID: &str = "ada@secret.example";
    let system = System::start_only(&[USER, EMAIL]).await;
    let url = system.users.url(USER, "/users");
    let mut correlations = BTreeSet::new();
    for _ in 0..2 {
        let body = json!({ "email": address(), "display_name": "Ada Lovelace" });
        let answer =
            send_with_retries(|| Client::new().post(&url).json(&body).header("x-request-id", REQUEST_ID)).await;
        assert_eq!(answer.status, StatusCode::CREATED, "{answer:?}");
        let user = answer.id();
        system.users.until_mailed(user).await;
        let id = |record: &Record, name: &str| -> Uuid { record.header(name).unwrap().parse().unwrap() };
        let fact = system.kafka.read_key(USER_EVENTS, user).remove(0);
        let state = system.kafka.read_key(USER_STATE, user).remove(0);
        let correlation = id(&fact, "ce_correlationid");
        for record in [&fact, &state] {
            assert_eq!(id(record, "ce_correlationid"), correlation);
            assert_eq!(id(record, "ce_causationid"), correlation, "the command causes both");
            assert_eq!(record.header("ce_actor"), None, "nobody has logged in");
        }
        let of_user = |record: &Record| record.text().contains(&user.to_string());
        let mails = async || system.kafka.read(EMAIL_EVENTS).into_iter().filter(of_user).collect::<Vec<_>>();
        eventually_eq("facts about the mail", 1, async || mails().await.len()).await;
        let mail = mails().await.remove(0);
        assert_eq!(id(&mail, "ce_correlationid"), correlation);
        assert_eq!(id(&mail, "ce_causationid"), id(&fact, "ce_id"), "the registration causes the mail");
        for record in [&fact, &state, &mail] {
            assert!(!record.text().contains(REQUEST_ID), "{}", record.text());
        }
        correlations.insert(correlation);
    }
    assert_eq!(correlations.len(), 2, "two requests have different ids");
}
