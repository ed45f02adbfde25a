//! One user's story: the receiver of traces, and the page that is assembled from them.

use std::collections::BTreeSet;

use opentelemetry_proto::tonic::collector::trace::v1::ExportTraceServiceRequest;
use opentelemetry_proto::tonic::common::v1::{AnyValue, KeyValue, any_value::Value};
use opentelemetry_proto::tonic::resource::v1::Resource;
use opentelemetry_proto::tonic::trace::v1::{ResourceSpans, ScopeSpans, Span};
use prost::Message;
use reqwest::StatusCode;
use serde_json::json;
use testbed::paths;
use testbed::smtp_sink::{Fault, Stage};
use tests::browser::{Browser, ENTER};
use tests::certificates::Authority;
use tests::console::Console;
use tests::otlp::{self, Otlp};
use tests::record::Draft;
use tests::services::USER_EVENTS;
use tests::users::address;
use tests::{System, eventually, eventually_eq};
use topology::{EMAIL, USER};
use uuid::Uuid;

/// Text that a browser would run or draw if it became markup.
const HOSTILE: &str = "<img src=x onerror=\"document.title='hacked'\">'&";
const TRACE: &str = "0af7651916cd43dd8448eb211c80319c";

/// The four services, ready, which send their spans to a console.
async fn observed(settings: &[(&str, &str)]) -> (System, Console) {
    let mut system = System::empty().await;
    let console = system.console_with(settings).await;
    system.processes.set("OTEL_EXPORTER_OTLP_ENDPOINT", &console.otlp_url());
    system.processes.set("OTEL_BSP_SCHEDULE_DELAY", "100");
    system.processes.start_all().await;
    (system, console)
}

/// Registers a user by the form.
async fn register(console: &Console, email: &str) -> Uuid {
    let token = console.page_token("/story").await;
    let attempt = Uuid::new_v4().to_string();
    let fields = [("email", email), ("display_name", "Ada Lovelace"), ("attempt", &attempt), ("page_token", &token)];
    let page = console.post("/story/register", &console.url(""), &fields).await;
    assert_eq!(page.status, StatusCode::SEE_OTHER, "{}", page.body);
    let story = page.headers["location"].to_str().unwrap();
    story.strip_prefix("/story?user=").unwrap().parse().unwrap()
}

fn attribute(key: &str, value: &str) -> KeyValue {
    let value = AnyValue { value: Some(Value::StringValue(value.to_owned())) };
    KeyValue { key: key.to_owned(), value: Some(value), ..KeyValue::default() }
}

fn request(service: &str, spans: Vec<Span>) -> Vec<u8> {
    let resource = Resource { attributes: vec![attribute("service.name", service)], ..Resource::default() };
    let scope_spans = vec![ScopeSpans { spans, ..ScopeSpans::default() }];
    let resource_spans = vec![ResourceSpans { resource: Some(resource), scope_spans, ..ResourceSpans::default() }];
    ExportTraceServiceRequest { resource_spans }.encode_to_vec()
}

