//! The relay is killed at any point of a round.

use tests::record::{Draft, copies};
use tests::services::{ANALYTICS_USERS, EMAIL_WELCOME, USER_EVENTS};
use tests::{System, eventually_eq};
use topology::{ANALYTICS, USER};
use uuid::Uuid;

use crate::outbox::insert_large_versions;

/// T04, T05, I1, I3, I4: wherever the relay is killed under load, no event is lost or published out
/// of order. Some events are published twice, at new offsets, and each takes effect once. Each
/// point is reached twice, in a full run eight times.
#[tokio::test(flavor = "multi_thread")]
async fn a_relay_killed_at_any_point_loses_and_reorders_nothing_and_duplicates_no_effect() {
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
    let answered = load.end().await;
    assert!(answered.refused().is_empty(), "{:?}", answered.refused());
    let history = judge.check_with(&mut system, &answered).await;
    assert!(copies(&history.facts) > 0, "a crash between commit and delete must publish rows twice");
    let duplicates = system.processes.metric(ANALYTICS, "events_consumed_total", &["outcome=\"duplicate\""]).await;
    assert!(duplicates.is_some_and(|count| count > 0.0), "analytics must receive the copies: {duplicates:?}");
}

/// T04, I3, I4: a backlog waits, so the relay deletes the rows of one round and reads those of
/// another while it publishes a third. Wherever it is killed, no event is lost or published out of
/// order.
#[tokio::test(flavor = "multi_thread")]
async fn a_relay_killed_while_its_rounds_overlap_loses_and_reorders_nothing() {
    const ROWS: i64 = 16;
    let mut system = System::start_only(&[USER]).await;
    let judge = system.judge().await;
    let db = system.stores.database(USER).await;
    system.processes.stop(USER).await;
    let points = [
        ("after_read_ahead", 1),
        ("after_read_ahead", 2),
        ("after_enqueue", 2),
        ("after_ack", 2),
        ("after_commit", 2),
        ("after_delete", 1),
        ("after_delete", 2),
    ];
    for (point, nth) in points {
        insert_large_versions(&db, Uuid::now_v7(), 1..=ROWS).await;
        system.processes.spawn_with(USER, &[("FAULT_AT", &format!("relay.{point}:{nth}:kill"))]);
        system.processes.until_ended(USER).await;
    }
    system.processes.start(&[USER]).await;
    let history = judge.check(&mut system).await;
    assert!(copies(&history.facts) > 0, "a crash between commit and delete must publish rows twice");
}

/// I2: a relay dies in a round and Kafka aborts its transaction. No consumer reads its records.
#[tokio::test(flavor = "multi_thread")]
async fn records_of_an_aborted_round_are_not_read() {
    let system = System::start().await;
    let fact = || Draft::user_event("user.registered", Uuid::now_v7(), 1).on(0);
    system.kafka.write_aborted(USER_EVENTS, &fact()).await;
    system.kafka.write(USER_EVENTS, &fact()).await;
    system.users.until_counted(1, 0).await;
    for group in [ANALYTICS_USERS, EMAIL_WELCOME] {
        system.kafka.until_caught_up(group).await;
        let counted = async || system.processes.counted_in_all(group).await;
        eventually_eq(&format!("records that {group} has read"), 1.0, counted).await;
    }
}
