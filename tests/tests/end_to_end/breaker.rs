//! The breaker pauses a consumer that rejects too many records, so that a bad deploy does not turn
//! a topic into dead letters. Small settings let few records trip it.

use std::time::Duration;

use sqlx::PgPool;
use tests::record::Draft;
use tests::services::{ANALYTICS_EMAILS, ANALYTICS_USERS, EMAIL_EVENTS, USER_EVENTS};
use tests::{System, eventually, eventually_eq, throughout};
use topology::ANALYTICS;
use uuid::Uuid;

use crate::dead_letters::{add_bug, analytics_with, redrive, remove_bug};

/// One consumer, because each has a breaker of its own.
const SETTINGS: [(&str, &str); 3] = [("BREAKER_WINDOW", "20"), ("BREAKER_MINIMUM", "5"), ("CONSUMERS", "1")];
/// Letters that are written before the breaker opens, if every record is rejected. It opens at the
/// fifth rejection, which gets no letter.
const LETTERS: usize = 4;
/// Several turns of a consumer: enough time to do something wrong.
const OBSERVATION: Duration = Duration::from_secs(2);

/// I9 I11: Every registration is rejected. After four letters the consumer pauses and reports it.
/// It stays in its group and changes nothing, and the service's other group keeps working. SIGUSR1
/// makes it retry. It pauses again while the bug is there. Once the bug is fixed, the subcommand
/// `close-breakers` makes it resume where it paused.
#[tokio::test(flavor = "multi_thread")]
async fn a_bad_deploy_pauses_its_consumer_until_an_operator_resumes_it() {
    let (mut system, db) = broken_analytics().await;
    let members = system.kafka.members(ANALYTICS_USERS);
    let rebalances = system.processes.rebalances(ANALYTICS);
    let first = system.kafka.write_all(USER_EVENTS, &registrations(30, Some(0))).await;
    until_breaker_open(&system).await;
    assert_pause_is_reported(&system).await;

    system.kafka.write_all(USER_EVENTS, &registrations(3, None)).await;
    write_sent_mail(&system).await;
    let applied_mails = async || system.processes.counted(ANALYTICS_EMAILS, "applied").await;
    eventually_eq("records that the other group applied", 1.0, applied_mails).await;
    throughout(OBSERVATION, "letters and committed offsets stay the same", async || {
        only_letters_are_committed(&system, 33, LETTERS)
    })
    .await;
    system.kafka.until_dead_letters(ANALYTICS_USERS, &first[..LETTERS]).await;
    assert_eq!(system.kafka.members(ANALYTICS_USERS), members, "the paused consumer left its group");
    assert_eq!(system.processes.rebalances(ANALYTICS), rebalances, "the pause caused a rebalance");
    eventually("the metric of its lag grows", async || {
        system.processes.group_metric(ANALYTICS_USERS, "consumer_lag").await.filter(|lag| *lag >= 25.0)
    })
    .await;

    system.processes.resume_consumers(ANALYTICS);
    system.kafka.until_dead_letters(ANALYTICS_USERS, &first[..2 * LETTERS]).await;
    until_breaker_open(&system).await;

    remove_bug(&db).await;
    system.processes.run(ANALYTICS, &["close-breakers", "--reason", "the bug is fixed"]).await.unwrap();
    system.processes.until_ready(&[ANALYTICS]).await;
    system.users.until_counted(25, 0).await;
    system.kafka.until_caught_up(ANALYTICS_USERS).await;
    assert_eq!(open_breakers(&system).await, Some(0.0));
    // Each record is counted once, although the batch was tried three times.
    let applied = async || system.processes.counted(ANALYTICS_USERS, "applied").await;
    eventually_eq("applied records", 25.0, applied).await;
    assert_eq!(system.processes.counted(ANALYTICS_USERS, "dead_lettered").await, 8.0);
    assert_eq!(system.processes.counted_in_all(ANALYTICS_USERS).await, 33.0);
    let all_settled = "8 settled, 0 superseded, 0 failed again, 0 parked";
    assert_eq!(redrive(&system, ANALYTICS_USERS, &[]).await, all_settled);
    system.users.until_counted(33, 0).await;
}

