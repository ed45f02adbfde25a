//! One trace from the caller's request to the last effect, across four processes and three topics.

use std::collections::BTreeSet;

use reqwest::{Client, StatusCode};
use serde_json::{Value, json};
use tests::http::send_with_retries;
use tests::otlp::{Otlp, Span};
use tests::services::{EMAIL_EVENTS, USER_EVENTS, USER_STATE};
use tests::users::address;
use tests::{System, eventually_eq};
use topology::{ANALYTICS, CACHE, EMAIL, Service, USER};
use uuid::Uuid;

/// A caller's context, as in the W3C recommendation.
const TRACE: &str = "0af7651916cd43dd8448eb211c80319c";
const CALLER: &str = "b7ad6b7169203331";

/// All four services, which send their spans to `otlp` ten times a second and log each record that they handle.
async fn traced(otlp: &Otlp) -> System {
    let mut system = System::empty().await;
    system.processes.set("OTEL_EXPORTER_OTLP_ENDPOINT", &otlp.url());
    system.processes.set("OTEL_BSP_SCHEDULE_DELAY", "100");
    system.processes.set("RUST_LOG", "warn,user=info,email=info,analytics=info,cache=info,shared=debug");
    system.processes.start_all().await;
    system
}

async fn register(system: &System, email: &str, traceparent: &str) -> Uuid {
    let body = json!({ "email": email, "display_name": "Ada Lovelace" });
    let request = || Client::new().post(system.users.url(USER, "/users")).header("tracestate", "vendor=1").json(&body);
    let answer = send_with_retries(|| request().header("traceparent", traceparent)).await;
    assert_eq!(answer.status, StatusCode::CREATED, "{traceparent}: {answer:?}");
    system.users.until_mailed(answer.id()).await;
    answer.id()
}

/// `service: span < service: parent` for each span of a trace.
fn tree(spans: &[Span], trace: &str) -> BTreeSet<String> {
    let spans: Vec<&Span> = spans.iter().filter(|span| span.trace == trace).collect();
    let name = |span: &Span| format!("{}: {}", span.service, span.name);
    let parent = |id: &str| match spans.iter().find(|span| span.id == id) {
        Some(parent) => name(parent),
        None if id == CALLER => "the caller".to_owned(),
        None if id.is_empty() => "nobody".to_owned(),
        None => format!("unknown {id}"),
    };
    spans.iter().map(|span| format!("{} < {}", name(span), parent(&span.parent))).collect()
}

/// What a registration looks like: who was told of it, and by whom.
fn registration(root: &str) -> BTreeSet<String> {
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

/// The spans of a service that link to another span: what the relay did for whom.
fn linked(spans: &[Span], service: &str, name: &str, to: &str) -> BTreeSet<String> {
    let target = spans.iter().find(|span| span.trace == TRACE && format!("{}: {}", span.service, span.name) == to);
    let Some(target) = target else { return BTreeSet::new() };
    let link = (target.trace.clone(), target.id.clone());
    let linking =
        spans.iter().filter(|span| span.service == service && span.name == name && span.links.contains(&link));
    linking
        .map(|span| format!("{}: {}, in a trace of its own: {}", span.service, span.name, span.trace != TRACE))
        .collect()
}

/// Whether a service has a log line, in JSON, with all of these texts in it.
fn logs_a_line_with(system: &System, service: Service, texts: &[&str]) -> bool {
    let log = system.processes.log(service);
    log.lines().any(|line| {
        serde_json::from_str::<Value>(line).is_ok() && texts.iter().all(|text| line.contains(&format!("\"{text}\"")))
    })
}

/// T44, I14: a registration with a caller's context is one trace over four processes, whose records are handled as children of what
/// caused them; the relays, which carry many at once, link to each; log lines name trace and event; and no span has an address.
#[tokio::test(flavor = "multi_thread")]
async fn one_registration_is_one_trace_across_the_four_services() {
    let otlp = Otlp::start().await;
    let system = traced(&otlp).await;
    let email = address();
    let id = register(&system, &email, &format!("00-{TRACE}-{CALLER}-01")).await;
    let found = async || tree(&otlp.spans(), TRACE);
    eventually_eq("the spans of the caller's trace", registration("the caller"), found).await;
    for (service, to) in [("user", "user: request"), ("email", "email: send")] {
        let expected = [format!("{service}: publish, in a trace of its own: true")].into();
        let found = async || linked(&otlp.spans(), service, "publish", to);
        eventually_eq("the relay's span and its link", expected, found).await;
    }
    let received = otlp.text();
    assert!(received.contains("user.registered"), "spans have their names and attributes");
    assert!(!received.contains(&email) && !received.contains("Ada Lovelace"), "personal data in a span");

    let facts = system.kafka.read(USER_EVENTS);
    let fact = facts.iter().find(|fact| fact.key_text() == id.to_string()).unwrap();
    let mailed = system.kafka.read(EMAIL_EVENTS).remove(0);
    assert_eq!(
        [fact.header("tracestate"), mailed.header("tracestate")],
        [Some("vendor=1"); 2],
        "as the caller sent it"
    );
    let event = fact.header("ce_id").unwrap();
    assert!(logs_a_line_with(&system, USER, &[TRACE]), "{}", system.processes.log(USER));
    for service in [EMAIL, ANALYTICS] {
        assert!(logs_a_line_with(&system, service, &[TRACE, event]), "{}", system.processes.log(service));
    }
    let states = system.kafka.read(USER_STATE);
    let state = states.iter().find(|state| state.key_text() == id.to_string()).unwrap();
    let event = state.header("ce_id").unwrap();
    assert!(logs_a_line_with(&system, CACHE, &[TRACE, event]), "{}", system.processes.log(CACHE));
}

/// T44: a malformed context is nobody's: the request succeeds and begins a trace of its own, which goes as far as any other.
#[tokio::test(flavor = "multi_thread")]
async fn a_malformed_traceparent_is_ignored() {
    let otlp = Otlp::start().await;
    let system = traced(&otlp).await;
    let nobodys_trace = format!("00-{}-{CALLER}-01", "0".repeat(32));
    let nobodys_span = format!("00-{TRACE}-{}-01", "0".repeat(16));
    let cut_off = format!("00-{TRACE}-{CALLER}");
    for traceparent in ["nonsense", &nobodys_trace, &nobodys_span, &cut_off] {
        let id = register(&system, &address(), traceparent).await;
        let facts = system.kafka.read(USER_EVENTS);
        let fact = facts.iter().find(|fact| fact.key_text() == id.to_string()).unwrap();
        let trace = fact.header("traceparent").unwrap().split('-').nth(1).unwrap().to_owned();
        assert_ne!(trace, TRACE, "{traceparent}");
        let found = async || tree(&otlp.spans(), &trace);
        eventually_eq(&format!("the trace begun for {traceparent}"), registration("nobody"), found).await;
    }
}
