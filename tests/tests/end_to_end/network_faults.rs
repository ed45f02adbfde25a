//! A process that its dependency has fallen silent for, while everybody else works: the network, not the server, is broken. The
//! connections stay open and nothing comes, so only a time-out of our own can tell. When the network is well again, what fell
//! silent stays so; new connections must be made.

use std::time::{Duration, Instant};

use futures::future::join_all;
use reqwest::StatusCode;
use tests::proxy::Proxy;
use tests::services::{ANALYTICS_USERS, groups};
use tests::users::address;
use tests::{System, eventually, eventually_eq};
use topology::{ANALYTICS, CACHE, EMAIL, SERVICES, USER};
use uuid::Uuid;

/// How long a handler may take: 60 s unless told otherwise. Five times as long a client waits for the others of its group in a
/// rebalance, and cannot tell that from silence.
const HANDLE_TIMEOUT: (&str, &str) = ("HANDLE_TIMEOUT_MS", "3000");

/// T40, I9 I12: silence between a consumer and Kafka alone. Kafka gives its partitions to the other copy after 10 s; it says so
/// itself, lives, and takes service again afterwards. Nothing is lost or counted twice.
#[tokio::test(flavor = "multi_thread")]
async fn a_consumer_that_hears_nothing_from_kafka_is_replaced_and_comes_back() {
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
    system.processes.until_not_ready(ANALYTICS).await;
    let answers = load.end().await;
    let users = answers.accepted().len() as i64;
    eventually_eq("the other copy counts all", users, async || system.users.funnel().await.0).await;

    proxy.heal();
    system.processes.until_ready(&[ANALYTICS]).await;
    other.stop().await;
    system.users.register().await;
    eventually_eq("the first copy counts again", users + 1, async || system.users.funnel().await.0).await;
    system.kafka.until_caught_up(ANALYTICS_USERS).await;
    assert_eq!(system.users.registrations().await, Some(users + 1));
    judge.check_with(&mut system, &answers).await;
}

/// Between a service and everything that it needs; a router two rooms away has 1 ms.
const LATENCY: Duration = Duration::from_millis(5);
const BREAKS: usize = 5;

/// T40, I1 I3 I4 I5 I7 I8: a network that is slow, and that breaks every connection time and again: to Kafka, to each database, to Valkey and
/// to the mail server. Everything takes longer, and that is all.
#[tokio::test(flavor = "multi_thread")]
async fn a_network_that_is_slow_and_breaks_changes_nothing_but_the_pace() {
    let mut system = System::empty().await;
    let (_kafka, kafka) = system.own_kafka().await;
    let (valkey, valkey_url) = Proxy::before_url(system.processes.setting("VALKEY_URL")).await;
    let smtp = Proxy::before(&system.mail.address().to_string()).await;
    system.processes.set("KAFKA_BROKERS", &kafka.address());
    system.processes.set("VALKEY_URL", &valkey_url);
    system.processes.set("SMTP_PORT", &smtp.port().to_string());
    system.processes.set("LEASE_MS", "15000"); // a claim whose answer was lost has to end within this test
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
    for _ in 0..BREAKS {
        load.until_accepted(5).await;
        proxies.iter().for_each(Proxy::reset);
    }
    load.until_accepted(5).await;
    let answers = load.end().await;
    judge.check_with(&mut system, &answers).await;
}

/// T40, I5 I7 I8 I12: silence between each consumer and what its effects go to. It is noticed, nothing is given up, and soon
/// after the network is well everything is there once, by the processes that were there before.
#[tokio::test(flavor = "multi_thread")]
async fn consumers_whose_stores_fall_silent_notice_it_and_go_on_afterwards() {
    let mut system = System::empty().await;
    let (email, (email_name, email_url)) = system.proxied_database(EMAIL).await;
    let (analytics, (analytics_name, analytics_url)) = system.proxied_database(ANALYTICS).await;
    let (valkey, valkey_url) = Proxy::before_url(system.processes.setting("VALKEY_URL")).await;
    system.processes.spawn(USER);
    system.processes.spawn_with(EMAIL, &[HANDLE_TIMEOUT, (&email_name, &email_url)]);
    system.processes.spawn_with(ANALYTICS, &[HANDLE_TIMEOUT, (&analytics_name, &analytics_url)]);
    system.processes.spawn_with(CACHE, &[HANDLE_TIMEOUT, ("VALKEY_URL", &valkey_url)]);
    system.processes.until_ready(&SERVICES).await;
    let judge = system.judge().await;
    let mut users = vec![system.users.register().await, system.users.register().await];
    all_there_once(&system, &users).await;

    let proxies = [email, analytics, valkey];
    proxies.iter().for_each(Proxy::silence);
    for _ in 0..3 {
        users.push(system.users.register().await);
    }
    for service in [EMAIL, ANALYTICS, CACHE] {
        system.processes.until_not_ready(service).await;
    }
    proxies.iter().for_each(Proxy::heal);
    users.push(system.users.register().await);
    all_there_once(&system, &users).await;
    system.processes.until_ready(&SERVICES).await;
    for group in groups() {
        assert_eq!(system.kafka.dead_letters(group).len(), 0, "dead letters of {group}");
    }
    judge.check(&mut system).await;
}

async fn all_there_once(system: &System, users: &[Uuid]) {
    for id in users {
        system.users.until_mailed(*id).await;
        system.users.until_cached(*id, 1).await;
    }
    let count = users.len() as i64;
    system.users.until_counted(count, count).await;
    system.until_drained().await;
    assert_eq!(system.mail.all().len(), users.len(), "mails");
}

/// How long a request may take at most (10 s), and some time for two busy cores.
const ANSWERED: Duration = Duration::from_secs(15);
/// The pool has ten.
const AT_ONCE: i64 = 12;

/// T40, I1 I2 I3: silence between the user service and its database. A request is told so in time; tried again with its key it is
/// done once. There are more requests than the pool has connections: none of those that fell silent may keep its place. The
/// relay's silent session holds the lock until Postgres ends it after 15 s; then all is published.
#[tokio::test(flavor = "multi_thread")]
async fn a_registration_during_the_databases_silence_is_answered_and_done_once() {
    let mut system = System::empty().await;
    let (database, (name, url)) = system.proxied_database(USER).await;
    system.processes.start_with(USER, &[(&name, &url)]).await;
    let judge = system.judge().await;
    join_all((0..AT_ONCE).map(|_| system.users.register())).await;
    system.stores.until_outbox_empty(USER).await;

    database.silence();
    let email = address();
    let key = Uuid::now_v7().to_string();
    let asked = Instant::now();
    let requests = (0..AT_ONCE).map(|_| system.users.post(&email, Some(&key)));
    for answer in join_all(requests).await {
        assert_eq!(answer.unwrap().status, StatusCode::SERVICE_UNAVAILABLE);
    }
    assert!(asked.elapsed() < ANSWERED, "answered after {:?}", asked.elapsed());
    system.processes.until_not_ready(USER).await;

    database.heal();
    let answer = eventually("the registration works", async || {
        let answer = system.users.post(&email, Some(&key)).await.unwrap();
        (answer.status != StatusCode::SERVICE_UNAVAILABLE).then_some(answer)
    })
    .await;
    assert_eq!(answer.status, StatusCode::CREATED, "{answer:?}");
    system.processes.until_ready(&[USER]).await;
    judge.check(&mut system).await;
    assert_eq!(system.stores.count(USER, "select count(*) from users").await, AT_ONCE + 1);
    assert!(!system.processes.has_ended(USER));
}
