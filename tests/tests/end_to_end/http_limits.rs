//! The limits of a public port, and how a process stops behind a load balancer.

use std::time::Duration;

use futures::future::join_all;
use reqwest::{Client, Method, RequestBuilder, Response, StatusCode};
use serde_json::{Value, json};
use tests::users::address;
use tests::{System, eventually, eventually_eq, throughout};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use topology::{ANALYTICS, CACHE, EMAIL, SERVICES, Service, USER};
use uuid::Uuid;

/// What slow callers have sent: nothing, a part of the head, the head without its end, and a part
/// of the body.
const HALF_SENT: [&str; 4] = [
    "",
    "GET /us",
    "GET /users HTTP/1.1\r\nhost: localhost\r\n",
    "POST /users HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\ncontent-length: 50\r\n\r\n{",
];

async fn half_sent(system: &System, service: Service, text: &str) -> TcpStream {
    let address = system.users.url(service, "").replace("http://", "");
    let mut stream = TcpStream::connect(address).await.unwrap();
    stream.write_all(text.as_bytes()).await.unwrap();
    stream
}

/// Reads until the service closes the connection.
async fn until_closed(mut stream: TcpStream) -> String {
    let mut answer = vec![];
    // A reset is an end as well.
    let _ = tokio::time::timeout(tests::DEADLINE, stream.read_to_end(&mut answer)).await.expect("a closed connection");
    String::from_utf8(answer).unwrap()
}

fn header(response: &Response, name: &str) -> String {
    response.headers().get(name).map(|value| value.to_str().unwrap().to_owned()).unwrap_or_default()
}

/// Whether the answer refuses the request because of the load: 503 with `Retry-After`, as a
/// problem.
async fn assert_overloaded(response: Response) {
    assert_eq!(response.status(), StatusCode::SERVICE_UNAVAILABLE);
    assert_eq!(header(&response, "retry-after"), "1");
    assert_eq!(response.json::<Value>().await.unwrap()["type"], "/problems/overloaded");
}

/// T71: half-sent requests occupy all connections. A further caller gets 503, the admin
/// port answers, and the service closes each half-sent request by itself.
#[tokio::test(flavor = "multi_thread")]
async fn half_sent_requests_are_closed_and_further_callers_get_503() {
    let mut system = System::empty().await;
    let limits = [("HTTP_CONNECTIONS", "4"), ("HTTP_REQUESTS", "4"), ("HTTP_READ_TIMEOUT_MS", "3000")];
    system.processes.start_with(USER, &limits).await;
    let mut held = vec![];
    for text in HALF_SENT {
        held.push(half_sent(&system, USER, text).await);
    }
    let show = || Client::new().get(system.users.url(USER, &format!("/users/{}", Uuid::now_v7()))).send();
    assert_overloaded(show().await.unwrap()).await;
    assert!(system.processes.admin(USER).is_alive().await);
    assert_eq!(system.processes.metric(USER, "http_connections_refused_total", &[]).await, Some(1.0));

    let answers = join_all(held.into_iter().map(until_closed)).await;
    assert_eq!(answers[..3], ["", "", ""], "answers to a half-sent head");
    assert!(answers[3].starts_with("HTTP/1.1 408 "), "{}", answers[3]);
    assert!(answers[3].contains("/problems/body-too-slow"), "{}", answers[3]);
    eventually_eq("the answer after the time-out", 404, async || show().await.unwrap().status().as_u16()).await;

    let idle = "GET /nothing HTTP/1.1\r\nhost: localhost\r\n\r\n";
    let closed = until_closed(half_sent(&system, USER, idle).await).await;
    assert!(closed.starts_with("HTTP/1.1 404 "), "an idle connection is closed after its answer: {closed}");
}

/// T71: the admin port, too.
#[tokio::test(flavor = "multi_thread")]
async fn half_sent_requests_to_the_admin_port_are_closed() {
    let mut system = System::empty().await;
    system.processes.start_with(USER, &[("HTTP_READ_TIMEOUT_MS", "500")]).await;
    let address = system.processes.admin(USER).url("").replace("http://", "");
    let connect = async |text: &str| {
        let mut stream = TcpStream::connect(&address).await.unwrap();
        stream.write_all(text.as_bytes()).await.unwrap();
        stream
    };
    for text in ["", "GET /livez HTTP/1.1\r\n"] {
        assert_eq!(until_closed(connect(text).await).await, "", "{text}");
    }
    let head = |length: usize| {
        format!(
            "POST /dead-letters HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\ncontent-length: {length}\r\n\r\n"
        )
    };
    let answer = until_closed(connect(&(head(50) + "{")).await).await;
    assert!(answer.starts_with("HTTP/1.1 408 ") && answer.contains("/problems/body-too-slow"), "{answer}");
    let answer = until_closed(connect(&head(1_000_000)).await).await;
    assert!(answer.starts_with("HTTP/1.1 413 "), "{answer}");
}

/// T71: a caller that sends requests and reads no answer is disconnected, so it does not keep its
/// place among the connections.
#[tokio::test(flavor = "multi_thread")]
async fn a_caller_that_reads_no_answer_is_disconnected() {
    let mut system = System::empty().await;
    let limits = [("HTTP_CONNECTIONS", "1"), ("HTTP_REQUESTS", "1"), ("HTTP_READ_TIMEOUT_MS", "1000")];
    system.processes.start_with(USER, &limits).await;
    let mut deaf = half_sent(&system, USER, "").await;
    let request = "GET /nothing HTTP/1.1\r\nhost: localhost\r\n\r\n".repeat(1_000);
    let until_closed = async { while deaf.write_all(request.as_bytes()).await.is_ok() {} };
    tokio::time::timeout(tests::DEADLINE, until_closed).await.expect("a closed connection");
    let show = || Client::new().get(system.users.url(USER, "/nothing")).send();
    eventually_eq("the answer to another caller", 404, async || show().await.unwrap().status().as_u16()).await;
}

