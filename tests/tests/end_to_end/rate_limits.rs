//! Limits per caller: what one caller sends too much is refused, and other callers are answered.

use reqwest::{Method, RequestBuilder, Response, StatusCode};
use serde_json::Value;
use tests::System;
use tests::identity::Identities;
use tests::users::{Users, address};
use topology::{CACHE, USER};
use uuid::Uuid;

/// With a rate of one per second a caller may send the requests of ten seconds at once.
const BURST: usize = 10;
/// More than a burst, also if a slow machine takes some seconds for these requests.
const MANY: usize = 60;

/// A request that costs little, from a caller that a proxy names.
fn read(users: &Users, forwarded_for: Option<&str>) -> RequestBuilder {
    let request = users.request(Method::GET, USER, &format!("/users/{}", Uuid::now_v7()));
    match forwarded_for {
        Some(caller) => request.header("x-forwarded-for", caller),
        None => request,
    }
}

/// Sends many requests one after another. Returns how many were answered, and the first refusal.
async fn flood(request: impl Fn() -> RequestBuilder) -> (usize, Option<Response>) {
    let mut answered = 0;
    let mut refusal = None;
    for _ in 0..MANY {
        let answer = request().send().await.unwrap();
        if answer.status() == StatusCode::TOO_MANY_REQUESTS {
            refusal.get_or_insert(answer);
        } else {
            answered += 1;
        }
    }
    (answered, refusal)
}

/// 429 with `Retry-After`, as a problem.
async fn assert_limited(refusal: Option<Response>) {
    let refusal = refusal.expect("a request of many is refused");
    let seconds: u64 = refusal.headers()["retry-after"].to_str().unwrap().parse().unwrap();
    assert!((1..=3600).contains(&seconds), "Retry-After: {seconds}");
    assert_eq!(refusal.json::<Value>().await.unwrap()["type"], "/problems/too-many-requests");
}

/// T84: one address is limited. A header that the caller writes itself does not help it.
#[tokio::test(flavor = "multi_thread")]
async fn an_address_is_limited_whatever_it_says_about_itself() {
    let mut system = System::empty().await;
    system.processes.start_with(USER, &[("HTTP_RATE_PER_ADDRESS", "1")]).await;
    let number = std::cell::Cell::new(0);
    let disguised = || {
        number.set(number.get() + 1);
        read(&system.users, Some(&format!("198.51.100.{}", number.get())))
    };
    let (answered, refusal) = flood(disguised).await;
    assert_limited(refusal).await;
    assert!((BURST..MANY).contains(&answered), "{answered} of {MANY} requests were answered");
    assert!(system.processes.admin(USER).is_alive().await, "the admin port has no limit");
    let labels = ["limit=\"requests\"", "per=\"address\""];
    let limited = system.processes.metric(USER, "http_requests_limited_total", &labels).await;
    assert_eq!(limited, Some((MANY - answered) as f64));
}

/// T84: behind a trusted proxy each caller has a limit of its own, and no metric or log line has
/// its address.
#[tokio::test(flavor = "multi_thread")]
async fn callers_behind_a_trusted_proxy_are_limited_one_by_one() {
    let mut system = System::empty().await;
    let settings = [("HTTP_RATE_PER_ADDRESS", "1"), ("TRUSTED_PROXIES", "10.0.0.0/8,127.0.0.1")];
    system.processes.start_with(USER, &settings).await;
    let users = &system.users;
    // The first address was written by the caller.
    let (_, refusal) = flood(|| read(users, Some("203.0.113.9, 198.51.100.7, 10.1.2.3"))).await;
    assert_limited(refusal).await;
    let other = read(users, Some("203.0.113.9, 198.51.100.8")).send().await.unwrap();
    assert_eq!(other.status(), StatusCode::NOT_FOUND, "another caller");
    let (_, refusal) = flood(|| read(users, Some("2001:db8:1:2::1"))).await;
    assert_limited(refusal).await;
    let same_network = read(users, Some("2001:db8:1:2:ffff::2")).send().await.unwrap();
    let other_network = read(users, Some("2001:db8:1:3::1")).send().await.unwrap();
    assert_eq!((same_network.status(), other_network.status()), (StatusCode::TOO_MANY_REQUESTS, StatusCode::NOT_FOUND));
    let page = system.processes.admin(USER).metrics_page().await.unwrap();
    let log = system.processes.log(USER);
    for text in ["198.51.100", "203.0.113", "2001:db8"] {
        assert!(!page.contains(text) && !log.contains(text), "an address of a caller in the metrics or in the log");
    }
}

/// T84: the registrations of an address have a limit of their own: each sends a mail to an address
/// that the caller chooses. Other requests are answered.
#[tokio::test(flavor = "multi_thread")]
async fn registrations_have_a_limit_of_their_own() {
    let mut system = System::empty().await;
    system.processes.start_with(USER, &[("REGISTRATIONS_PER_ADDRESS", "3")]).await;
    let users = &system.users;
    let mut first = None;
    for _ in 0..3 {
        first.get_or_insert(users.register().await);
    }
    let refusal = users.registration(&address(), None).send().await.unwrap();
    assert_eq!(refusal.status(), StatusCode::TOO_MANY_REQUESTS);
    assert_limited(Some(refusal)).await;
    assert_eq!(users.rename(first.unwrap(), "Countess").await.unwrap().status, StatusCode::OK);
    let labels = ["limit=\"registrations\"", "per=\"address\""];
    assert_eq!(system.processes.metric(USER, "http_requests_limited_total", &labels).await, Some(1.0));
    assert_eq!(system.stores.count(USER, "select count(*) from users").await, 3);
}

/// T84: a principal is limited, wherever it sends its requests from. Other principals and
/// administrators are answered.
#[tokio::test(flavor = "multi_thread")]
async fn a_principal_is_limited_and_others_are_not() {
    let mut system = System::empty().await;
    let identities = Identities::required_by(&mut system.processes);
    let settings = [("HTTP_RATE_PER_PRINCIPAL", "1"), ("REGISTRATIONS_PER_PRINCIPAL", "2")];
    system.processes.start_with(USER, &settings).await;
    let [first, second, admin] = [identities.token_of("first"), identities.token_of("second"), identities.admin()];
    let [first, second, admin] = [first, second, admin].map(|token| system.users.bearing(&token));
    let (answered, refusal) = flood(|| read(&first, None)).await;
    assert_limited(refusal).await;
    assert!((BURST..MANY).contains(&answered), "{answered} of {MANY} requests were answered");
    for _ in 0..2 {
        assert_eq!(second.post(&address(), None).await.unwrap().status, StatusCode::CREATED);
    }
    assert_eq!(second.post(&address(), None).await.unwrap().status, StatusCode::TOO_MANY_REQUESTS);
    let (answered, refusal) = flood(|| read(&admin, None)).await;
    assert_eq!((answered, refusal.is_none()), (MANY, true), "administrators have no limit");
    for _ in 0..3 {
        assert_eq!(admin.post(&address(), None).await.unwrap().status, StatusCode::CREATED);
    }
}

/// A list of proxies that cannot be read is refused at start.
#[tokio::test(flavor = "multi_thread")]
async fn a_malformed_list_of_proxies_is_refused_at_start() {
    let system = System::empty().await;
    for value in ["10.0.0.0/33", "proxy.example.com", "10.0.0.1,nonsense"] {
        let error = system.processes.run(CACHE, &["--trusted-proxies", value]).await;
        let error = error.expect_err("the service must not start").to_string();
        assert!(error.contains("--trusted-proxies") && error.contains("for example 10.0.0.0/8"), "{value}: {error}");
    }
}