/// The page grows from the click on Register to the last effect, and so does that of the erasure. A
/// step opens with the keyboard alone. No page has the address.
#[tokio::test(flavor = "multi_thread")]
async fn a_visitor_sees_a_registration_and_its_erasure() {
    let (_system, console) = observed(&[("SOURCE_URL", "https://git.example.com/blob/main/{file}#L{line}")]).await;
    let Some(browser) = Browser::open(&console.url(""), 1280, 1000).await else { return };
    browser.goto("/story").await;
    let email = browser.evaluate("document.querySelector('#register [name=email]').value").await;
    browser.click("#register button").await;
    browser.until_text("h1", "A user's story").await;
    for step in [
        "Registration",
        "POST /users",
        "transaction",
        "in the outbox",
        "round of the relay",
        "user.registered",
        "email.welcome: user.registered",
        "email.recipients: user.state",
        "mail, attempt 1",
        "email.sent",
        "analytics.users: user.registered",
        "analytics.emails: email.sent",
        "cache.profiles: user.state",
    ] {
        browser.until_text("#story", step).await;
    }
    browser.until_text("#story", "mailed").await;
    for group in ["email.welcome", "email.recipients", "analytics.users", "analytics.audit", "cache.profiles"] {
        browser.until_text("#story", &format!("{group}: handled")).await;
    }

    browser.evaluate("document.querySelector('details[id^=span-user] summary').focus()").await;
    browser.press(ENTER).await;
    browser.until_text("details[open]", "If the process had died here").await;
    browser.until_text("details[open] a", "shared/src/platform/http.rs:").await;
    let link = browser.evaluate("document.querySelector('details[open] a').href").await;
    assert!(link.as_str().unwrap().starts_with("https://git.example.com/blob/main/shared/src/"), "{link}");

    browser.click("#erase button").await;
    for observed in [
        "user: GET /users/",
        "answers 404",
        "cache: GET /profiles/",
        "it has handled the tombstone",
        "no mail to the user waits",
        "user.state.v1 has the tombstone at",
        "can be read until compaction deletes it",
    ] {
        browser.until_text("#gone", observed).await;
    }
    // Everything but the older state, which waits for compaction.
    let states = async || {
        let count = "['good', 'wait'].map((state) => document.querySelectorAll(`#gone .pill.${state}`).length)";
        browser.evaluate(count).await
    };
    eventually_eq("what is gone, and what waits", json!([5, 1]), states).await;
    for step in ["Erasure", "DELETE /users/{id}", "user.state (tombstone)", "cache.profiles: user.state"] {
        browser.until_text("#story", step).await;
    }
    assert_eq!(browser.evaluate("document.getElementById('erase')?.hidden ?? true").await, true, "the button is shown");
    let everything = browser.evaluate("document.documentElement.outerHTML").await;
    let (everything, email) = (everything.as_str().unwrap(), email.as_str().unwrap());
    assert!(email.contains('@') && !everything.contains(email), "the address is in the page");
    browser.assert_clean().await;
    browser.close().await;
}

/// The story fits a telephone, and is complete without JavaScript.
#[tokio::test(flavor = "multi_thread")]
async fn a_story_fits_a_telephone_and_needs_no_javascript() {
    let (system, console) = observed(&[]).await;
    let email = address();
    let user = register(&console, &email).await;
    system.users.until_mailed(user).await;
    let path = format!("/story?user={user}");
    let page = console.until_shows(&path, ">mailed<").await;
    console.until_shows(&path, "analytics.emails: handled").await;
    console.until_updated(&format!("/live/story?user={user}"), "analytics.emails: email.sent").await;
    assert!(!page.contains(&email) && !page.contains(" style="), "{page}");
    let wrong = console.get("/story?user=ada").await;
    assert_eq!(wrong.status, StatusCode::BAD_REQUEST);

    let Some(browser) = Browser::open(&console.url(""), 390, 800).await else { return };
    for path in ["/story", &path] {
        browser.goto(path).await;
        assert_eq!(browser.evaluate("window.innerWidth").await, 390);
        browser.evaluate("document.querySelectorAll('details').forEach((step) => { step.open = true })").await;
        let sideways = "document.documentElement.scrollWidth > document.documentElement.clientWidth";
        assert_eq!(browser.evaluate(sideways).await, false, "{path} scrolls sideways");
    }
    browser.assert_clean().await;
    browser.close().await;
}

/// Each attempt is a step of its own, with the reply of the server and the wait in between.
#[tokio::test(flavor = "multi_thread")]
async fn a_mail_server_that_fails_shows_as_attempts() {
    let (system, console) = observed(&[]).await;
    system.mail.fail(Fault::Reject { stage: Stage::Rcpt, code: 451 }.times(1));
    let user = register(&console, &address()).await;
    let path = format!("/story?user={user}");
    let page = console.until_shows(&path, "mailed after 2 attempts").await;
    for text in ["mail, attempt 1", ">451<", ">waits<", "mail, attempt 2", ">accepted<"] {
        assert!(page.contains(text), "no {text}: {page}");
    }
}

/// A record that a group rejects is a dead letter in the story of its user.
#[tokio::test(flavor = "multi_thread")]
async fn a_dead_letter_is_part_of_the_story() {
    let (system, console) = observed(&[]).await;
    let user = Uuid::now_v7();
    let traceparent = format!("00-{TRACE}-b7ad6b7169203331-01");
    let fact = Draft::user_event("user.registered", user, 1).with_value(b"no JSON");
    system.kafka.write(USER_EVENTS, &fact.replace_header("traceparent", traceparent.as_bytes())).await;
    let page = console.until_shows(&format!("/story?user={user}"), "analytics.users: dead letter<").await;
    assert!(page.contains("record dead-lettered"), "{page}");
}

