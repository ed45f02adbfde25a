//! A dependency is down for a while. Nothing is given up for it, and nobody else suffers.

use std::collections::BTreeMap;
use std::time::Duration;

use reqwest::StatusCode;
use tests::load::Answered;
use tests::log::{Draft, GROUPS};
use tests::{Part, System, api, eventually, throughout};
use uuid::Uuid;

/// A minute in the fault table, a quarter of an hour in life. It takes 15 s: longer than the session of a consumer that does not
/// poll (10 s) and than the largest pause between two tries (5 s), which are what could go wrong.
const OUTAGE: Duration = Duration::from_secs(15);
const CONSUMERS: [Part; 3] = [Part::Email, Part::Analytics, Part::Cache];

/// T32, I1 I11 I12: Postgres and Valkey are down. Consumers pause and stay in their groups, readiness says why, registrations fail
/// with a problem, nothing becomes a dead letter; when both are back, everything that came meanwhile is there once.
#[tokio::test(flavor = "multi_thread")]
async fn consumers_wait_for_their_dependencies_and_go_on() {
    let mut system = System::empty().await;
    let (mut postgres, mut valkey) = (system.own_postgres().await, system.own_valkey().await);
    system.start_all().await;
    let watch = system.watch().await;
    let before = vec![system.register().await, system.register().await];
    all_there(&system, &before).await;
    let groups = groups(&system);

    postgres.component.process.kill();
    valkey.component.process.kill();
    let meanwhile = records_meanwhile(&system).await;
    for part in CONSUMERS {
        waits_for_its_dependency(&system, part).await;
    }
    let retries = retries(&system).await;
    throughout(OUTAGE, "registrations are refused as they should be", async || refused(&system).await).await;
    for (group, earlier) in retries {
        assert!(system.retries(group).await > earlier, "{group} did not try again");
    }
    still_as_before(&mut system, &groups).await;

    postgres.component.restart().await.unwrap();
    valkey.component.restart().await.unwrap();
    system.ready(&Part::ALL).await;
    let after = vec![system.register().await];
    all_there(&system, &[before, meanwhile, after].concat()).await;
    still_as_before(&mut system, &groups).await;
    system.check(&watch, &Answered::default()).await;
}

/// T13, I1 to I5, I7, I8: Postgres is killed with `kill -9` under load, twice. Its backends die in whatever they were doing. What
/// was accepted is there with its events, and nothing of what was not.
#[tokio::test(flavor = "multi_thread")]
async fn what_postgres_accepted_before_it_was_killed_is_there_and_nothing_else() {
    let mut system = System::empty().await;
    system.set("LEASE_MS", "15000"); // a claim whose answer died with Postgres has to end within this test
    let mut postgres = system.own_postgres().await;
    system.start_all().await;
    let watch = system.watch().await;
    let load = system.load(2);
    for _ in 0..2 {
        load.until_accepted(10).await;
        postgres.component.process.kill();
        postgres.component.restart().await.unwrap();
    }
    load.until_accepted(10).await;
    let answered = load.end().await;
    assert!(answered.refused().is_empty(), "{:?}", answered.refused());
    system.ready(&Part::ALL).await;
    system.check(&watch, &answered).await;
}

/// T13, I1 I3 I5 I7 I8 I9 I12: the machine dies, everything on it at the same moment, and comes back. SIGKILL leaves what the system has of the disk in
/// its memory, so this is about processes; disks are not promised.
#[tokio::test(flavor = "multi_thread")]
async fn a_machine_that_dies_as_a_whole_comes_back_as_a_whole() {
    let mut system = System::empty_on_own_components().await;
    system.set("LEASE_MS", "15000"); // a claim that died with its sender has to end within this test
    system.start_all().await;
    let watch = system.watch().await;
    let load = system.load(2);
    load.until_accepted(10).await;

    for part in Part::ALL {
        system.kill(part);
    }
    let stack = system.stack.as_mut().unwrap();
    stack.kafka.process.kill();
    stack.postgres.process.kill();
    stack.redis.process.kill();
    // The services are up first, and wait for what they need.
    for part in Part::ALL {
        system.spawn(part, &[]);
    }
    for part in Part::ALL {
        let waits = async || system.readiness(part).await.filter(|(ready, _)| !ready);
        eventually(&format!("{part:?} is up and waits"), waits).await;
    }
    let stack = system.stack.as_mut().unwrap();
    stack.postgres.restart().await.unwrap();
    stack.redis.restart().await.unwrap();
    stack.kafka.restart().await.unwrap();
    system.ready(&Part::ALL).await;
    load.until_accepted(10).await;
    let answered = load.end().await;
    system.check(&watch, &answered).await;
}

/// Users whose records arrive during the outage. Their own service is down as well, so they are written by hand.
async fn records_meanwhile(system: &System) -> Vec<Uuid> {
    let users: Vec<Uuid> = (0..3).map(|_| Uuid::now_v7()).collect();
    for id in &users {
        system.write("user.events.v1", &Draft::user_event("user.registered", *id, 1)).await;
        system.write("user.state.v1", &Draft::user_state(*id, 1, Some(&api::address()))).await;
        let mailed = format!(r#"{{"delivery_id":"{id}","user_id":"{id}","template":"another"}}"#);
        let mailed = Draft::envelope("email.sent", *id, 1).valued(mailed.as_bytes());
        system.write("email.events.v1", &mailed).await;
    }
    users
}

/// Members and number of rebalances.
fn groups(system: &System) -> BTreeMap<&'static str, (Vec<String>, usize)> {
    let of = |group| (system.members(group), system.rebalances(tests::consume::part_of(group)));
    GROUPS.iter().map(|(group, _)| (*group, of(group))).collect()
}

async fn waits_for_its_dependency(system: &System, part: Part) {
    let waits = async || {
        let (ready, body) = system.readiness(part).await?;
        let reasons = body["waiting_for"].as_object()?;
        let groups = GROUPS.iter().filter(|(group, _)| tests::consume::part_of(group) == part);
        let all =
            groups.map(|(group, _)| format!("{group} 0 dependency")).all(|waiting| reasons.contains_key(&waiting));
        (!ready && all).then_some(())
    };
    eventually(&format!("{part:?} says what it waits for"), waits).await;
}

async fn retries(system: &System) -> BTreeMap<&'static str, f64> {
    let mut retries = BTreeMap::new();
    for (group, _) in GROUPS {
        retries.insert(group, system.retries(group).await);
    }
    retries
}

/// 503 as a problem, within the time that a client waits.
async fn refused(system: &System) -> bool {
    let answer = system.post_user(&api::address(), None).await.unwrap();
    assert_eq!(answer.content_type.as_deref(), Some("application/problem+json"), "{answer:?}");
    answer.status == StatusCode::SERVICE_UNAVAILABLE
}

async fn still_as_before(system: &mut System, before: &BTreeMap<&'static str, (Vec<String>, usize)>) {
    assert_eq!(&groups(system), before, "members of the groups and numbers of rebalances");
    for (group, _) in GROUPS {
        assert_eq!(system.dead_letters(group).len(), 0, "dead letters of {group}");
        assert_eq!(system.counted(group, "dead_lettered").await, 0.0, "{group}");
    }
}

async fn all_there(system: &System, users: &[Uuid]) {
    for id in users {
        system.until_mailed(*id).await;
        system.until_cached(*id, 1).await;
    }
    system.until_counted(users.len() as i64, users.len() as i64).await;
    system.until_drained().await;
}
