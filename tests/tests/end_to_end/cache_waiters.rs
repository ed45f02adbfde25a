//! Requests with a `min_version` that the cache does not have yet.

use std::time::{Duration, Instant};

use futures::future::join_all;
use redis::aio::MultiplexedConnection;
use reqwest::StatusCode;
use tests::users::Users;
use tests::{System, eventually};
use topology::{CACHE, USER};
use uuid::Uuid;

/// Requests that wait at each process at the same time.
const CALLERS: usize = 100;

async fn wait_for(users: &Users, id: Uuid, version: i64) -> Vec<StatusCode> {
    let answers = join_all((0..CALLERS).map(|_| users.profile(id, Some(version)))).await;
    answers.into_iter().map(|answer| answer.unwrap().status).collect()
}

/// How often profiles were read, from the statistics of the store.
async fn reads(valkey: &mut MultiplexedConnection) -> u64 {
    let statistics: String = redis::cmd("INFO").arg("commandstats").query_async(valkey).await.unwrap();
    let line = statistics.lines().find(|line| line.starts_with("cmdstat_hmget:")).unwrap_or_default();
    let calls = line.split_once("calls=").and_then(|(_, rest)| rest.split(',').next()).unwrap_or("0");
    calls.parse().unwrap()
}

/// T74: of two processes one consumes the user's partition. There nothing is read for the waiting
/// requests until the user changes. In the other they share one poll. When the version arrives, all
/// are answered.
#[tokio::test(flavor = "multi_thread")]
async fn waiting_requests_share_the_reads_of_the_store() {
    let mut system = System::empty().await;
    let valkey = system.own_valkey().await;
    system.processes.start(&[USER, CACHE]).await;
    let mut second = system.processes.spawn_another(CACHE);
    second.until_ready().await;
    let at_second = system.users.at(&second);
    let id = system.users.register().await;
    system.users.until_cached(id, 1).await;
    let client = redis::Client::open(valkey.component.url()).unwrap();
    let mut connection = client.get_multiplexed_async_connection().await.unwrap();

    let before = reads(&mut connection).await;
    let started = Instant::now();
    let (first, other) = tokio::join!(wait_for(&system.users, id, 2), wait_for(&at_second, id, 2));
    for status in first.into_iter().chain(other) {
        assert_eq!(status, StatusCode::SERVICE_UNAVAILABLE);
    }
    let done = reads(&mut connection).await - before;
    // Each request reads once by itself. One process polls every 20 ms. The rest is for the
    // readiness of both, and for a rebalance.
    let seconds = started.elapsed().as_secs() + 1;
    let allowed = 2 * CALLERS as u64 + seconds * (50 + 2 * 2) + 50;
    assert!(done <= allowed, "{done} reads for {} requests in {seconds} s", 2 * CALLERS);

    let waiting = async { tokio::join!(wait_for(&system.users, id, 2), wait_for(&at_second, id, 2)) };
    let ((first, other), renamed) = tokio::join!(waiting, system.users.rename(id, "Countess"));
    assert_eq!(renamed.unwrap().version(), 2);
    for status in first.into_iter().chain(other) {
        assert_eq!(status, StatusCode::OK);
    }
}

/// T74: a request beyond the limit gets 503 with `Retry-After`, and requests that do not wait are
/// answered.
#[tokio::test(flavor = "multi_thread")]
async fn requests_beyond_the_limit_of_waiters_get_503_at_once() {
    let mut system = System::start_only(&[USER]).await;
    system.processes.start_with(CACHE, &[("MAX_WAITERS", "3")]).await;
    let id = system.users.register().await;
    system.users.until_cached(id, 1).await;
    let answers = join_all((0..10).map(|_| system.users.profile(id, Some(99)))).await;
    let kinds = answers.into_iter().map(|answer| answer.unwrap().body["type"].as_str().unwrap().to_owned());
    let refused = kinds.filter(|kind| kind == "/problems/too-many-waiters").count();
    assert_eq!(refused, 7);
    // The places are free again.
    let url = system.users.url(CACHE, &format!("/profiles/{id}?min_version=99"));
    eventually("a place for a waiter", async || {
        let answer = reqwest::Client::new().get(&url).timeout(Duration::from_secs(10)).send().await.unwrap();
        let retry_after = answer.headers()["retry-after"].clone();
        assert_eq!(retry_after, "1");
        let body = answer.text().await.unwrap();
        body.contains("/problems/version-not-arrived").then_some(())
    })
    .await;
}

/// A version is a number from 0 upwards.
#[tokio::test(flavor = "multi_thread")]
async fn a_malformed_min_version_is_refused_with_the_field() {
    let system = System::start_only(&[USER, CACHE]).await;
    let id = Uuid::now_v7();
    for query in
        ["min_version=-1", "min_version=9223372036854775808", "min_version=x", "min_version=", "min_version=1.0"]
    {
        let answer = system.users.get(CACHE, &format!("/profiles/{id}?{query}")).await.unwrap();
        assert_eq!(answer.status, StatusCode::BAD_REQUEST, "{query}: {answer:?}");
        let detail = answer.body["detail"].as_str().unwrap();
        assert!(detail.contains("min_version") && detail.contains("from 0 to 9223372036854775807"), "{detail}");
    }
    for query in ["min_version=1&min_version=2", "version=1"] {
        let answer = system.users.get(CACHE, &format!("/profiles/{id}?{query}")).await.unwrap();
        assert_eq!(answer.status, StatusCode::BAD_REQUEST, "{query}: {answer:?}");
        assert!(answer.body["detail"].as_str().unwrap().contains("version"), "{answer:?}");
    }
}