/// Records that the console has not seen arriving are looked for in the topics.
#[tokio::test(flavor = "multi_thread")]
async fn the_story_of_an_earlier_user_is_found_in_the_topics() {
    let system = System::start_only(&[USER, EMAIL]).await;
    let user = system.users.register().await;
    system.users.until_mailed(user).await;
    system.until_drained().await;
    let later: Vec<Draft> = (0..400).map(|_| Draft::user_event("user.profile_changed", Uuid::now_v7(), 1)).collect();
    system.kafka.write_all(USER_EVENTS, &later).await;
    let console = system.console().await;
    let page = console.until_shows(&format!("/story?user={user}&older=true"), "user.registered").await;
    assert!(page.contains("The console has no spans of this trace"), "{page}");
    console.until_shows(&format!("/story?user={user}&older=true"), "email.sent").await;
}

/// T101: a website that the visitor has open in the same browser sends the forms by itself.
#[tokio::test(flavor = "multi_thread")]
async fn a_hostile_page_cannot_register_or_erase() {
    let system = System::start_only(&[USER]).await;
    let console = system.console().await;
    let user = system.users.register().await;
    let token = console.page_token("/story").await;
    let (own, email, attempt) = (console.url(""), address(), Uuid::new_v4().to_string());
    for (origin, token) in [("http://evil.example", &*token), ("null", &token), (&own, "guessed"), (&own, "")] {
        let registration = [("email", &*email), ("display_name", "Eve"), ("attempt", &attempt), ("page_token", token)];
        let erasure = [("user", &*user.to_string()), ("page_token", token)];
        for (path, fields) in [("/story/register", &registration[..]), ("/story/erase", &erasure)] {
            let refused = console.post(path, origin, fields).await;
            assert_eq!(refused.status, StatusCode::FORBIDDEN, "{path} {origin} {token}");
        }
    }
    assert_eq!(system.stores.count(USER, "select count(*) from users where email is not null").await, 1);

    // The same form twice registers once, and what the service refuses is said.
    let form = [("email", &*email), ("display_name", "Ada"), ("attempt", &attempt), ("page_token", &token)];
    for _ in 0..2 {
        assert_eq!(console.post("/story/register", &own, &form).await.status, StatusCode::SEE_OTHER);
    }
    assert_eq!(system.stores.count(USER, "select count(*) from users").await, 2);
    let wrong = [("email", HOSTILE), ("display_name", "Ada"), ("attempt", &attempt), ("page_token", &token)];
    let refused = console.post("/story/register", &own, &wrong).await;
    assert!(refused.status == StatusCode::BAD_GATEWAY && refused.body.contains("email"), "{}", refused.body);
    assert!(!refused.body.contains("<img"), "{}", refused.body);
}

/// T102: any program on the network of the receiver may send spans with any text.
#[tokio::test(flavor = "multi_thread")]
async fn text_from_a_span_never_becomes_markup() {
    let system = System::start_only(&[USER]).await;
    let console = system.console_with(&[("SOURCE_URL", "https://git.example.com/{file}")]).await;
    let user = Uuid::now_v7();
    let traceparent = format!("00-{TRACE}-b7ad6b7169203331-01");
    let fact = Draft::user_event("user.registered", user, 1).replace_header("ce_type", HOSTILE.as_bytes());
    system.kafka.write(USER_EVENTS, &fact.replace_header("traceparent", traceparent.as_bytes())).await;
    let trace: Vec<u8> = u128::from_str_radix(TRACE, 16).unwrap().to_be_bytes().into();
    let spans = [HOSTILE, "request", "process x", "send", "dead-letter", "publish\r\n"].map(|name| {
        let names = [
            HOSTILE,
            "http.route",
            "http.request.method",
            "messaging.consumer.group.name",
            "event.type",
            "code.file.path",
            "messaging.batch.message_count",
        ];
        Span {
            trace_id: trace.clone(),
            span_id: name.bytes().chain([0; 8]).take(8).collect(),
            name: name.to_owned(),
            attributes: names
                .map(|name| attribute(name, HOSTILE))
                .into_iter()
                .chain([attribute("code.line.number", "1")])
                .collect(),
            events: vec![opentelemetry_proto::tonic::trace::v1::span::Event {
                name: HOSTILE.to_owned(),
                attributes: vec![attribute("attempt", HOSTILE), attribute(HOSTILE, HOSTILE)],
                ..Default::default()
            }],
            status: Some(opentelemetry_proto::tonic::trace::v1::Status { message: HOSTILE.to_owned(), code: 2 }),
            ..Span::default()
        }
    });
    assert_eq!(otlp::send(&console.otlp_url(), &request(HOSTILE, spans.into())).await.unwrap(), "0");
    let path = format!("/story?user={user}");
    let page = console.until_shows(&path, "onerror").await;
    assert!(!page.contains("<img") && !page.contains("git.example.com"), "{page}");
    assert!(page.matches("onerror").count() >= 20, "names, attributes, events and errors are shown: {page}");

    let Some(browser) = Browser::open(&console.url(""), 1280, 1000).await else { return };
    browser.goto(&path).await;
    browser.until_text("#progress", "steps so far").await;
    browser.until_text("#story", "onerror").await;
    assert_ne!(browser.evaluate("document.title").await, "hacked");
    assert_eq!(browser.evaluate("document.images.length").await, 0);
    browser.assert_clean().await;
    browser.close().await;
}

