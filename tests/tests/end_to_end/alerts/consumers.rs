//! Consumers that handle nothing, or less than they should.

use tests::System;
use tests::alerts::SCRAPES;
use tests::record::Draft;
use tests::services::{ANALYTICS_EMAILS, ANALYTICS_USERS, CACHE_PROFILES, EMAIL_EVENTS, USER_EVENTS, USER_STATE};
use tests::users::address;
use topology::{ANALYTICS, CACHE, EMAIL, SERVICES};
use uuid::Uuid;

use super::{record, until, until_at_least};
use crate::dead_letters::{add_bug, redrive, remove_bug};

/// The partition of `user.state.v1` with a record that fails, that with an open transaction, and
/// the partition of `user.events.v1` with an event of an unknown type.
const FAILING: i32 = 0;
const OPEN: i32 = 3;
const UNKNOWN: i32 = 5;
/// Records that are written to the blocked partition at once, several times. Above the lag from
/// which the alert looks at growth.
const GROWTH: usize = 150;

/// I12: each group has another fault. The handler of analytics.users has a bug, so its breaker
/// opens after some dead letters, and it has skipped an event. analytics.emails may not read its
/// topic. The group of the cache has a record that fails each time, so its lag grows, and another
/// program holds up one of its partitions.
#[tokio::test(flavor = "multi_thread")]
async fn consumers_that_do_not_consume() {
    let mut system = System::empty().await;
    let (kafka, _proxy) = system.own_kafka().await;
    let limits = [("BREAKER_WINDOW", "20"), ("BREAKER_MINIMUM", "5")];
    system.processes.set_own(ANALYTICS, &limits.map(|(name, value)| (name, value.to_owned())));
    system.processes.start_all().await;
    let user = system.users.register().await;
    system.until_applied(&[user]).await;
    let Some(mut recording) = record(&system, &SERVICES).await else { return };
    recording.scrapes(SCRAPES).await;
    recording.fault_begins();

    system.kafka.write(USER_EVENTS, &Draft::user_event("user.promoted", user, 2).on(UNKNOWN)).await;
    let skipped = [&*format!("group=\"{ANALYTICS_USERS}\""), "outcome=\"skipped\""];
    until(&system, ANALYTICS, "events_consumed_total", &skipped, 1.0).await;
    let held_up = system.kafka.leave_transaction_open(USER_STATE, &state().on(OPEN)).await;
    let failing = Uuid::now_v7();
    let profile = system.kafka.prefixed(&format!("profile:{failing}"));
    let mut valkey = system.stores.valkey().await;
    let () = redis::cmd("SET").arg(&profile).arg("not a hash").query_async(&mut valkey).await.unwrap();
    system.kafka.write(USER_STATE, &Draft::user_state(failing, 1, Some("ada@example.com")).on(FAILING)).await;
    let db = system.stores.database(ANALYTICS).await;
    add_bug(&db, "registrations", "true").await;
    let registrations: Vec<Draft> =
        (0..30).map(|_| Draft::user_event("user.registered", Uuid::now_v7(), 1).on(FAILING)).collect();
    system.kafka.write_all(USER_EVENTS, &registrations).await;
    let mails = system.kafka.prefixed(EMAIL_EVENTS);
    kafka.component.deny_reading(&mails).await.unwrap();

    until_shown(&system).await;
    recording.fault_shows();
    for _ in 0..2 * SCRAPES {
        let states: Vec<Draft> = (0..GROWTH).map(|_| state().on(FAILING)).collect();
        system.kafka.write_all(USER_STATE, &states).await;
        recording.scrapes(1).await;
    }
    recording.fault_ends();

    kafka.component.allow_reading(&mails).await.unwrap();
    held_up.abort();
    let () = redis::cmd("DEL").arg(&profile).query_async(&mut valkey).await.unwrap();
    remove_bug(&db).await;
    system.processes.resume_consumers(ANALYTICS);
    for service in [EMAIL, ANALYTICS, CACHE] {
        system.processes.until_nothing_reported(service).await;
        for group in service.groups {
            until(&system, service, "consumer_lag", &[&format!("group=\"{}\"", group.name)], 0.0).await;
        }
    }
    redrive(&system, ANALYTICS_USERS, &[]).await;
    until(&system, ANALYTICS, "dead_letters_open", &[&format!("group=\"{ANALYTICS_USERS}\"")], 0.0).await;
    recording.scrapes(SCRAPES).await;
    recording.check(&[
        "BreakerOpen",
        "ConsumerLagGrows",
        "ConsumerReadsNothing",
        "ConsumerRefused",
        "DeadLetters",
        "EventsSkipped",
        "OpenTransaction",
        "RecordBlocksPartition",
        "ServiceWaits",
    ]);
}

/// Waits until the metrics show all faults but the growth of the lag.
async fn until_shown(system: &System) {
    let users = &*format!("group=\"{ANALYTICS_USERS}\"");
    let profiles = &*format!("group=\"{CACHE_PROFILES}\"");
    let emails = &*format!("group=\"{ANALYTICS_EMAILS}\"");
    until(system, ANALYTICS, "consumer_breaker_open", &[users], 1.0).await;
    until(system, ANALYTICS, "dead_letters_open", &[users], 4.0).await;
    until_at_least(system, ANALYTICS, "consumer_refusals_total", &[emails], 1.0).await;
    until(system, ANALYTICS, "consumer_partition_waits", &[emails, "not_read"], 6.0).await;
    until(system, CACHE, "consumer_partition_waits", &[profiles, "failing_record"], 1.0).await;
    until(system, CACHE, "consumer_partition_waits", &[profiles, "open_transaction"], 1.0).await;
}

/// The state of a new user.
fn state() -> Draft {
    Draft::user_state(Uuid::now_v7(), 1, Some(&address()))
}
