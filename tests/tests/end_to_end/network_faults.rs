//! The network fails between one process and one of its dependencies, while all other connections
//! work. Silence means that connections stay open and no data arrives, so only a time-out on our
//! side detects it. Connections that fell silent stay silent after the network has recovered; a
//! client must open new ones.

use std::time::{Duration, Instant};

use futures::future::join_all;
use reqwest::StatusCode;
use tests::proxy::Proxy;
use tests::services::{ANALYTICS_USERS, groups};
use tests::users::address;
use tests::{System, eventually, eventually_eq};
use topology::{ANALYTICS, CACHE, EMAIL, USER};
use uuid::Uuid;

/// The time limit of a handler; the default is 60 s. In a rebalance a client waits up to five times
/// as long for the other members of its group, and it cannot distinguish this wait from silence.
const HANDLE_TIMEOUT: (&str, &str) = ("HANDLE_TIMEOUT_MS", "3000");

/// T40, I9, I12: one consumer gets no data from Kafka. After 10 s Kafka assigns its partitions to
/// the other copy. The consumer reports that it is not ready, keeps running, and resumes after the
/// silence. No event is lost or counted twice.
#[tokio::test(flavor = "multi_thread")]
async fn a_consumer_cut_off_from_kafka_is_replaced_and_resumes() {
    let mut system = System::empty().await;
    let (_kafka, proxy) = system.own_kafka().await;
    system.processes.spawn(USER);
    system.processes.spawn(EMAIL);
    system.processes.spawn_with(ANALYTICS, &[HANDLE_TIMEOUT, ("KAFKA_BROKERS", &proxy.address())]);
    system.processes.until_ready(&[USER, EMAIL, ANALYTICS]).await;
    let mut other = system.processes.spawn_another(ANALYTICS);
    other.until_ready().await;
    let judge = system.judge().await;
    let load = system.load(2);
    load.until_accepted(5).await;

    proxy.silence();
    system.processes.until_waiting(ANALYTICS).await;
    let answered = load.end().await;
    let users = answered.accepted().len() as i64;
    eventually_eq("users that the other copy has counted", users, async || system.users.funnel().await.0).await;

    proxy.heal();
    system.processes.until_ready(&[ANALYTICS]).await;
    other.stop().await;
    system.users.register().await;
    let counted = async || system.users.funnel().await.0;
    eventually_eq("users after the first copy has resumed", users + 1, counted).await;
    system.kafka.until_caught_up(ANALYTICS_USERS).await;
    assert_eq!(system.users.registrations().await, Some(users + 1));
    judge.check_with(&mut system, &answered).await;
}

/// The delay in each direction, between each service and its dependencies. A local network has
/// about 1 ms.
const LATENCY: Duration = Duration::from_millis(5);
const RESETS: usize = 5;

/// T40, I1, I3, I4, I5, I7, I8: the network to Kafka, to each database, to Valkey and to the mail
/// server is slow and repeatedly resets every connection. Effects come later and are correct.
#[tokio::test(flavor = "multi_thread")]
async fn a_slow_network_that_resets_connections_only_delays_effects() {
    let mut system = System::empty().await;
    let (_kafka, kafka) = system.own_kafka().await;
    let (valkey, valkey_url) = Proxy::before_url(system.processes.setting("VALKEY_URL")).await;
    let smtp = Proxy::before(&system.mail.address().to_string()).await;
    system.processes.set("KAFKA_BROKERS", &kafka.address());
    system.processes.set("VALKEY_URL", &valkey_url);
    system.processes.set("SMTP_PORT", &smtp.port().to_string());
    // If the answer to a claim is lost, its lease must end within this test.
    system.processes.set("LEASE_MS", "15000");
    let mut proxies = vec![kafka, valkey, smtp];
    for service in [USER, EMAIL, ANALYTICS] {
        let (proxy, (name, url)) = system.proxied_database(service).await;
        system.processes.set(&name, &url);
        proxies.push(proxy);
    }
    proxies.iter().for_each(|proxy| proxy.slow(LATENCY));
    system.processes.start_all().await;
    let judge = system.judge().await;
    let load = system.load(2);
    for _ in 0..RESETS {
        load.until_accepted(5).await;
        proxies.iter().for_each(Proxy::reset);
    }
    load.until_accepted(5).await;
    let answered = load.end().await;
    judge.check_with(&mut system, &answered).await;
}