/// Another collector gets what the console gets.
#[tokio::test(flavor = "multi_thread")]
async fn traces_are_passed_on_to_another_collector() {
    let jaeger = Otlp::start().await;
    let (system, console) = observed(&[("FORWARD_OTLP", &jaeger.url())]).await;
    let user = register(&console, &address()).await;
    system.users.until_mailed(user).await;
    let expected: BTreeSet<String> = ["request", "publish", "send", "process user.state"].map(str::to_owned).into();
    eventually("the other collector has the spans of all services", async || {
        let names: BTreeSet<String> = jaeger.spans().into_iter().map(|span| span.name).collect();
        expected.is_subset(&names).then_some(())
    })
    .await;
    let page = console.get("/story").await.body;
    assert!(!page.contains("FORWARD_OTLP did not get"), "{page}");
}

/// T106: a collector that does not answer, and then none at all, delay no service. The console says
/// once that traces are lost for it, and counts them.
#[tokio::test(flavor = "multi_thread")]
async fn a_collector_that_does_not_answer_loses_traces_only() {
    let silent = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("http://{}", silent.local_addr().unwrap());
    let (system, console) = observed(&[("FORWARD_OTLP", &url)]).await;
    let user = register(&console, &address()).await;
    console.until_shows(&format!("/story?user={user}"), ">mailed<").await;
    console.until_shows("/story", "FORWARD_OTLP did not get").await;
    drop(silent);
    register(&console, &address()).await;
    let lost = async || {
        let page = console.get("/story").await.body;
        let (_, rest) = page.split_once("FORWARD_OTLP did not get ")?;
        rest.split(' ').next()?.parse::<u32>().ok()
    };
    let before = lost().await.unwrap();
    eventually("more requests were lost", async || lost().await.filter(|lost| *lost > before + 2)).await;
    let exported = async || system.processes.metric(USER, "trace_exports_failed_total", &[]).await.unwrap();
    assert_eq!(exported().await, 0.0, "the services noticed");
    let logs: String = system
        .processes
        .all_logs()
        .into_iter()
        .filter(|(name, _)| name.contains("console"))
        .map(|(_, log)| log)
        .collect();
    let reports = logs.lines().filter(|line| line.contains("the collector of FORWARD_OTLP does not accept")).count();
    assert_eq!(reports, 1, "{logs}");
}

/// T106: a flood of spans neither grows the memory of the console nor stops it. The newest are
/// kept.
#[tokio::test(flavor = "multi_thread")]
async fn a_flood_of_spans_does_not_grow_the_memory() {
    const REQUESTS: u128 = 400;
    let silent = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let system = System::empty().await;
    let url = format!("http://{}", silent.local_addr().unwrap());
    let console = system.console_with(&[("FORWARD_OTLP", &url)]).await;
    let resident = || {
        let status = std::fs::read_to_string(format!("/proc/{}/status", console.pid())).unwrap();
        let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).unwrap();
        line.trim().trim_end_matches(" kB").parse::<u64>().unwrap() / 1024
    };
    let before = resident();
    let mut largest = 0;
    for number in 0..REQUESTS {
        let span = |index: u128| Span {
            trace_id: (number * 1_000 + index + 1).to_be_bytes().to_vec(),
            span_id: vec![1; 8],
            name: "request".to_owned(),
            attributes: vec![attribute("text", &"x".repeat(800))],
            ..Span::default()
        };
        let code = otlp::send(&console.otlp_url(), &request("user", (0..1_000).map(span).collect())).await.unwrap();
        assert_eq!(code, "0");
        largest = largest.max(resident());
    }
    assert!(largest < before + 48, "{before} MB before, and {largest} MB with the flood of {REQUESTS} MB");
    let page = console.get("/story").await.body;
    let is_full = ["15.9 MiB", "16.0 MiB"].iter().any(|size| page.contains(&format!("It keeps {size} of spans")));
    assert!(is_full, "the memory is not used: {page}");
    assert!(page.contains("FORWARD_OTLP did not get"), "{page}");

    // Beyond the size of a request (OUT_OF_RANGE), and no request at all (INVALID_ARGUMENT).
    let too_large = otlp::send(&console.otlp_url(), &vec![0; 5 * 1024 * 1024]).await.unwrap();
    assert_eq!(too_large, "11");
    assert_eq!(otlp::send(&console.otlp_url(), b"no spans").await.unwrap(), "3");
}

