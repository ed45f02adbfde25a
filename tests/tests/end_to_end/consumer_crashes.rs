//! Consumers are killed and frozen at any point. Each effect happens once.

use std::collections::BTreeMap;

use crate::effects::assert_effects_once;
use tests::services::CONSUMERS;
use tests::users::address;
use tests::{System, eventually_eq};
use topology::{ANALYTICS, CACHE, EMAIL, SERVICES, Service, USER};
use uuid::Uuid;

/// T16, I5 I7 I8 I9: Killed with a polled batch, before any effect. A consumer that committed
/// before the effect would lose it.
#[tokio::test(flavor = "multi_thread")]
async fn consumers_killed_before_they_handle_a_batch_lose_nothing() {
    let point = "consumer.after_poll";
    kill_consumers_and_judge([(EMAIL, point), (ANALYTICS, point), (CACHE, point)]).await;
}

/// T16, I5 I7 I8 I9: Killed inside the effect, just before it is durable.
#[tokio::test(flavor = "multi_thread")]
async fn consumers_killed_before_their_effect_is_durable_lose_nothing() {
    let points = [(EMAIL, "email.before_commit"), (ANALYTICS, "inbox.before_commit"), (CACHE, "cache.before_script")];
    kill_consumers_and_judge(points).await;
}

/// T16, I5 I7 I8: Killed just after the effect became durable. The cache has written its first
/// partition and not the others. The batch comes again.
#[tokio::test(flavor = "multi_thread")]
async fn consumers_killed_after_their_effect_is_durable_do_nothing_twice() {
    let points = [(EMAIL, "consumer.after_effect"), (ANALYTICS, "inbox.after_commit"), (CACHE, "cache.after_script")];
    kill_consumers_and_judge(points).await;
}

/// T16, I5 I7 I8: Killed after the effect, before the offset is stored.
#[tokio::test(flavor = "multi_thread")]
async fn consumers_killed_before_they_store_the_offset_do_nothing_twice() {
    let point = "consumer.after_effect";
    kill_consumers_and_judge([(EMAIL, point), (ANALYTICS, point), (CACHE, point)]).await;
}

/// T16, I5 I7 I8: Killed after the offset was stored in the client, before it is committed in
/// Kafka.
#[tokio::test(flavor = "multi_thread")]
async fn consumers_killed_before_the_offset_is_committed_do_nothing_twice() {
    let point = "consumer.after_store";
    kill_consumers_and_judge([(EMAIL, point), (ANALYTICS, point), (CACHE, point)]).await;
}

/// Kills all three consumers at their points, at the first records that they get. Users register
/// and change while no consumer runs. Then the consumers are started again, and the run is judged.
/// The three are killed together, because Kafka removes a killed member only after ten seconds.
async fn kill_consumers_and_judge(points: [(Service, &str); 3]) {
    let mut system = System::empty().await;
    // A sender may be killed in the middle of a mail. Its lease must end within this test.
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

/// I1 I5 I7 I8: Each service is killed in turn. The others keep working. After its restart it
/// handles what happened while it was down.
#[tokio::test(flavor = "multi_thread")]
async fn a_killed_service_stops_no_other_and_catches_up() {
    let mut system = System::start().await;
    let judge = system.judge().await;
    let mut users = system.users.register_many(1).await;
    for killed in SERVICES {
        assert_effects_once(&system, &users).await;
        system.processes.kill(killed);
        if killed != USER {
            users.extend(system.users.register_many(1).await);
        }
        until_others_have(&system, killed, &users).await;
        system.processes.start(&[killed]).await;
    }
    users.extend(system.users.register_many(1).await);
    assert_effects_once(&system, &users).await;
    judge.check(&mut system).await;
}

/// Waits until the services that run have the effects of these registrations.
async fn until_others_have(system: &System, killed: Service, users: &[Uuid]) {
    for id in users {
        if killed != CACHE {
            system.users.until_cached(*id, 1).await;
        }
        if killed != EMAIL {
            system.users.until_mailed(*id).await;
        }
    }
    if killed != ANALYTICS {
        let count = users.len() as i64;
        eventually_eq("registered users in the funnel", count, async || system.users.funnel().await.0).await;
    }
}

/// T45, I5, I7, I9: Consumers are frozen inside their transactions, where they hold rows and
/// partitions. Kafka gives the partitions to copies after 10 s, and Postgres ends the transactions
/// after 5 s. What the frozen consumers write after they resume is rolled back.
#[tokio::test(flavor = "multi_thread")]
async fn consumers_frozen_inside_a_transaction_are_replaced_and_do_nothing_twice() {
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

    let mut email_copy = system.processes.spawn_another(EMAIL);
    let mut analytics_copy = system.processes.spawn_another(ANALYTICS);
    email_copy.until_ready().await;
    analytics_copy.until_ready().await;
    let at_copy = system.users.at(&analytics_copy);
    eventually_eq("the funnel of the copy", (5, 5), async || at_copy.funnel().await).await;

    system.processes.thaw(EMAIL);
    system.processes.thaw(ANALYTICS);
    addresses.extend((0..5).map(|_| address()));
    for email in &addresses[5..] {
        system.users.register_as(email).await;
    }
    system.processes.until_ready(&[EMAIL, ANALYTICS]).await;
    eventually_eq("the funnel after the first processes resumed", (10, 10), async || system.users.funnel().await).await;
    judge.check(&mut system).await;
    let one_each: BTreeMap<String, usize> = addresses.into_iter().map(|address| (address, 1)).collect();
    assert_eq!(mails_per_address(&system), one_each);
}

fn mails_per_address(system: &System) -> BTreeMap<String, usize> {
    let mut mails = BTreeMap::new();
    for mail in system.mail.all() {
        *mails.entry(mail.to.join(",")).or_default() += 1;
    }
    mails
}
