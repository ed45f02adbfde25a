//! A process that its dependency has fallen silent for, while everybody else works: the network, not the server, is broken. The
//! connections stay open and nothing comes, so only a time-out of our own can tell. When the network is well again, what fell
//! silent stays so; new connections must be made.

use std::time::{Duration, Instant};

use futures::future::join_all;
use reqwest::StatusCode;
use tests::load::Answered;
use tests::log::GROUPS;
use tests::proxy::Proxy;
use tests::{Part, System, api, eventually, eventually_eq};
use uuid::Uuid;

/// How long a handler may take: 60 s unless told otherwise. Five times as long a client waits for the others of its group in a
/// rebalance, and cannot tell that from silence.
const HANDLE_TIMEOUT: (&str, &str) = ("HANDLE_TIMEOUT_MS", "3000");

/// T40, I9 I12: silence between a consumer and Kafka alone. Kafka gives its partitions to the other copy after 10 s; it says so
/// itself, lives, and takes part again afterwards. Nothing is lost or counted twice.
#[tokio::test(flavor = "multi_thread")]
async fn a_consumer_that_hears_nothing_from_kafka_is_replaced_and_comes_back() {
    let mut system = System::empty().await;
    let (_kafka, proxy) = system.own_kafka().await;
    system.spawn(Part::User, &[]);
    system.spawn(Part::Email, &[]);
    system.spawn(Part::Analytics, &[HANDLE_TIMEOUT, ("KAFKA_BROKERS", &proxy.address())]);
    system.ready(&[Part::User, Part::Email, Part::Analytics]).await;
    let mut other = system.spawn_another(Part::Analytics, &[]);
    other.until_ready().await.unwrap();
    let watch = system.watch().await;
    let load = system.load(2);
    load.until_accepted(5).await;

    proxy.silence();
    system.until_waiting(Part::Analytics).await;
    let answered = load.end().await;
    let users = answered.accepted().len() as i64;
    eventually_eq("the other copy counts all", users, async || system.funnel().await.0).await;

    proxy.heal();
    system.ready(&[Part::Analytics]).await;
    other.stop().await;
    system.register().await;
    eventually_eq("the first copy counts again", users + 1, async || system.funnel().await.0).await;
    system.until_read("analytics.users", "user.events.v1").await;
    assert_eq!(system.registrations().await, Some(users + 1));
    system.check(&watch, &answered).await;
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
    let (valkey, valkey_url) = Proxy::before_url(system.setting("VALKEY_URL")).await;
    let smtp = Proxy::before(&system.sink.address().to_string()).await;
    system.set("KAFKA_BROKERS", &kafka.address());
    system.set("VALKEY_URL", &valkey_url);
    system.set("SMTP_PORT", &smtp.port().to_string());
    system.set("LEASE_MS", "15000"); // a claim whose answer was lost has to end within this test
    let mut proxies = vec![kafka, valkey, smtp];
    for part in [Part::User, Part::Email, Part::Analytics] {
        let (proxy, (name, url)) = system.proxied_database(part).await;
        system.set(&name, &url);
        proxies.push(proxy);
    }
    proxies.iter().for_each(|proxy| proxy.slow(LATENCY));
    system.start_all().await;
    let watch = system.watch().await;
    let load = system.load(2);
    for _ in 0..BREAKS {
        load.until_accepted(5).await;
        proxies.iter().for_each(Proxy::reset);
    }
    load.until_accepted(5).await;
    let answered = load.end().await;
    system.check(&watch, &answered).await;
}

/// T40, I5 I7 I8 I12: silence between each consumer and what its effects go to. It is noticed, nothing is given up, and soon
/// after the network is well everything is there once, by the processes that were there before.
#[tokio::test(flavor = "multi_thread")]
async fn consumers_whose_stores_fall_silent_notice_it_and_go_on_afterwards() {
    let mut system = System::empty().await;
    let (email, (email_name, email_url)) = system.proxied_database(Part::Email).await;
    let (analytics, (analytics_name, analytics_url)) = system.proxied_database(Part::Analytics).await;
    let (valkey, valkey_url) = Proxy::before_url(system.setting("VALKEY_URL")).await;
    system.spawn(Part::User, &[]);
    system.spawn(Part::Email, &[HANDLE_TIMEOUT, (&email_name, &email_url)]);
    system.spawn(Part::Analytics, &[HANDLE_TIMEOUT, (&analytics_name, &analytics_url)]);
    system.spawn(Part::Cache, &[HANDLE_TIMEOUT, ("VALKEY_URL", &valkey_url)]);
    system.ready(&Part::ALL).await;
    let watch = system.watch().await;
    let mut users = vec![system.register().await, system.register().await];
    all_there_once(&system, &users).await;

    let proxies = [email, analytics, valkey];
    proxies.iter().for_each(Proxy::silence);
    for _ in 0..3 {
        users.push(system.register().await);
    }
    for part in [Part::Email, Part::Analytics, Part::Cache] {
        system.until_waiting(part).await;
    }
    proxies.iter().for_each(Proxy::heal);
    users.push(system.register().await);
    all_there_once(&system, &users).await;
    system.ready(&Part::ALL).await;
    for (group, _) in GROUPS {
        assert_eq!(system.dead_letters(group).len(), 0, "dead letters of {group}");
    }
    system.check(&watch, &Answered::default()).await;
}

async fn all_there_once(system: &System, users: &[Uuid]) {
    for id in users {
        system.until_mailed(*id).await;
        system.until_cached(*id, 1).await;
    }
    let count = users.len() as i64;
    system.until_counted(count, count).await;
    system.until_drained().await;
    assert_eq!(system.sink.mails().len(), users.len(), "mails");
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
    let (database, (name, url)) = system.proxied_database(Part::User).await;
    system.restart(Part::User, &[(&name, &url)]).await;
    let watch = system.watch().await;
    join_all((0..AT_ONCE).map(|_| system.register())).await;
    system.until_published(&watch).await;

    database.silence();
    let (email, key) = (api::address(), Uuid::now_v7().to_string());
    let asked = Instant::now();
    let requests = (0..AT_ONCE).map(|_| system.post_user(&email, Some(&key)));
    for answer in join_all(requests).await {
        assert_eq!(answer.unwrap().status, StatusCode::SERVICE_UNAVAILABLE);
    }
    assert!(asked.elapsed() < ANSWERED, "answered after {:?}", asked.elapsed());
    system.until_waiting(Part::User).await;

    database.heal();
    let answer = eventually("the registration works", async || {
        let answer = system.post_user(&email, Some(&key)).await.unwrap();
        (answer.status != StatusCode::SERVICE_UNAVAILABLE).then_some(answer)
    })
    .await;
    assert_eq!(answer.status, StatusCode::CREATED, "{answer:?}");
    system.ready(&[Part::User]).await;
    system.check(&watch, &Answered::default()).await;
    assert_eq!(watch.count("select count(*) from users").await, AT_ONCE + 1);
    assert!(!system.has_ended(Part::User));
}
