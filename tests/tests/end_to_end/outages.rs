//! A dependency is down for a while. Nothing is lost or dead-lettered, and no other service is affected.

use std::collections::BTreeMap;
use std::time::Duration;

use reqwest::StatusCode;
use tests::checker::{Asked, Outcome};
use tests::record::Draft;
use tests::services::{CONSUMERS, EMAIL_EVENTS, USER_EVENTS, USER_STATE, groups, service_of};
use tests::stores::count;
use tests::users::address;
use tests::{System, eventually, throughout};
use topology::{SERVICES, Service, USER};
use uuid::Uuid;

/// A minute in the fault table, a quarter of an hour in life. It takes 15 s: longer than the session of a consumer that does not
/// poll (10 s) and than the largest pause between two tries (5 s), which are what could go wrong.
const OUTAGE: Duration = Duration::from_secs(15);

/// T32, I1 I11 I12: Postgres and Valkey are down. Consumers pause and stay in their groups, readiness says why, registrations fail
/// with a problem, nothing becomes a dead letter; when both are back, everything that came meanwhile is there once.
#[tokio::test(flavor = "multi_thread")]
async fn consumers_wait_for_their_dependencies_and_go_on() {
    let mut system = System::empty().await;
    let mut postgres = system.own_postgres().await;
    let mut valkey = system.own_valkey().await;
    system.processes.start_all().await;
    let judge = system.judge().await;
    let before = vec![system.users.register().await, system.users.register().await];
    all_there(&system, &before).await;
    let groups = members_and_rebalances(&system);

    postgres.component.process.kill();
    valkey.component.process.kill();
    let meanwhile = records_meanwhile(&system).await;
    for service in CONSUMERS {
        waits_for_its_dependency(&system, service).await;
    }
    let retries = retries(&system).await;
    throughout(OUTAGE, "registrations are refused as they should be", async || refused(&system).await).await;
    for (group, earlier) in retries {
        assert!(system.processes.retries(group).await > earlier, "{group} did not try again");
    }
    still_as_before(&mut system, &groups).await;

    postgres.component.restart().await.unwrap();
    valkey.component.restart().await.unwrap();
    system.processes.until_ready(&SERVICES).await;
    let after = vec![system.users.register().await];
    all_there(&system, &[before, meanwhile, after].concat()).await;
    still_as_before(&mut system, &groups).await;
    judge.check(&mut system).await;
}

/// T13, I1 to I5, I7, I8: Postgres is killed with `kill -9` under load, twice. Its backends die in whatever they were doing. What
/// was accepted is there with its events, and nothing of what was not.
#[tokio::test(flavor = "multi_thread")]
async fn what_postgres_accepted_before_it_was_killed_is_there_and_nothing_else() {
    let mut system = System::empty().await;
    system.processes.set("LEASE_MS", "15000"); // a claim whose answer died with Postgres has to end within this test
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
    let answers = load.end().await;
    assert!(answers.refused().is_empty(), "{:?}", answers.refused());
    system.processes.until_ready(&SERVICES).await;
    judge.check_with(&mut system, &answers).await;
}

/// T13, I1 I3 I5 I7 I8 I9 I12: the machine dies, everything on it at the same moment, and comes back. SIGKILL leaves what the system has of the disk in
/// its memory, so this is about processes; disks are not promised.
#[tokio::test(flavor = "multi_thread")]
async fn a_machine_that_dies_as_a_whole_comes_back_as_a_whole() {
    let mut system = System::empty_on_own_components().await;
    system.processes.set("LEASE_MS", "15000"); // a claim that died with its sender has to end within this test
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
    // The services are up first, and wait for what they need.
    for service in SERVICES {
        system.processes.spawn(service);
    }
    for service in SERVICES {
        let waits = async || system.processes.readiness(service).await.filter(|(ready, _)| !ready);
        eventually(&format!("{} is up and waits", service.name), waits).await;
    }
    let stack = system.components();
    stack.postgres.restart().await.unwrap();
    stack.redis.restart().await.unwrap();
    stack.kafka.restart().await.unwrap();
    system.processes.until_ready(&SERVICES).await;
    load.until_accepted(10).await;
    let answers = load.end().await;
    judge.check_with(&mut system, &answers).await;
}

/// How long Kafka is away in the test below.
const KAFKA_OUTAGE: Duration = Duration::from_secs(20);

