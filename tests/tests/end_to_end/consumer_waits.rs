//! A consumer that gets no records reports why: Kafka refuses its requests, or another program has
//! left a transaction open. Its process stays ready, because it has nothing to do itself.

use tests::record::Draft;
use tests::services::{ANALYTICS_AUDIT, ANALYTICS_USERS, DEFAULT_CONSUMERS, USER_EVENTS};
use tests::{System, eventually, eventually_eq};
use topology::{ANALYTICS, EMAIL, USER};
use uuid::Uuid;

/// How many lines of the analytics service's log contain both texts.
fn logged(system: &System, text: &str, group: &str) -> usize {
    let log = system.processes.log(ANALYTICS);
    log.lines().filter(|line| line.contains(text) && line.contains(&format!("\"{group}\""))).count()
}

/// T52, I12: a topic must not be read any more, first while the service runs, then when it starts.
/// It says so once with Kafka's code, and stays ready. When reading is allowed, it continues.
#[tokio::test(flavor = "multi_thread")]
async fn a_consumer_that_may_not_read_its_topic_reports_it() {
    let mut system = System::empty().await;
    let (kafka, _) = system.own_kafka().await;
    system.processes.set_all(&DEFAULT_CONSUMERS);
    system.processes.start(&[USER, EMAIL, ANALYTICS]).await;
    system.users.register().await;
    system.users.until_counted(1, 1).await;
    let topic = system.kafka.prefixed(USER_EVENTS);

    for (round, users) in [(1, 2), (2, 3)] {
        if round == 1 {
            kafka.component.deny_reading(&topic).await.unwrap();
        } else {
            // The process that runs would report the refusal too.
            system.processes.stop(ANALYTICS).await;
            kafka.component.deny_reading(&topic).await.unwrap();
            system.processes.spawn(ANALYTICS);
        }
        system.users.register().await;
        let refused = [ANALYTICS_AUDIT, ANALYTICS_USERS].map(|group| format!("{group} 0 refused"));
        system.processes.until_reported_by(ANALYTICS, "TopicAuthorizationFailed", &refused).await;
        eventually_eq("partitions that are not read", 6, async || {
            system.processes.waiting_partitions(ANALYTICS_USERS, "not_read").await
        })
        .await;
        assert_eq!(system.processes.admin(ANALYTICS).is_ready().await, Some(true), "/readyz");
        let labels = ["code=\"TopicAuthorizationFailed\"", &*format!("group=\"{ANALYTICS_USERS}\"")];
        let refusals = system.processes.metric(ANALYTICS, "consumer_refusals_total", &labels).await;
        assert!(refusals.is_some_and(|count| count >= 1.0), "{refusals:?}");
        assert_eq!(logged(&system, "Kafka refuses a request of the consumer", ANALYTICS_USERS), round);

        kafka.component.allow_reading(&topic).await.unwrap();
        system.users.until_counted(users, users).await;
        system.processes.until_nothing_reported(ANALYTICS).await;
        assert_eq!(system.processes.waiting_partitions(ANALYTICS_USERS, "not_read").await, 0);
    }
}

/// T53, I12: another program leaves a transaction open on a partition. No later record can be read.
/// The lag counts them, and the report names the partition. When the transaction ends, the records
/// take effect.
#[tokio::test(flavor = "multi_thread")]
async fn a_partition_that_an_open_transaction_holds_up_is_reported() {
    const PARTITION: i32 = 3;
    let system = System::start_with(&[USER, EMAIL, ANALYTICS], &DEFAULT_CONSUMERS).await;
    let registration = || Draft::user_event("user.registered", Uuid::now_v7(), 1).on(PARTITION);
    system.kafka.write(USER_EVENTS, &registration()).await;
    system.users.until_counted(1, 0).await;

    let transaction = system.kafka.leave_transaction_open(USER_EVENTS, &registration()).await;
    system.kafka.write(USER_EVENTS, &registration()).await;
    let labels = [&*format!("group=\"{ANALYTICS_USERS}\""), "partition=\"3\""];
    let lag = async || system.processes.metric(ANALYTICS, "consumer_lag", &labels).await;
    eventually_eq("the lag, which counts the records of the open transaction", Some(2.0), lag).await;
    let held_up = [ANALYTICS_AUDIT, ANALYTICS_USERS].map(|group| format!("{group} 0 partition 3 open_transaction"));
    system.processes.until_reported_by(ANALYTICS, "begins at offset 1", &held_up).await;
    assert_eq!(system.processes.waiting_partitions(ANALYTICS_USERS, "open_transaction").await, 1);
    assert_eq!(logged(&system, "the records of a partition wait", ANALYTICS_USERS), 1);
    assert_eq!(system.processes.admin(ANALYTICS).is_ready().await, Some(true), "/readyz");
    assert_eq!(system.users.funnel().await, (1, 0), "a record after the open transaction was read");

    transaction.commit();
    system.users.until_counted(3, 0).await;
    eventually_eq("the lag", Some(0.0), lag).await;
    system.processes.until_nothing_reported(ANALYTICS).await;
    eventually("the metric is removed", async || {
        (system.processes.waiting_partitions(ANALYTICS_USERS, "open_transaction").await == 0).then_some(())
    })
    .await;
}
