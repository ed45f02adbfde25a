//! The relay is killed at any point of a round.

use tests::record::{Draft, copies};
use tests::services::{ANALYTICS_USERS, EMAIL_WELCOME, USER_EVENTS};
use tests::{System, eventually_eq};
use topology::{ANALYTICS, USER};
use uuid::Uuid;

/// T04, T05, I1, I3, I4: wherever the relay is killed, under load, no event is lost and none comes out of order; and though some
/// were published twice, at new offsets, each has its effects once. Twice per point, and in a full run eight times.
#[tokio::test(flavor = "multi_thread")]
async fn a_relay_killed_at_any_point_loses_nothing_reorders_nothing_and_doubles_no_effect() {
    let mut system = System::start().await;
    let judge = system.judge().await;
    let load = system.load(2);
    for point in ["after_read", "after_enqueue", "after_ack", "after_commit", "after_delete"] {
        for nth in tests::repeats(&[1, 4], &[1, 2, 3, 4, 5, 6, 7, 8]) {
            system.processes.spawn_with(USER, &[("FAULT_AT", &format!("relay.{point}:{nth}:kill"))]);
            system.processes.until_ended(USER).await;
        }
    }
    system.processes.start(&[USER]).await;
    load.until_accepted(10).await;
    let answers = load.end().await;
    assert!(answers.refused().is_empty(), "{:?}", answers.refused());
    let history = judge.check_with(&mut system, &answers).await;
    assert!(copies(&history.facts) > 0, "a crash between commit and delete publishes twice");
    let duplicates = system.processes.metric(ANALYTICS, "events_consumed_total", &["outcome=\"duplicate\""]).await;
    assert!(duplicates.is_some_and(|count| count > 0.0), "the copies have reached analytics: {duplicates:?}");
}

/// I2: what a relay has sent in a round that it did not commit was never published: nobody reads it.
#[tokio::test(flavor = "multi_thread")]
async fn what_was_sent_and_not_committed_is_not_read() {
    let system = System::start().await;
    let fact = || Draft::user_event("user.registered", Uuid::now_v7(), 1).on(0);
    system.kafka.write_aborted(USER_EVENTS, &fact()).await;
    system.kafka.write(USER_EVENTS, &fact()).await;
    system.users.until_counted(1, 0).await;
    for group in [ANALYTICS_USERS, EMAIL_WELCOME] {
        system.kafka.until_caught_up(group).await;
        eventually_eq("records that were read", 1.0, async || system.processes.counted_in_all(group).await).await;
    }
}
