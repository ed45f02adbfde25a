//! The breaker: a bad deploy does not turn a topic into dead letters. Its rules are small here, so that few records trip it.

use std::time::Duration;

use sqlx::PgPool;
use tests::record::Draft;
use tests::services::{ANALYTICS_EMAILS, ANALYTICS_USERS, EMAIL_EVENTS, USER_EVENTS};
use tests::{System, eventually, eventually_eq, throughout};
use topology::ANALYTICS;
use uuid::Uuid;

use crate::dead_letters::{add_bug, analytics_with, redrive, remove_bug};

/// The fifth rejection trips it, if nothing else came: four letters.
const RULES: [(&str, &str); 2] = [("BREAKER_WINDOW", "20"), ("BREAKER_MINIMUM", "5")];
const LETTERS: usize = 4;
/// Some turns of the consumer, in which it could do what it must not.
const A_WHILE: Duration = Duration::from_secs(2);

/// I9 I11: everything is rejected. After a few letters the consumer pauses and says so; nothing moves, the group keeps it, and the
/// other group goes on. SIGUSR1 lets it try again: with the bug still there it stops again, without it goes on where it stood.
#[tokio::test(flavor = "multi_thread")]
async fn a_bad_deploy_stops_a_consumer_until_it_is_told_to_go_on() {
    let (mut system, db) = broken_analytics().await;
    let group = (system.kafka.members(ANALYTICS_USERS), system.processes.rebalances(ANALYTICS));
    let at = system.kafka.write_all(USER_EVENTS, &registrations(30, Some(0))).await;
    until_open(&system).await;
    eventually("it is logged", async || {
        let log = system.processes.log(ANALYTICS);
        log.contains("the breaker is open: paused, since 5 of the last 5 records").then_some(())
    })
    .await;
    let (ready, body) = system.processes.readiness(ANALYTICS).await.unwrap();
    let reason = body["waiting_for"][format!("{ANALYTICS_USERS} 0 breaker")].as_str().unwrap_or_default();
    assert!(!ready && reason.contains("5 of the last 5") && reason.contains("SIGUSR1"), "{body}");

    system.kafka.write_all(USER_EVENTS, &registrations(3, None)).await;
    let mailed = format!(r#"{{"delivery_id":"{0}","user_id":"{0}","template":"welcome"}}"#, Uuid::now_v7());
    let mailed = Draft::envelope("email.sent", Uuid::now_v7(), 1).with_value(mailed.as_bytes());
    system.kafka.write(EMAIL_EVENTS, &mailed).await;
    eventually_eq("the other group goes on", 1.0, async || system.processes.counted(ANALYTICS_EMAILS, "applied").await)
        .await;
    throughout(A_WHILE, "nothing moves", async || stands(&system, 33, LETTERS)).await;
    system.kafka.until_dead_letters(ANALYTICS_USERS, &at[..LETTERS]).await;
    assert_eq!((system.kafka.members(ANALYTICS_USERS), system.processes.rebalances(ANALYTICS)), group);
    let lag =
        async || system.processes.metric(ANALYTICS, "consumer_lag", &[&format!("group=\"{ANALYTICS_USERS}\"")]).await;
    eventually("its lag is seen to grow", async || lag().await.filter(|lag| *lag >= 25.0)).await;

    system.processes.resume_consumers(ANALYTICS);
    system.kafka.until_dead_letters(ANALYTICS_USERS, &at[..2 * LETTERS]).await;
    until_open(&system).await;

    remove_bug(&db).await;
    system.processes.resume_consumers(ANALYTICS);
    system.processes.until_ready(&[ANALYTICS]).await;
    system.users.until_counted(25, 0).await;
    system.kafka.until_caught_up(ANALYTICS_USERS).await;
    assert_eq!(open(&system).await, Some(0.0));
    // Each once, though the batch was tried three times.
    eventually_eq("applied", 25.0, async || system.processes.counted(ANALYTICS_USERS, "applied").await).await;
    assert_eq!(
        (
            system.processes.counted(ANALYTICS_USERS, "dead_lettered").await,
            system.processes.counted_in_all(ANALYTICS_USERS).await
        ),
        (8.0, 33.0)
    );
    let settled = "8 settled, 0 superseded, 0 failed again, 0 parked";
    assert_eq!(redrive(&system, ANALYTICS_USERS, &[]).await, settled);
    system.users.until_counted(33, 0).await;
}

/// I9: a restart is the other way to go on. While the bug is there each one adds a few letters at most and what was not handled is
/// not committed; without the bug nothing is lost and nothing is done twice.
#[tokio::test(flavor = "multi_thread")]
async fn a_restart_goes_on_where_the_breaker_stopped() {
    let (mut system, db) = broken_analytics().await;
    system.kafka.write_all(USER_EVENTS, &registrations(30, Some(0))).await;
    for starts in 1..=3 {
        until_open(&system).await;
        let letters = system.kafka.dead_letters(ANALYTICS_USERS).len();
        assert!((LETTERS..=starts * LETTERS).contains(&letters), "{letters} letters after {starts} starts");
        system.processes.stop(ANALYTICS).await;
        assert!(stands(&system, 30, letters), "stopped, it committed what was not handled");
        if starts == 3 {
            remove_bug(&db).await;
        }
        system.processes.spawn(ANALYTICS);
    }
    system.processes.until_ready(&[ANALYTICS]).await;
    system.kafka.until_caught_up(ANALYTICS_USERS).await;
    redrive(&system, ANALYTICS_USERS, &[]).await;
    system.users.until_counted(30, 0).await;
    assert_eq!(system.kafka.dead_letters(ANALYTICS_USERS).len(), 0);
}

/// T19, I9: partitions go to a second copy and come back while the breaker is open. They stay as they are until somebody says so.
#[tokio::test(flavor = "multi_thread")]
async fn partitions_assigned_while_it_is_open_wait_as_well() {
    let (mut system, db) = broken_analytics().await;
    system.kafka.write_all(USER_EVENTS, &registrations(60, None)).await;
    until_open(&system).await;
    let mut another = system.processes.spawn_another(ANALYTICS);
    let admin = another.admin();
    eventually("the second copy stops as well", async || {
        let (_, body) = admin.readiness().await?;
        body.to_string().contains(&format!("{ANALYTICS_USERS} 0 breaker")).then_some(())
    })
    .await;
    let before = system.processes.rebalances(ANALYTICS);
    another.stop().await;
    let members =
        async || (system.kafka.members(ANALYTICS_USERS).len(), system.processes.rebalances(ANALYTICS) > before);
    eventually_eq("its partitions have come back", (1, true), members).await;
    let letters = system.kafka.dead_letters(ANALYTICS_USERS).len();
    assert!((LETTERS..=2 * LETTERS).contains(&letters), "{letters} letters of two consumers");
    throughout(A_WHILE, "nothing moves", async || stands(&system, 60, letters)).await;
    remove_bug(&db).await;
    system.processes.resume_consumers(ANALYTICS);
    system.processes.until_ready(&[ANALYTICS]).await;
    system.kafka.until_caught_up(ANALYTICS_USERS).await;
    redrive(&system, ANALYTICS_USERS, &[]).await;
    system.users.until_counted(60, 0).await;
    assert_eq!(system.kafka.dead_letters(ANALYTICS_USERS).len(), 0);
}

/// Analytics with a bug that meets every registration, and only those.
async fn broken_analytics() -> (System, PgPool) {
    let (system, db) = analytics_with(&RULES).await;
    add_bug(&db, "registrations", "true").await;
    (system, db)
}

fn registrations(count: usize, partition: Option<i32>) -> Vec<Draft> {
    let registered = || Draft { partition, ..Draft::user_event("user.registered", Uuid::now_v7(), 1) };
    (0..count).map(|_| registered()).collect()
}

/// Of so many records so many have letters, no more; and none is committed without one, since all are rejected.
fn stands(system: &System, records: i64, letters: usize) -> bool {
    let number = |text: &str| text.trim().parse::<i64>().unwrap_or_else(|_| panic!("not a lag: {text}"));
    let behind = |line: &String| {
        let (_, offsets) = line.rsplit_once(':').unwrap();
        let (committed, end) = offsets.split_once(" of ").unwrap();
        number(end) - number(committed)
    };
    let uncommitted: i64 = system.kafka.lag(ANALYTICS_USERS).iter().map(behind).sum();
    system.kafka.dead_letters(ANALYTICS_USERS).len() == letters && records - uncommitted <= letters as i64
}

async fn open(system: &System) -> Option<f64> {
    system.processes.metric(ANALYTICS, "consumer_breaker_open", &[&format!("group=\"{ANALYTICS_USERS}\"")]).await
}

async fn until_open(system: &System) {
    eventually_eq("the breaker is open", Some(1.0), async || open(system).await).await;
}
