//! Services start in any order, and consumer groups may be added later.

use crate::effects::assert_effects_once;
use tests::services::{CONSUMERS, USER_EVENTS};
use tests::{System, eventually, eventually_eq};
use topology::{ANALYTICS, CACHE, EMAIL, SERVICES, Service, USER};

/// All 24 orders of starting the services work, also on a broker and in databases where nothing is yet. This is one half of them.
#[tokio::test(flavor = "multi_thread")]
async fn services_may_be_started_in_any_order() {
    starting_from_each([USER, EMAIL, ANALYTICS, CACHE]).await;
    starting_from_each([USER, EMAIL, CACHE, ANALYTICS]).await;
    starting_from_each([USER, ANALYTICS, EMAIL, CACHE]).await;
}

/// The other half.
#[tokio::test(flavor = "multi_thread")]
async fn services_may_be_started_in_any_other_order() {
    starting_from_each([USER, ANALYTICS, CACHE, EMAIL]).await;
    starting_from_each([USER, CACHE, EMAIL, ANALYTICS]).await;
    starting_from_each([USER, CACHE, ANALYTICS, EMAIL]).await;
}

async fn starting_from_each(mut order: [Service; 4]) {
    for _ in 0..order.len() {
        let mut system = System::empty().await;
        for service in order {
            system.processes.spawn(service);
            // Not ready, only up: what it needs may be missing still.
            eventually(&format!("{} is up", service.name), async || system.processes.readiness(service).await).await;
        }
        system.processes.until_ready(&SERVICES).await;
        let users = system.users.register_many(1).await;
        assert_effects_once(&system, &users).await;
        order.rotate_left(1);
    }
}

/// I5 I7 I8: consumer groups that come later read the history from its beginning, and the producer does not notice.
#[tokio::test(flavor = "multi_thread")]
async fn a_group_that_is_added_later_reads_history_from_the_beginning() {
    let mut system = System::start_only(&[USER]).await;
    let producer = system.processes.pid(USER);
    let mut users = system.users.register_many(8).await;
    for version in 2..=3 {
        assert_eq!(system.users.rename(users[0], &format!("Name {version}")).await.unwrap().version(), version);
    }
    // Published, not only accepted: what comes now was in the log before its readers were there.
    eventually_eq("the facts in the log", 10, async || system.kafka.read(USER_EVENTS).len()).await;
    system.processes.start(&CONSUMERS).await;
    users.extend(system.users.register_many(1).await);
    assert_effects_once(&system, &users).await;
    assert_eq!(system.users.until_cached(users[0], 3).await.body["display_name"], "Name 3");
    assert_eq!(system.processes.pid(USER), producer);
    assert!(!system.processes.has_ended(USER));
}
