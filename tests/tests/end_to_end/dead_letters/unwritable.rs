//! The dead letters cannot be written: nothing moves on, and it is said why.

use tests::record::Draft;
use tests::services::{ANALYTICS_USERS, USER_EVENTS, dead_letters_of};
use tests::{System, eventually, eventually_eq};
use topology::ANALYTICS;
use uuid::Uuid;

use super::analytics;

const COMPACTED: (&str, &str) = ("cleanup.policy", "compact");

/// T33, I9 I11: somebody deleted the topic of the dead letters, then the topic takes no record of that size. Each time the consumer
/// waits at the bad record, says for what, and goes on by itself when the topic is as it should be.
#[tokio::test(flavor = "multi_thread")]
async fn a_letter_that_cannot_be_written_holds_the_consumer_until_it_can() {
    let (mut system, _) = analytics().await;
    let letters = dead_letters_of(ANALYTICS_USERS);
    let first = [write_bad_and_good(&system).await, write_bad_and_good(&system).await];
    system.kafka.until_dead_letters(ANALYTICS_USERS, &first).await;
    system.users.until_counted(2, 0).await;
    eventually_eq("letters open", Some(2.0), async || system.processes.dead_letters_open(ANALYTICS_USERS).await).await;

    system.kafka.delete_topic(&letters).await;
    let second = write_bad_and_good(&system).await;
    until_it_waits_at_the_letter(&system, second).await;
    system.kafka.create_topic(&letters, 1, &[COMPACTED]).await;
    system.processes.until_ready(&[ANALYTICS]).await;
    system.kafka.until_dead_letters(ANALYTICS_USERS, &[second]).await;
    system.users.until_counted(3, 0).await;
    // The first two went with their topic.
    eventually_eq("letters open", Some(1.0), async || system.processes.dead_letters_open(ANALYTICS_USERS).await).await;

    system.kafka.alter_topic(&letters, &[COMPACTED, ("max.message.bytes", "200")]).await;
    eventually("the limit holds", async || system.kafka.refuses(&letters, 300).await.then_some(())).await;
    let third = write_bad_and_good(&system).await;
    until_it_waits_at_the_letter(&system, third).await;
    system.kafka.alter_topic(&letters, &[COMPACTED]).await;
    system.processes.until_ready(&[ANALYTICS]).await;
    system.kafka.until_dead_letters(ANALYTICS_USERS, &[second, third]).await;
    system.users.until_counted(4, 0).await;
    system.kafka.until_caught_up(ANALYTICS_USERS).await;
    eventually_eq("each once", 8.0, async || system.processes.counted_in_all(ANALYTICS_USERS).await).await;
    assert_eq!(system.processes.counted(ANALYTICS_USERS, "dead_lettered").await, 4.0);
    assert!(is_healthy(&system).await);
    assert!(!system.processes.has_ended(ANALYTICS));
}

/// What a container platform asks.
async fn is_healthy(system: &System) -> bool {
    let address = system.processes.admin(ANALYTICS).url("").replace("http://", "");
    system.processes.spawn_subcommand(ANALYTICS, "healthcheck", &[], &[("ADMIN_ADDR", &address)]).wait().await.success()
}

/// A record that nobody can read, with a registration behind it; where the first is.
async fn write_bad_and_good(system: &System) -> (i32, i64) {
    let registered = || Draft::user_event("user.registered", Uuid::now_v7(), 1).on(0);
    system.kafka.write_all(USER_EVENTS, &[registered().with_value(b"?"), registered()]).await[0]
}

/// The committed offset stands at the bad record or before it, readiness names the topic, and the metric of retries moves.
async fn until_it_waits_at_the_letter(system: &System, (_, offset): (i32, i64)) {
    let before = system.processes.retries(ANALYTICS_USERS).await;
    eventually("it says what it waits for", async || {
        let (ready, body) = system.processes.readiness(ANALYTICS).await?;
        let reason = body["waiting_for"][format!("{ANALYTICS_USERS} 0 dependency")].as_str()?.to_owned();
        (!ready && reason.contains(&system.kafka.prefixed(&dead_letters_of(ANALYTICS_USERS)))).then_some(())
    })
    .await;
    eventually("it tries again", async || {
        (system.processes.retries(ANALYTICS_USERS).await >= before + 4.0).then_some(())
    })
    .await;
    let end = offset + 2;
    eventually_eq("the committed offset", vec![format!("{ANALYTICS_USERS} 0: {offset} of {end}")], async || {
        system.kafka.lag(ANALYTICS_USERS)
    })
    .await;
    assert!(system.processes.log(ANALYTICS).contains("cannot write to the dead letters"));
    assert!(!is_healthy(system).await);
}
