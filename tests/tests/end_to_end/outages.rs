//! A dependency is down for a while. Nothing is lost or dead-lettered, and no other service is
//! affected.

use std::collections::BTreeMap;
use std::time::Duration;

use reqwest::StatusCode;
use tests::checker::{Outcome, Request};
use tests::record::Draft;
use tests::services::{CONSUMERS, DEFAULT_CONSUMERS, EMAIL_EVENTS, USER_EVENTS, USER_STATE, groups, service_of};
use tests::stores::count;
use tests::users::address;
use tests::{System, eventually, eventually_eq, throughout};
use topology::{CACHE, SERVICES, Service, USER};
use uuid::Uuid;

/// Longer than the two time-outs that an outage could exceed: the session time-out of a consumer
/// that does not poll (10 s) and the longest pause between two retries (5 s).
const OUTAGE: Duration = Duration::from_secs(15);

/// T32, I1, I11, I12: Postgres and Valkey are down. Consumers pause and stay in their groups,
/// `/status` names the reason, registrations are answered with a problem document, and no record is
/// dead-lettered. After the outage every record that arrived during it has been applied once.
#[tokio::test(flavor = "multi_thread")]
async fn consumers_wait_for_their_dependencies_and_resume() {
    let mut system = System::empty().await;
    let mut postgres = system.own_postgres().await;
    let mut valkey = system.own_valkey().await;
    system.processes.set_all(&DEFAULT_CONSUMERS);
    system.processes.start_all().await;
    let judge = system.judge().await;
    let before = vec![system.users.register().await, system.users.register().await];
    system.until_applied(&before).await;
    let groups = members_and_rebalances(&system);

    postgres.component.process.kill();
    valkey.component.process.kill();
    let during = write_records_of_new_users(&system).await;
    for service in CONSUMERS {
        until_waiting_for_dependency(&system, service).await;
    }
    let retries = retries(&system).await;
    throughout(OUTAGE, "registrations are answered with 503", async || registration_gets_503(&system).await).await;
    for (group, earlier) in retries {
        assert!(system.processes.retries(group).await > earlier, "{group} must retry during the outage");
    }
    assert_no_rebalance_and_no_dead_letter(&system, &groups).await;

    postgres.component.restart().await.unwrap();
    valkey.component.restart().await.unwrap();
    system.processes.until_ready(&SERVICES).await;
    let after = vec![system.users.register().await];
    system.until_applied(&[before, during, after].concat()).await;
    assert_no_rebalance_and_no_dead_letter(&system, &groups).await;
    judge.check(&mut system).await;
}

/// T13, I1 to I5, I7, I8: Postgres is killed under load, twice. Its processes die at any point.
/// Every accepted request has its row and its events, and a transaction that did not commit leaves
/// nothing.
#[tokio::test(flavor = "multi_thread")]
async fn a_killed_postgres_keeps_all_committed_changes_and_no_others() {
    let mut system = System::empty().await;
    // If the answer to a claim is lost with Postgres, its lease must end within this test.
    system.processes.set("LEASE_MS", "15000");
    let mut postgres = system.own_postgres().await;
    system.processes.start_all().await;
    let judge = system.judge().await;
    let load = system.load(2);
    for _ in 0..2 {
        load.until_accepted(10).await;
        postgres.component.process.kill();
        postgres.component.restart().await.unwrap();
    }
    load.until_accepted(10).await;
    let answered = load.end().await;
    assert!(answered.refused().is_empty(), "{:?}", answered.refused());
    system.processes.until_ready(&SERVICES).await;
    judge.check_with(&mut system, &answered).await;
}

