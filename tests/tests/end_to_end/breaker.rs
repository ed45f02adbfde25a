//! The breaker: a bad deploy does not turn a topic into dead letters. Its rules are small here, so that few records trip it.

use std::time::Duration;

use sqlx::PgPool;
use tests::log::Draft;
use tests::{Part, System, eventually, eventually_eq, throughout};
use uuid::Uuid;

use crate::dead_letters::{analytics_with, break_for, mend, redriven};

const USERS: &str = "analytics.users";
const EMAILS: &str = "analytics.emails";
const TOPIC: &str = "user.events.v1";
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
    let group = (system.members(USERS), system.rebalances(Part::Analytics));
    let at = system.write_all(TOPIC, &registrations(30, Some(0))).await;
    until_open(&system).await;
    eventually("it is logged", async || {
        let log = system.log_of(Part::Analytics);
        log.contains("the breaker is open: paused, since 5 of the last 5 records").then_some(())
    })
    .await;
    let (ready, body) = system.readiness(Part::Analytics).await.unwrap();
    let reason = body["waiting_for"][format!("{USERS} 0 breaker")].as_str().unwrap_or_default();
    assert!(!ready && reason.contains("5 of the last 5") && reason.contains("SIGUSR1"), "{body}");

    system.write_all(TOPIC, &registrations(3, None)).await;
    let mailed = format!(r#"{{"delivery_id":"{0}","user_id":"{0}","template":"welcome"}}"#, Uuid::now_v7());
    let mailed = Draft::envelope("email.sent", Uuid::now_v7(), 1).valued(mailed.as_bytes());
    system.write("email.events.v1", &mailed).await;
    eventually_eq("the other group goes on", 1.0, async || system.counted(EMAILS, "applied").await).await;
    throughout(A_WHILE, "nothing moves", async || stands(&system, 33, LETTERS)).await;
    system.until_open_letters(USERS, &at[..LETTERS]).await;
    assert_eq!((system.members(USERS), system.rebalances(Part::Analytics)), group);
    let lag = async || system.metric(Part::Analytics, "consumer_lag", &[&format!("group=\"{USERS}\"")]).await;
    eventually("its lag is seen to grow", async || lag().await.filter(|lag| *lag >= 25.0)).await;

    system.resume(Part::Analytics);
    system.until_open_letters(USERS, &at[..2 * LETTERS]).await;
    until_open(&system).await;

    mend(&db).await;
    system.resume(Part::Analytics);
    system.ready(&[Part::Analytics]).await;
    system.until_counted(25, 0).await;
    eventually_eq("the group has caught up", vec![], async || system.lag_of(USERS, TOPIC)).await;
    assert_eq!(open(&system).await, Some(0.0));
    // Each once, though the batch was tried three times.
    eventually_eq("applied", 25.0, async || system.counted(USERS, "applied").await).await;
    assert_eq!((system.counted(USERS, "dead_lettered").await, system.counted_in_all(USERS).await), (8.0, 33.0));
    let settled = "8 settled, 0 superseded, 0 failed again, 0 parked";
    assert_eq!(redriven(&system, Part::Analytics, USERS, &[]).await, settled);
    system.until_counted(33, 0).await;
}

/// I9: a restart is the other way to go on. While the bug is there each one adds a few letters at most and what was not handled is
/// not committed; without the bug nothing is lost and nothing is done twice.
#[tokio::test(flavor = "multi_thread")]
async fn a_restart_goes_on_where_the_breaker_stopped() {
    let (mut system, db) = broken_analytics().await;
    system.write_all(TOPIC, &registrations(30, Some(0))).await;
    for starts in 1..=3 {
        until_open(&system).await;
        let letters = system.dead_letters(USERS).len();
        assert!((LETTERS..=starts * LETTERS).contains(&letters), "{letters} letters after {starts} starts");
        system.stop(Part::Analytics).await;
        assert!(stands(&system, 30, letters), "stopped, it committed what was not handled");
        if starts == 3 {
            mend(&db).await;
        }
        system.spawn(Part::Analytics, &[]);
    }
    system.ready(&[Part::Analytics]).await;
    eventually_eq("the group has caught up", vec![], async || system.lag_of(USERS, TOPIC)).await;
    redriven(&system, Part::Analytics, USERS, &[]).await;
    system.until_counted(30, 0).await;
    assert_eq!(system.dead_letters(USERS).len(), 0);
}

/// T19, I9: partitions go to a second copy and come back while the breaker is open. They stay as they are until somebody says so.
#[tokio::test(flavor = "multi_thread")]
async fn partitions_assigned_while_it_is_open_wait_as_well() {
    let (mut system, db) = broken_analytics().await;
    system.write_all(TOPIC, &registrations(60, None)).await;
    until_open(&system).await;
    let mut another = system.spawn_another(Part::Analytics, &[]);
    let readyz = format!("{}/readyz", another.instance.admin_url());
    eventually("the second copy stops as well", async || {
        let page = reqwest::get(&readyz).await.ok()?.text().await.ok()?;
        page.contains(&format!("{USERS} 0 breaker")).then_some(())
    })
    .await;
    let before = system.rebalances(Part::Analytics);
    another.stop().await;
    let members = async || (system.members(USERS).len(), system.rebalances(Part::Analytics) > before);
    eventually_eq("its partitions have come back", (1, true), members).await;
    let letters = system.dead_letters(USERS).len();
    assert!((LETTERS..=2 * LETTERS).contains(&letters), "{letters} letters of two consumers");
    throughout(A_WHILE, "nothing moves", async || stands(&system, 60, letters)).await;
    mend(&db).await;
    system.resume(Part::Analytics);
    system.ready(&[Part::Analytics]).await;
    eventually_eq("the group has caught up", vec![], async || system.lag_of(USERS, TOPIC)).await;
    redriven(&system, Part::Analytics, USERS, &[]).await;
    system.until_counted(60, 0).await;
    assert_eq!(system.dead_letters(USERS).len(), 0);
}

/// Analytics with a bug that meets every registration, and only those.
async fn broken_analytics() -> (System, PgPool) {
    let (system, db) = analytics_with(&RULES).await;
    break_for(&db, "registrations", "true").await;
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
    let uncommitted: i64 = system.lag_of(USERS, TOPIC).iter().map(behind).sum();
    system.dead_letters(USERS).len() == letters && records - uncommitted <= letters as i64
}

async fn open(system: &System) -> Option<f64> {
    system.metric(Part::Analytics, "consumer_breaker_open", &[&format!("group=\"{USERS}\"")]).await
}

async fn until_open(system: &System) {
    eventually_eq("the breaker is open", Some(1.0), async || open(system).await).await;
}