/// With a certificate the console receives traces over TLS only.
#[tokio::test(flavor = "multi_thread")]
async fn traces_are_received_over_tls() {
    let mut system = System::empty().await;
    let authority = Authority::create();
    let file = |name: &str| system.processes.file(name);
    let authority_file = authority.write(file("authority.pem"));
    let (certificate, key) = authority.certificate("localhost").write_apart(file("otlp.pem"), file("otlp-key.pem"));
    let jaeger = Otlp::start().await;
    let url = jaeger.url();
    let settings = [
        ("OTLP_CERTIFICATE", certificate.to_str().unwrap()),
        ("OTLP_KEY", key.to_str().unwrap()),
        ("FORWARD_OTLP", &url),
    ];
    let console = system.console_with(&settings).await;
    assert!(otlp::send(&console.otlp_url(), &request("user", vec![])).await.is_err(), "without TLS");
    let endpoint = console.otlp_url().replace("http://127.0.0.1", "https://localhost");
    system.processes.set("OTEL_EXPORTER_OTLP_ENDPOINT", &endpoint);
    system.processes.set("OTEL_EXPORTER_OTLP_CERTIFICATE", authority_file.to_str().unwrap());
    system.processes.set("OTEL_BSP_SCHEDULE_DELAY", "100");
    system.processes.start(&[USER]).await;
    let user = register(&console, &address()).await;
    console.until_shows(&format!("/story?user={user}"), "POST /users").await;
    assert!(jaeger.spans().iter().any(|span| span.name == "request"), "the request was not passed on");
}

/// T106: services lose traces while no console runs, and nothing else.
#[tokio::test(flavor = "multi_thread")]
async fn services_work_without_the_console() {
    let (system, mut console) = observed(&[]).await;
    console.stop().await;
    let user = system.users.register().await;
    system.users.until_mailed(user).await;
    system.processes.until_logged(USER, "the collector does not accept traces").await;
    system.users.register_many(5).await;
    system.until_drained().await;
    let log = system.processes.log(USER);
    let reports = log.lines().filter(|line| line.contains("the collector does not accept traces"));
    let reasons: Vec<&str> = reports.map(|line| line.split_once("error\":\"").unwrap().1).collect();
    let distinct: BTreeSet<&&str> = reasons.iter().collect();
    assert_eq!(distinct.len(), reasons.len(), "a reason is reported twice: {log}");
}

/// The picture of docs/console.md: a registration whose mail the server deferred once. `cargo xtask
/// screenshots` lets this test write it.
#[tokio::test(flavor = "multi_thread")]
async fn the_story_is_pictured() {
    let (system, console) = observed(&[]).await;
    let Some(browser) = Browser::open(&console.url(""), 1280, 1500).await else { return };
    system.mail.fail(Fault::Reject { stage: Stage::Rcpt, code: 451 }.times(1));
    let user = register(&console, &address()).await;
    browser.goto(&format!("/story?user={user}")).await;
    browser.until_text("#story", "mailed after 2 attempts").await;
    browser.until_text("#story", "analytics.emails: handled").await;
    let picture = browser.picture().await;
    assert!(picture.starts_with(b"\x89PNG"));
    if std::env::var_os("WAYBILL_WRITE_SCREENSHOTS").is_some() {
        std::fs::write(paths::root().join("docs/console/story.png"), picture).unwrap();
    }
    browser.close().await;
}
