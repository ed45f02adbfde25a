//! Consumers are killed and frozen at any point: each effect is there once.

use std::collections::BTreeMap;

use crate::effects::assert_effects_once;
use tests::services::CONSUMERS;
use tests::users::address;
use tests::{System, eventually_eq};
use topology::{ANALYTICS, CACHE, EMAIL, SERVICES, Service, USER};
use uuid::Uuid;

/// T16, I5 I7 I8 I9: killed with a batch in hand and nothing done. A consumer that committed before its effect would lose it.
#[tokio::test(flavor = "multi_thread")]
async fn nothing_is_lost_when_consumers_die_with_a_batch_in_hand() {
    let point = "consumer.after_poll";
    killed_at([(EMAIL, point), (ANALYTICS, point), (CACHE, point)]).await;
}

/// T16, I5 I7 I8 I9: killed within the effect, just before it becomes durable.
#[tokio::test(flavor = "multi_thread")]
async fn nothing_is_lost_when_consumers_die_before_their_effect_is_durable() {
    let points = [(EMAIL, "email.before_commit"), (ANALYTICS, "inbox.before_commit"), (CACHE, "cache.before_script")];
    killed_at(points).await;
}

/// T16, I5 I7 I8: killed just after the effect became durable (the cache: after its first partition, the others undone). The
/// batch comes again.
#[tokio::test(flavor = "multi_thread")]
async fn nothing_is_done_twice_when_consumers_die_after_their_effect_is_durable() {
    let points = [(EMAIL, "consumer.after_effect"), (ANALYTICS, "inbox.after_commit"), (CACHE, "cache.after_script")];
    killed_at(points).await;
}

/// T16, I5 I7 I8: killed between the effect and the offset.
#[tokio::test(flavor = "multi_thread")]
async fn nothing_is_done_twice_when_consumers_die_before_they_store_the_offset() {
    let point = "consumer.after_effect";
    killed_at([(EMAIL, point), (ANALYTICS, point), (CACHE, point)]).await;
}

/// T16, I5 I7 I8: killed with the offset stored and not yet committed in Kafka.
#[tokio::test(flavor = "multi_thread")]
async fn nothing_is_done_twice_when_consumers_die_before_the_offset_is_committed() {
    let point = "consumer.after_store";
    killed_at([(EMAIL, point), (ANALYTICS, point), (CACHE, point)]).await;
}

/// All three consumers die at their point, at the first records they get; work goes on meanwhile; then they are started again.
/// A killed member keeps its partitions until Kafka gives it up after ten seconds, so the three die together.
async fn killed_at(points: [(Service, &str); 3]) {
    let mut system = System::empty().await;
    // A sender may be killed in the middle of a mail: its lease must end within this test.
    system.processes.set("LEASE_MS", "10000");
    system.processes.start_all().await;
    let judge = system.judge().await;
    for service in CONSUMERS {
        system.processes.stop(service).await;
    }
    let user = system.users.register_many(6).await[0];
    for (service, point) in points {
        system.processes.spawn_with(service, &[("FAULT_AT", &format!("{point}:1:kill"))]);
    }
    for (service, _) in points {
        system.processes.until_ended(service).await;
    }
    system.users.register_many(2).await;
    assert_eq!(system.users.rename(user, "Countess of Lovelace").await.unwrap().version(), 2);
    system.processes.start(&CONSUMERS).await;
    system.users.register_many(2).await;
    judge.check(&mut system).await;
}

/// I1 I5 I7 I8: a service that dies takes no other with it, and finds everything when it is back.
#[tokio::test(flavor = "multi_thread")]
async fn a_service_that_is_killed_alone_hinders_nobody_and_catches_up() {
    let mut system = System::start().await;
    let judge = system.judge().await;
    let mut users = system.users.register_many(1).await;
    for dead in SERVICES {
        assert_effects_once(&system, &users).await;
        system.processes.kill(dead);
        users.extend(the_others_go_on(&system, dead, &users).await);
        system.processes.start(&[dead]).await;
    }
    users.extend(system.users.register_many(1).await);
    assert_effects_once(&system, &users).await;
    judge.check(&mut system).await;
}

/// Registers somebody, if the service that does so lives; whoever else lives has seen it.
async fn the_others_go_on(system: &System, dead: Service, users: &[Uuid]) -> Vec<Uuid> {
    let fresh = if dead == USER { vec![] } else { system.users.register_many(1).await };
    let known = users.len() + fresh.len();
    for id in users.iter().chain(&fresh) {
        if dead != CACHE {
            system.users.until_cached(*id, 1).await;
        }
        if dead != EMAIL {
            system.users.until_mailed(*id).await;
        }
    }
    if dead != ANALYTICS {
        eventually_eq("registered", known as i64, async || system.users.funnel().await.0).await;
    }
    fresh
}

/// T45, I5, I7, I9: consumers that are frozen inside their transaction hold rows and partitions. Kafka takes the partitions away
/// after 10 s, Postgres ends the transactions after 5 s, and copies go on. What the first ones do when they wake up is undone.
#[tokio::test(flavor = "multi_thread")]
async fn consumers_frozen_inside_their_transaction_are_replaced_and_double_nothing() {
    let mut system = System::empty().await;
    system.processes.spawn(USER);
    system.processes.spawn_with(EMAIL, &[("FAULT_AT", "email.before_commit:1:stop")]);
    system.processes.spawn_with(ANALYTICS, &[("FAULT_AT", "inbox.before_commit:1:stop")]);
    system.processes.until_ready(&[USER, EMAIL, ANALYTICS]).await;
    let judge = system.judge().await;
    let mut addresses: Vec<String> = (0..5).map(|_| address()).collect();
    for email in &addresses {
        system.users.register_as(email).await;
    }
    system.processes.until_frozen(EMAIL).await;
    system.processes.until_frozen(ANALYTICS).await;

    let mut email = system.processes.spawn_another(EMAIL);
    let mut analytics = system.processes.spawn_another(ANALYTICS);
    email.until_ready().await;
    analytics.until_ready().await;
    let at_copy = system.users.at(&analytics);
    eventually_eq("the copies have done all the work", (5, 5), async || at_copy.funnel().await).await;

    system.processes.thaw(EMAIL);
    system.processes.thaw(ANALYTICS);
    addresses.extend((0..5).map(|_| address()));
    for email in &addresses[5..] {
        system.users.register_as(email).await;
    }
    system.processes.until_ready(&[EMAIL, ANALYTICS]).await;
    eventually_eq("the old and the new work together", (10, 10), async || system.users.funnel().await).await;
    judge.check(&mut system).await;
    let once: BTreeMap<String, usize> = addresses.into_iter().map(|address| (address, 1)).collect();
    assert_eq!(sent(&system).await, once, "one mail each");
}

/// Who has how many mails.
async fn sent(system: &System) -> BTreeMap<String, usize> {
    let mut mails = BTreeMap::new();
    for mail in system.mail.all() {
        *mails.entry(mail.to.join(",")).or_default() += 1;
    }
    mails
}