/// T12, I1, I3, I4: registering does not need Kafka. The outage takes 20 s instead of minutes: by then every time-out of the
/// relay's transaction and of the pool has passed, and what grows has grown.
#[tokio::test(flavor = "multi_thread")]
async fn while_kafka_is_away_registrations_are_accepted_and_afterwards_everything_drains_in_order() {
    let mut system = System::empty_on_own_components().await;
    system.processes.start_all().await;
    let judge = system.judge().await;
    let db = system.stores.database(USER).await;
    system.users.register().await; // with the patience that a service needs which has only just started
    let load = system.load(2);
    load.until_accepted(5).await;
    system.components().kafka.process.kill();
    let before = load.accepted();

    // A request waits for no Kafka, so no transaction does: none rests for a second between two statements.
    let resting = "select count(*) from pg_stat_activity where datname = current_database()
                   and state like 'idle in transaction%' and now() - state_change > interval '1 second'";
    throughout(KAFKA_OUTAGE, "no transaction is held open, and the service is ready", async || {
        let ready = system.processes.readiness(USER).await.is_some_and(|(ready, _)| ready);
        ready && count(&db, resting).await == 0
    })
    .await;
    let during = load.accepted() - before;
    assert!(during > 20, "the load went on: {during} registrations");
    let waiting = count(&db, "select count(*) from outbox").await;
    assert!(waiting >= i64::try_from(2 * during).unwrap(), "{waiting} rows wait after {during} registrations");
    eventually("the metric tells of them", async || {
        system.processes.metric(USER, "outbox_rows", &[]).await.filter(|rows| *rows >= 2.0 * during as f64)
    })
    .await;

    system.components().kafka.restart().await.unwrap();
    let answers = load.end().await;
    let all = answers.operations.iter().filter(|operation| operation.asked != Asked::Read);
    let failed: Vec<_> = all.filter(|operation| !matches!(operation.outcome, Outcome::Done(_))).collect();
    assert!(failed.is_empty(), "every write was answered with success: {failed:?}");
    judge.check_with(&mut system, &answers).await;
}

/// Users whose records arrive during the outage. Their own service is down as well, so they are written by hand.
async fn records_meanwhile(system: &System) -> Vec<Uuid> {
    let users: Vec<Uuid> = (0..3).map(|_| Uuid::now_v7()).collect();
    for id in &users {
        system.kafka.write(USER_EVENTS, &Draft::user_event("user.registered", *id, 1)).await;
        system.kafka.write(USER_STATE, &Draft::user_state(*id, 1, Some(&address()))).await;
        let mailed = format!(r#"{{"delivery_id":"{id}","user_id":"{id}","template":"another"}}"#);
        let mailed = Draft::envelope("email.sent", *id, 1).with_value(mailed.as_bytes());
        system.kafka.write(EMAIL_EVENTS, &mailed).await;
    }
    users
}

/// Members and number of rebalances of each group.
fn members_and_rebalances(system: &System) -> BTreeMap<&'static str, (Vec<String>, usize)> {
    let of = |group| (system.kafka.members(group), system.processes.rebalances(service_of(group)));
    groups().map(|group| (group, of(group))).collect()
}

async fn waits_for_its_dependency(system: &System, service: Service) {
    let waits = async || {
        let (ready, body) = system.processes.readiness(service).await?;
        let reasons = body["waiting_for"].as_object()?;
        let mut waiting = service.groups.iter().map(|group| format!("{} 0 dependency", group.name));
        let all = waiting.all(|waiting| reasons.contains_key(&waiting));
        (!ready && all).then_some(())
    };
    eventually(&format!("{} says what it waits for", service.name), waits).await;
}

async fn retries(system: &System) -> BTreeMap<&'static str, f64> {
    let mut retries = BTreeMap::new();
    for group in groups() {
        retries.insert(group, system.processes.retries(group).await);
    }
    retries
}

/// 503 as a problem, within the time that a client waits.
async fn refused(system: &System) -> bool {
    let answer = system.users.post(&address(), None).await.unwrap();
    assert_eq!(answer.content_type.as_deref(), Some("application/problem+json"), "{answer:?}");
    answer.status == StatusCode::SERVICE_UNAVAILABLE
}

async fn still_as_before(system: &mut System, before: &BTreeMap<&'static str, (Vec<String>, usize)>) {
    assert_eq!(&members_and_rebalances(system), before, "members of the groups and numbers of rebalances");
    for group in groups() {
        assert_eq!(system.kafka.dead_letters(group).len(), 0, "dead letters of {group}");
        assert_eq!(system.processes.counted(group, "dead_lettered").await, 0.0, "{group}");
    }
}

async fn all_there(system: &System, users: &[Uuid]) {
    for id in users {
        system.users.until_mailed(*id).await;
        system.users.until_cached(*id, 1).await;
    }
    system.users.until_counted(users.len() as i64, users.len() as i64).await;
    system.until_drained().await;
}
