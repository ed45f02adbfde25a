//! Dead letters cannot be written. The consumer waits and reports the reason.

use tests::record::Draft;
use tests::services::{ANALYTICS_USERS, DEFAULT_CONSUMERS, USER_EVENTS, dead_letters_of};
use tests::{System, eventually, eventually_eq};
use topology::{ANALYTICS, EMAIL, USER};
use uuid::Uuid;

use super::analytics_with;

/// As the service declares the topic.
const DECLARED: [(&str, &str); 3] =
    [("cleanup.policy", "compact"), ("max.message.bytes", "2097152"), ("message.timestamp.type", "LogAppendTime")];

/// T33, I9 I11: First the topic of the dead letters is deleted, then it accepts no record of that
/// size. Each time the consumer waits at the bad record, reports what it waits for, and resumes by
/// itself once the topic is as it should be.
#[tokio::test(flavor = "multi_thread")]
async fn a_consumer_waits_until_its_dead_letter_can_be_written() {
    let (mut system, _) = analytics_with(&DEFAULT_CONSUMERS).await;
    let topic = dead_letters_of(ANALYTICS_USERS);
    let before = [write_bad_and_good(&system).await, write_bad_and_good(&system).await];
    system.kafka.until_dead_letters(ANALYTICS_USERS, &before).await;
    system.users.until_counted(2, 0).await;
    until_open_letters(&system, 2.0).await;

    system.kafka.delete_topic(&topic).await;
    let second = write_bad_and_good(&system).await;
    assert_waits_at(&system, second).await;
    system.kafka.create_topic(&topic, 1, &DECLARED).await;
    system.processes.until_ready(&[ANALYTICS]).await;
    system.kafka.until_dead_letters(ANALYTICS_USERS, &[second]).await;
    system.users.until_counted(3, 0).await;
    // The first two letters were deleted with their topic.
    until_open_letters(&system, 1.0).await;

    system.kafka.alter_topic(&topic, &[DECLARED[0], ("max.message.bytes", "200"), DECLARED[2]]).await;
    eventually("the topic refuses large records", async || system.kafka.refuses(&topic, 300).await.then_some(())).await;
    let third = write_bad_and_good(&system).await;
    assert_waits_at(&system, third).await;
    system.kafka.alter_topic(&topic, &DECLARED).await;
    system.processes.until_ready(&[ANALYTICS]).await;
    system.kafka.until_dead_letters(ANALYTICS_USERS, &[second, third]).await;
    system.users.until_counted(4, 0).await;
    system.kafka.until_caught_up(ANALYTICS_USERS).await;
    eventually_eq("counted records", 8.0, async || system.processes.counted_in_all(ANALYTICS_USERS).await).await;
    assert_eq!(system.processes.counted(ANALYTICS_USERS, "dead_lettered").await, 4.0);
    assert!(healthcheck_succeeds(&system).await);
    assert!(!system.processes.has_ended(ANALYTICS));
}

/// T33, I11: A service that only consumes starts before it may write to any topic. The broker
/// refuses a producer id, and its producer of dead letters fails for good. When the service may
/// write, it writes its letters, without a restart.
#[tokio::test(flavor = "multi_thread")]
async fn a_consumer_that_may_write_later_writes_its_dead_letters() {
    let mut system = System::empty().await;
    let (kafka, _proxy) = system.own_kafka().await;
    system.processes.start(&[USER, EMAIL, ANALYTICS]).await;
    system.processes.stop(ANALYTICS).await;
    kafka.component.deny_producing().await.unwrap();
    system.processes.start(&[ANALYTICS]).await;
    kafka.component.allow_producing().await.unwrap();

    let bad = write_bad_and_good(&system).await;
    system.kafka.until_dead_letters(ANALYTICS_USERS, &[bad]).await;
    system.users.until_counted(1, 0).await;
}

/// Runs the subcommand `healthcheck`, as a container platform does.
async fn healthcheck_succeeds(system: &System) -> bool {
    system.processes.spawn_subcommand(ANALYTICS, "healthcheck", &[], &[]).wait().await.success()
}

/// Writes a record that cannot be decoded, and a registration after it. Returns partition and
/// offset of the first.
async fn write_bad_and_good(system: &System) -> (i32, i64) {
    let registration = || Draft::user_event("user.registered", Uuid::now_v7(), 1).on(0);
    let bad = registration().with_value(b"?");
    system.kafka.write_all(USER_EVENTS, &[bad, registration()]).await[0]
}

async fn until_open_letters(system: &System, count: f64) {
    let open = async || system.processes.dead_letters_open(ANALYTICS_USERS).await;
    eventually_eq("open dead letters", Some(count), open).await;
}

/// Checks that the consumer waits at the bad record: `/status` names the topic, the metric of
/// retries moves, no offset after the record is committed, and the health check fails.
async fn assert_waits_at(system: &System, (_, offset): (i32, i64)) {
    let topic = system.kafka.prefixed(&dead_letters_of(ANALYTICS_USERS));
    let retries = system.processes.retries(ANALYTICS_USERS).await;
    eventually("/status names the topic that the consumer waits for", async || {
        let (ready, body) = system.processes.status(ANALYTICS).await?;
        let reason = body["waiting_for"][format!("{ANALYTICS_USERS} 0 dependency")].as_str()?.to_owned();
        (!ready && reason.contains(&topic)).then_some(())
    })
    .await;
    eventually("the consumer retries", async || {
        (system.processes.retries(ANALYTICS_USERS).await >= retries + 4.0).then_some(())
    })
    .await;
    let end = offset + 2;
    let lag = vec![format!("{ANALYTICS_USERS} 0: {offset} of {end}")];
    eventually_eq("the committed offset", lag, async || system.kafka.lag(ANALYTICS_USERS)).await;
    assert!(system.processes.log(ANALYTICS).contains("cannot write to the dead letters"));
    assert!(!healthcheck_succeeds(system).await);
}