/// T40, I5, I7, I8, I12: each consumer gets no data from the store of its effects. It reports that
/// it is not ready and dead-letters nothing. After the silence the same processes apply every event
/// once.
#[tokio::test(flavor = "multi_thread")]
async fn consumers_report_a_silent_store_and_resume() {
    let mut system = System::empty().await;
    let services = [USER, EMAIL, ANALYTICS, CACHE];
    let (email, (email_name, email_url)) = system.proxied_database(EMAIL).await;
    let (analytics, (analytics_name, analytics_url)) = system.proxied_database(ANALYTICS).await;
    let (valkey, valkey_url) = Proxy::before_url(system.processes.setting("VALKEY_URL")).await;
    system.processes.spawn(USER);
    system.processes.spawn_with(EMAIL, &[HANDLE_TIMEOUT, (&email_name, &email_url)]);
    system.processes.spawn_with(ANALYTICS, &[HANDLE_TIMEOUT, (&analytics_name, &analytics_url)]);
    system.processes.spawn_with(CACHE, &[HANDLE_TIMEOUT, ("VALKEY_URL", &valkey_url)]);
    system.processes.until_ready(&services).await;
    let judge = system.judge().await;
    let mut users = vec![system.users.register().await, system.users.register().await];
    until_applied_once(&system, &users).await;

    let proxies = [email, analytics, valkey];
    proxies.iter().for_each(Proxy::silence);
    for _ in 0..3 {
        users.push(system.users.register().await);
    }
    for service in [EMAIL, ANALYTICS, CACHE] {
        system.processes.until_waiting(service).await;
    }
    proxies.iter().for_each(Proxy::heal);
    users.push(system.users.register().await);
    until_applied_once(&system, &users).await;
    system.processes.until_ready(&services).await;
    for group in groups() {
        assert_eq!(system.kafka.dead_letters(group).len(), 0, "dead letters of {group}");
    }
    judge.check(&mut system).await;
}

/// Waits until every user is mailed, cached and counted, and checks that there is one mail each.
async fn until_applied_once(system: &System, users: &[Uuid]) {
    system.until_applied(users).await;
    assert_eq!(system.mail.all().len(), users.len(), "mails");
}

/// A request takes at most 10 s. The rest is for a machine with two busy cores.
const ANSWER_LIMIT: Duration = Duration::from_secs(15);
/// More than the ten connections of the service's pool.
const CONCURRENT_REQUESTS: i64 = 12;

/// T40, I1, I2, I3: the user service gets no data from its database. It answers 503 in time, and a
/// retry with the same key registers the user once. There are more requests than the pool has
/// connections, so a silent connection must not keep its slot in the pool. The relay's silent
/// session holds the lock until Postgres ends it after 15 s; then everything is published.
#[tokio::test(flavor = "multi_thread")]
async fn requests_get_503_while_the_database_is_silent_and_a_retry_registers_once() {
    let mut system = System::empty().await;
    let (database, (name, url)) = system.proxied_database(USER).await;
    system.processes.start_with(USER, &[(&name, &url)]).await;
    let judge = system.judge().await;
    join_all((0..CONCURRENT_REQUESTS).map(|_| system.users.register())).await;
    system.stores.until_outbox_empty(USER).await;

    database.silence();
    let email = address();
    let key = Uuid::now_v7().to_string();
    let sent_at = Instant::now();
    let others: Vec<String> = (1..CONCURRENT_REQUESTS).map(|_| address()).collect();
    let first = system.users.post(&email, Some(&key));
    let (first, others) = tokio::join!(first, join_all(others.iter().map(|other| system.users.post(other, None))));
    for answer in others.into_iter().chain([first]) {
        assert_eq!(answer.unwrap().status, StatusCode::SERVICE_UNAVAILABLE);
    }
    assert!(sent_at.elapsed() < ANSWER_LIMIT, "the answers took {:?}", sent_at.elapsed());
    system.processes.until_waiting(USER).await;

    database.heal();
    let answer = eventually("the retry gets another answer than 503", async || {
        let answer = system.users.post(&email, Some(&key)).await.unwrap();
        (answer.status != StatusCode::SERVICE_UNAVAILABLE).then_some(answer)
    })
    .await;
    assert_eq!(answer.status, StatusCode::CREATED, "{answer:?}");
    system.processes.until_ready(&[USER]).await;
    judge.check(&mut system).await;
    assert_eq!(system.stores.count(USER, "select count(*) from users").await, CONCURRENT_REQUESTS + 1);
    assert!(!system.processes.has_ended(USER), "the user service must keep running");
}