/// T13, I1, I3, I5, I7, I8, I9, I12: all processes of a machine die at the same moment and are
/// started again. SIGKILL leaves the page cache of the operating system intact, so this tests
/// processes and not disks, for which Waybill promises nothing.
#[tokio::test(flavor = "multi_thread")]
async fn the_system_recovers_when_all_processes_die_at_once() {
    let mut system = System::empty_on_own_components().await;
    // The lease of a sender that was killed must end within this test.
    system.processes.set("LEASE_MS", "15000");
    system.processes.start_all().await;
    let judge = system.judge().await;
    let load = system.load(2);
    load.until_accepted(10).await;

    for service in SERVICES {
        system.processes.kill(service);
    }
    let stack = system.components();
    stack.kafka.process.kill();
    stack.postgres.process.kill();
    stack.redis.process.kill();
    // The services start first and wait for their dependencies.
    for service in SERVICES {
        system.processes.spawn(service);
    }
    for service in SERVICES {
        let not_ready = async || system.processes.status(service).await.filter(|(ready, _)| !ready);
        eventually(&format!("{} runs and is not ready", service.name), not_ready).await;
    }
    let stack = system.components();
    stack.postgres.restart().await.unwrap();
    stack.redis.restart().await.unwrap();
    stack.kafka.restart().await.unwrap();
    system.processes.until_ready(&SERVICES).await;
    load.until_accepted(10).await;
    let answered = load.end().await;
    judge.check_with(&mut system, &answered).await;
}

/// How long Kafka is down, instead of minutes. After 20 s every time-out of the relay's transaction
/// and of the connection pool has expired, and the outbox has grown.
const KAFKA_OUTAGE: Duration = Duration::from_secs(20);

/// T12, I1, I3, I4: a registration does not need Kafka.
#[tokio::test(flavor = "multi_thread")]
async fn registrations_succeed_while_kafka_is_down_and_are_published_in_order_later() {
    let mut system = System::empty_on_own_components().await;
    system.processes.start_all().await;
    let judge = system.judge().await;
    let db = system.stores.database(USER).await;
    system.users.register().await; // with retries, because the service has just started
    let load = system.load(2);
    load.until_accepted(5).await;
    system.components().kafka.process.kill();
    let accepted_before = load.accepted();

    // No request waits for Kafka, so no transaction is idle for a second between two statements.
    let idle_transactions = "select count(*) from pg_stat_activity where datname = current_database()
                             and state like 'idle in transaction%' and now() - state_change > interval '1 second'";
    throughout(KAFKA_OUTAGE, "the user service is ready and holds no transaction open", async || {
        let ready = system.processes.admin(USER).is_ready().await == Some(true);
        ready && count(&db, idle_transactions).await == 0
    })
    .await;
    let accepted = load.accepted() - accepted_before;
    assert!(accepted > 20, "only {accepted} registrations were accepted while Kafka was down");
    let rows = count(&db, "select count(*) from outbox").await;
    assert!(rows >= i64::try_from(2 * accepted).unwrap(), "{rows} outbox rows after {accepted} registrations");
    eventually("the metric outbox_rows counts the waiting rows", async || {
        system.processes.metric(USER, "outbox_rows", &[]).await.filter(|rows| *rows >= 2.0 * accepted as f64)
    })
    .await;

    system.components().kafka.restart().await.unwrap();
    let answered = load.end().await;
    let writes = answered.operations.iter().filter(|operation| operation.request != Request::Read);
    let failed: Vec<_> = writes.filter(|operation| !matches!(operation.outcome, Outcome::Done(_))).collect();
    assert!(failed.is_empty(), "writes without success: {failed:?}");
    judge.check_with(&mut system, &answered).await;
}

