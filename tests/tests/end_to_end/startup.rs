//! Services start in any order, and consumer groups may be added later.

use tests::services::{CONSUMERS, USER_EVENTS};
use tests::{System, eventually, eventually_eq};
use topology::{ANALYTICS, CACHE, EMAIL, Service, USER};

use crate::effects::assert_effects_once;

/// The services can be started in all 24 orders, on a broker without topics and on empty databases.
/// This test tries one half of the orders.
#[tokio::test(flavor = "multi_thread")]
async fn services_start_in_any_order() {
    start_in_rotated_orders([USER, EMAIL, ANALYTICS, CACHE]).await;
    start_in_rotated_orders([USER, EMAIL, CACHE, ANALYTICS]).await;
    start_in_rotated_orders([USER, ANALYTICS, EMAIL, CACHE]).await;
}

/// The other half of the orders.
#[tokio::test(flavor = "multi_thread")]
async fn services_start_in_any_other_order() {
    start_in_rotated_orders([USER, ANALYTICS, CACHE, EMAIL]).await;
    start_in_rotated_orders([USER, CACHE, EMAIL, ANALYTICS]).await;
    start_in_rotated_orders([USER, CACHE, ANALYTICS, EMAIL]).await;
}

/// Starts the services in this order and its three rotations, each time on a new system.
async fn start_in_rotated_orders(mut order: [Service; 4]) {
    for _ in 0..order.len() {
        let mut system = System::empty().await;
        for service in order {
            system.processes.spawn(service);
            // It answers, but it need not be ready: a service that it needs may start later.
            let readiness = async || system.processes.status(service).await;
            eventually(&format!("{} answers /status", service.name), readiness).await;
        }
        system.processes.until_ready(&order).await;
        let users = system.users.register_many(1).await;
        assert_effects_once(&system, &users).await;
        order.rotate_left(1);
    }
}

/// I5, I7, I8: consumer groups that are added later read the history from the beginning. The user
/// service is not restarted.
#[tokio::test(flavor = "multi_thread")]
async fn a_group_that_is_added_later_reads_the_history_from_the_beginning() {
    let mut system = System::start_only(&[USER]).await;
    let producer = system.processes.pid(USER);
    let mut users = system.users.register_many(8).await;
    for version in 2..=3 {
        assert_eq!(system.users.rename(users[0], &format!("Name {version}")).await.unwrap().version(), version);
    }
    // The consumers must find these facts in the log, so the facts are published before they start.
    eventually_eq("facts in the log", 10, async || system.kafka.read(USER_EVENTS).len()).await;
    system.processes.start(&CONSUMERS).await;
    users.extend(system.users.register_many(1).await);
    assert_effects_once(&system, &users).await;
    assert_eq!(system.users.until_cached(users[0], 3).await.body["display_name"], "Name 3");
    assert_eq!(system.processes.pid(USER), producer);
    assert!(!system.processes.has_ended(USER), "the user service must keep running");
}