/// T71: one request is handled, the others get 503. The handled one waits for a lock.
#[tokio::test(flavor = "multi_thread")]
async fn requests_beyond_the_limit_get_503_with_retry_after() {
    let mut system = System::empty().await;
    system.processes.start_with(USER, &[("HTTP_REQUESTS", "1")]).await;
    system.users.register().await;
    let db = system.stores.database(USER).await;
    let mut lock = db.begin().await.unwrap();
    sqlx::query("lock table users in exclusive mode").execute(&mut *lock).await.unwrap();
    let requests = (0..5).map(|_| system.users.registration(&address(), None).send());
    let answers = join_all(requests).await;
    lock.rollback().await.unwrap();
    let mut overloaded = 0;
    for answer in answers {
        let answer = answer.unwrap();
        if answer.status() == StatusCode::SERVICE_UNAVAILABLE {
            assert_overloaded(answer).await;
            overloaded += 1;
        } else {
            assert_eq!(answer.status(), StatusCode::CONFLICT, "the handled request waits for the lock in vain");
        }
    }
    assert_eq!(overloaded, 4);
    system.users.register().await;
}

/// T72: after SIGTERM a process is not ready, and still answers every request until the load
/// balancer has noticed. A second SIGTERM ends it at once.
#[tokio::test(flavor = "multi_thread")]
async fn a_stopping_service_answers_requests_until_it_has_drained() {
    let mut system = System::empty().await;
    system.processes.start_with(USER, &[("DRAIN_MS", "600000")]).await;
    let keep_alive = Client::new();
    let url = system.users.url(USER, &format!("/users/{}", system.users.register().await));
    assert_eq!(header(&keep_alive.get(&url).send().await.unwrap(), "connection"), "");

    system.processes.terminate(USER);
    eventually_eq("whether the service is ready", Some(false), async || system.processes.admin(USER).is_ready().await)
        .await;
    throughout(Duration::from_secs(2), "new and old connections are served", async || {
        let answer = keep_alive.get(&url).send().await.unwrap();
        // The caller opens its next connection to another replica.
        assert_eq!(header(&answer, "connection"), "close");
        answer.status() == StatusCode::OK && system.users.post(&address(), None).await.unwrap().status == 201
    })
    .await;
    assert!(!system.processes.has_ended(USER));
    system.processes.stop(USER).await;
    assert!(system.processes.log(USER).contains("\"stopped\""), "the process must end in an orderly way");
}

/// T72: requests that are in progress at the end of the drain are answered.
#[tokio::test(flavor = "multi_thread")]
async fn a_request_in_progress_is_answered_before_the_process_ends() {
    let mut system = System::start_only(&[USER]).await;
    let db = system.stores.database(USER).await;
    let mut lock = db.begin().await.unwrap();
    sqlx::query("lock table users in exclusive mode").execute(&mut *lock).await.unwrap();
    let request = tokio::spawn(system.users.registration(&address(), None).send());
    let waiting =
        "select count(*) from pg_stat_activity where wait_event_type = 'Lock' and datname = current_database()";
    eventually_eq("requests that wait", 1, async || system.stores.count(USER, waiting).await).await;
    system.processes.terminate(USER);
    lock.rollback().await.unwrap();
    assert_eq!(request.await.unwrap().unwrap().status(), StatusCode::CREATED);
    system.processes.until_ended(USER).await;
}

/// Requests to every port of every service that are answered in different places.
fn requests(system: &System) -> Vec<RequestBuilder> {
    let get = |service, path: &str| Client::new().get(system.users.url(service, path));
    let unknown = Uuid::now_v7();
    let mut requests = vec![
        get(USER, &format!("/users/{unknown}")),
        get(USER, "/nothing"),
        Client::new().request(Method::POST, system.users.url(USER, "/users")).body("{"),
        get(CACHE, &format!("/profiles/{unknown}")),
        get(ANALYTICS, "/funnel"),
        get(EMAIL, &format!("/users/{unknown}/emails")),
    ];
    for service in SERVICES {
        let admin = system.processes.admin(service);
        requests.extend(["/livez", "/nothing"].map(|path| Client::new().get(admin.url(path))));
    }
    requests
}

/// Every answer has an `x-request-id`: the caller's, or a new one. The log lines of a request have
/// it too.
#[tokio::test(flavor = "multi_thread")]
async fn every_answer_and_every_log_line_of_a_request_has_its_id() {
    let mut system = System::empty().await;
    system.processes.set("RUST_LOG", "warn,shared=debug");
    system.processes.start_all().await;
    for request in requests(&system) {
        let id = Uuid::now_v7().to_string();
        let echoed = request.try_clone().unwrap().header("x-request-id", &id).send().await.unwrap();
        assert_eq!(header(&echoed, "x-request-id"), id, "{}", echoed.url());
        let made = request.header("x-request-id", "not usable").send().await.unwrap();
        assert_eq!(header(&made, "x-request-id").len(), 36, "{}", made.url());
    }
    let id = Uuid::now_v7().to_string();
    let body = json!({ "email": address(), "display_name": "Ada" });
    let url = system.users.url(USER, "/users");
    Client::new().post(url).header("x-request-id", &id).json(&body).send().await.unwrap();
    eventually("the log names the request", async || {
        let log = system.processes.log(USER);
        let line = log.lines().find(|line| line.contains("request answered") && line.contains(&id))?.to_owned();
        line.contains("request.id").then_some(())
    })
    .await;
}