/// I9: A restart closes the breaker too. While the bug is there, each restart adds at most four
/// letters, and no unhandled record is committed. Once the bug is fixed, every record takes effect
/// once.
#[tokio::test(flavor = "multi_thread")]
async fn a_restarted_consumer_resumes_where_the_breaker_paused_it() {
    let (mut system, db) = broken_analytics().await;
    system.kafka.write_all(USER_EVENTS, &registrations(30, Some(0))).await;
    for starts in 1..=3 {
        until_breaker_open(&system).await;
        let letters = system.kafka.dead_letters(ANALYTICS_USERS).len();
        assert!((LETTERS..=starts * LETTERS).contains(&letters), "{letters} letters after {starts} starts");
        system.processes.stop(ANALYTICS).await;
        assert!(only_letters_are_committed(&system, 30, letters), "the stopped service committed unhandled records");
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

/// T19, I9: While the breaker is open, partitions move to a second copy and come back. They stay
/// paused until an operator resumes the consumer.
#[tokio::test(flavor = "multi_thread")]
async fn partitions_assigned_while_the_breaker_is_open_stay_paused() {
    let (mut system, db) = broken_analytics().await;
    system.kafka.write_all(USER_EVENTS, &registrations(60, None)).await;
    until_breaker_open(&system).await;
    let mut copy = system.processes.spawn_another(ANALYTICS);
    let admin = copy.admin();
    eventually("the breaker of the second copy is open", async || {
        let (_, body) = admin.status().await?;
        body.to_string().contains(&format!("{ANALYTICS_USERS} 0 breaker")).then_some(())
    })
    .await;
    let rebalances = system.processes.rebalances(ANALYTICS);
    copy.stop().await;
    eventually("the partitions of the copy have come back", async || {
        let is_alone = system.kafka.members(ANALYTICS_USERS).len() == 1;
        (is_alone && system.processes.rebalances(ANALYTICS) > rebalances).then_some(())
    })
    .await;
    let letters = system.kafka.dead_letters(ANALYTICS_USERS).len();
    assert!((LETTERS..=2 * LETTERS).contains(&letters), "{letters} letters of two consumers");
    throughout(OBSERVATION, "letters and committed offsets stay the same", async || {
        only_letters_are_committed(&system, 60, letters)
    })
    .await;
    remove_bug(&db).await;
    system.processes.resume_consumers(ANALYTICS);
    system.processes.until_ready(&[ANALYTICS]).await;
    system.kafka.until_caught_up(ANALYTICS_USERS).await;
    redrive(&system, ANALYTICS_USERS, &[]).await;
    system.users.until_counted(60, 0).await;
    assert_eq!(system.kafka.dead_letters(ANALYTICS_USERS).len(), 0);
}

/// The analytics service with a bug that makes it reject every registration, and no other event.
async fn broken_analytics() -> (System, PgPool) {
    let (system, db) = analytics_with(&SETTINGS).await;
    add_bug(&db, "registrations", "true").await;
    (system, db)
}

fn registrations(count: usize, partition: Option<i32>) -> Vec<Draft> {
    let registration = || Draft { partition, ..Draft::user_event("user.registered", Uuid::now_v7(), 1) };
    (0..count).map(|_| registration()).collect()
}

/// Writes an event for the service's other group.
async fn write_sent_mail(system: &System) {
    let data = format!(r#"{{"delivery_id":"{0}","user_id":"{0}","template":"welcome"}}"#, Uuid::now_v7());
    let event = Draft::envelope("email.sent", Uuid::now_v7(), 1).with_value(data.as_bytes());
    system.kafka.write(EMAIL_EVENTS, &event).await;
}

/// Checks that the log and `/status` report the pause and its reason.
async fn assert_pause_is_reported(system: &System) {
    eventually("the log says that the breaker opened, and why", async || {
        let log = system.processes.log(ANALYTICS);
        let mut opened = log.lines().filter(|line| line.contains("breaker opened"));
        opened.any(|line| line.contains(r#""rejected":5,"of":5"#)).then_some(())
    })
    .await;
    let (ready, body) = system.processes.status(ANALYTICS).await.unwrap();
    let reason = body["waiting_for"][format!("{ANALYTICS_USERS} 0 breaker")].as_str().unwrap_or_default();
    assert!(!ready, "{body}");
    assert!(reason.contains("5 of the last 5"), "{body}");
    assert!(reason.contains("SIGUSR1"), "{body}");
}

/// Whether exactly `letters` of the `records` in the topic have a dead letter, and no other record
/// is committed. Every record is rejected, so none may be committed without a letter.
fn only_letters_are_committed(system: &System, records: i64, letters: usize) -> bool {
    let number = |text: &str| text.trim().parse::<i64>().unwrap_or_else(|_| panic!("not a lag: {text}"));
    let lag = |line: &String| {
        let (_, offsets) = line.rsplit_once(':').unwrap();
        let (committed, end) = offsets.split_once(" of ").unwrap();
        number(end) - number(committed)
    };
    let uncommitted: i64 = system.kafka.lag(ANALYTICS_USERS).iter().map(lag).sum();
    system.kafka.dead_letters(ANALYTICS_USERS).len() == letters && records - uncommitted <= letters as i64
}

/// The number of open breakers, by the metric.
async fn open_breakers(system: &System) -> Option<f64> {
    system.processes.group_metric(ANALYTICS_USERS, "consumer_breaker_open").await
}

async fn until_breaker_open(system: &System) {
    eventually_eq("open breakers", Some(1.0), async || open_breakers(system).await).await;
}