/// T12: while Kafka is down, a load balancer must keep every replica that can answer. `/status`
/// names Kafka, `/readyz` answers 200. A service without its own store is not ready.
#[tokio::test(flavor = "multi_thread")]
async fn every_service_stays_ready_for_its_own_requests_while_kafka_is_down() {
    let mut system = System::empty_on_own_components().await;
    system.processes.start_all().await;
    let user = system.users.register().await;
    system.users.until_cached(user, 1).await;

    system.components().kafka.process.kill();
    for service in CONSUMERS {
        let waits_for_kafka = async || {
            let (ok, body) = system.processes.status(service).await?;
            (!ok && body.to_string().contains("Kafka to answer")).then_some(())
        };
        eventually(&format!("/status of {} names Kafka", service.name), waits_for_kafka).await;
    }
    assert_eq!(system.users.post(&address(), None).await.unwrap().status, StatusCode::CREATED);
    eventually("/status of user names the relay", async || {
        let (ok, body) = system.processes.status(USER).await?;
        (!ok && body["waiting_for"]["outbox relay"].as_str()?.contains("to publish events")).then_some(())
    })
    .await;
    for service in SERVICES {
        assert_eq!(system.processes.admin(service).is_ready().await, Some(true), "{}", service.name);
    }
    assert_eq!(system.users.cached_version(user).await, Ok(1), "the profile that the cache has");

    system.components().redis.process.kill();
    for (service, ready) in [(CACHE, false), (USER, true)] {
        let what = format!("whether {} is ready without Redis", service.name);
        eventually_eq(&what, Some(ready), async || system.processes.admin(service).is_ready().await).await;
    }
}

/// Writes all records of three new users, and returns the users. The user service cannot do it,
/// because its database is down as well.
async fn write_records_of_new_users(system: &System) -> Vec<Uuid> {
    let users: Vec<Uuid> = (0..3).map(|_| Uuid::now_v7()).collect();
    for id in &users {
        system.kafka.write(USER_EVENTS, &Draft::user_event("user.registered", *id, 1)).await;
        system.kafka.write(USER_STATE, &Draft::user_state(*id, 1, Some(&address()))).await;
        let sent = format!(r#"{{"delivery_id":"{id}","user_id":"{id}","template":"another"}}"#);
        let sent = Draft::envelope("email.sent", *id, 1).with_value(sent.as_bytes());
        system.kafka.write(EMAIL_EVENTS, &sent).await;
    }
    users
}

/// The members and the number of rebalances of each group.
fn members_and_rebalances(system: &System) -> BTreeMap<&'static str, (Vec<String>, usize)> {
    let of = |group| (system.kafka.members(group), system.processes.rebalances(service_of(group)));
    groups().map(|group| (group, of(group))).collect()
}

/// Waits until `/status` lists the dependency of every group of a service.
async fn until_waiting_for_dependency(system: &System, service: Service) {
    let waiting = async || {
        let (ready, body) = system.processes.status(service).await?;
        let waiting_for = body["waiting_for"].as_object()?;
        let mut components = service.groups.iter().map(|group| format!("{} 0 dependency", group.name));
        let all_wait = components.all(|component| waiting_for.contains_key(&component));
        (!ready && all_wait).then_some(())
    };
    eventually(&format!("every consumer of {} waits for its dependency", service.name), waiting).await;
}

async fn retries(system: &System) -> BTreeMap<&'static str, f64> {
    let mut retries = BTreeMap::new();
    for group in groups() {
        retries.insert(group, system.processes.retries(group).await);
    }
    retries
}

/// Whether a registration is answered with 503. Panics if the answer is not a problem document.
async fn registration_gets_503(system: &System) -> bool {
    let answer = system.users.post(&address(), None).await.unwrap();
    assert_eq!(answer.content_type.as_deref(), Some("application/problem+json"), "{answer:?}");
    answer.status == StatusCode::SERVICE_UNAVAILABLE
}

/// `before` is the result of [`members_and_rebalances`] before the outage.
async fn assert_no_rebalance_and_no_dead_letter(
    system: &System,
    before: &BTreeMap<&'static str, (Vec<String>, usize)>,
) {
    assert_eq!(&members_and_rebalances(system), before, "members and number of rebalances of each group");
    for group in groups() {
        assert_eq!(system.kafka.dead_letters(group).len(), 0, "dead letters of {group}");
        assert_eq!(system.processes.counted(group, "dead_lettered").await, 0.0, "dead letters counted by {group}");
    }
}
