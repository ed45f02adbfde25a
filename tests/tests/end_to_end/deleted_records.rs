//! Records that are gone before they were read. Nothing in here can bring them back; what matters is that somebody hears of it.

use tests::record::Draft;
use tests::services::{ANALYTICS_USERS, USER_EVENTS};
use tests::{System, eventually, eventually_eq};
use topology::{ANALYTICS, EMAIL, USER};
use uuid::Uuid;

/// With so many in hand a consumer polls no further.
const A_BATCH: usize = 500;
const LOUD: &str = "stands at an offset that Kafka does not have";

/// T38, T46, I11: retention passed the group's offset while nobody read. The consumer stops and says so; it skips nothing, however
/// often it is started.
#[tokio::test(flavor = "multi_thread")]
async fn records_that_were_deleted_before_they_were_read_stop_the_consumer_loudly() {
    let mut system = analytics_after(&[0]).await;
    write(&system, 0, 4).await;
    stops_loudly_when_deleted(&mut system, 0, 3).await;
}

/// The same for a partition in which the group had never seen a record: its offset 0 is an offset too.
#[tokio::test(flavor = "multi_thread")]
async fn the_first_records_of_a_partition_are_missed_as_loudly() {
    let mut system = analytics_after(&[]).await;
    write(&system, 0, 4).await;
    stops_loudly_when_deleted(&mut system, 0, 3).await;
}

/// The same while the consumer waits for its database with a batch of another partition in hand, so that everything is paused
/// when Kafka says that the offset is not there; if Kafka did not say so before.
#[tokio::test(flavor = "multi_thread")]
async fn what_was_deleted_is_missed_as_loudly_by_a_consumer_that_waits() {
    let mut system = analytics_after(&[0, 1]).await;
    let committed = system.kafka.committed(ANALYTICS_USERS)[&1];
    write(&system, 0, A_BATCH).await;
    write(&system, 1, 4).await;
    system.kafka.delete_records(USER_EVENTS, 1, 3).await;
    let mut lock = system.stores.database(ANALYTICS).await.begin().await.unwrap();
    sqlx::raw_sql("lock table inbox in access exclusive mode").execute(&mut *lock).await.unwrap();
    system.processes.spawn(ANALYTICS);
    eventually("analytics waits", async || {
        (system.processes.has_ended(ANALYTICS) || system.processes.log(ANALYTICS).contains("will try again"))
            .then_some(())
    })
    .await;
    lock.rollback().await.unwrap();
    system.processes.until_ended(ANALYTICS).await;
    assert!(system.processes.log(ANALYTICS).contains(LOUD), "it says why");
    assert_eq!(system.kafka.committed(ANALYTICS_USERS)[&1], committed, "nothing is skipped");
}

/// T38: a topic that was deleted and created again. The group's offsets are of the old one, so the consumer stops and says so,
/// until an operator sets them back; then every record of the new topic is counted.
#[tokio::test(flavor = "multi_thread")]
async fn a_topic_that_was_created_anew_is_read_from_its_beginning_when_an_operator_says_so() {
    let mut system = analytics_after(&[0, 0, 0, 1]).await;
    system.kafka.delete_topic(USER_EVENTS).await;
    let policy = [("cleanup.policy", "delete"), ("retention.ms", "-1")];
    eventually("the name is free", async || system.kafka.try_create_topic(USER_EVENTS, 6, &policy).await.ok()).await;
    // Kafka forgets the offsets with the topic, but an old member may commit them once more.
    system.kafka.commit(ANALYTICS_USERS, 0, 3);
    write(&system, 0, 2).await;
    write(&system, 5, 2).await;
    system.processes.spawn(ANALYTICS);
    system.processes.until_ended(ANALYTICS).await;
    assert!(system.processes.log(ANALYTICS).contains(LOUD), "it says why");

    system.kafka.commit(ANALYTICS_USERS, 0, 0);
    system.processes.start(&[ANALYTICS]).await;
    eventually_eq("counted, old and new", Some(4 + 4), async || system.users.registrations().await).await;
    system.kafka.until_caught_up(ANALYTICS_USERS).await;
}

/// A stopped analytics service that has read a fact on each of these partitions, and committed so on all six.
async fn analytics_after(facts: &[i32]) -> System {
    let mut system = System::start_only(&[USER, EMAIL, ANALYTICS]).await;
    for partition in facts {
        write(&system, *partition, 1).await;
    }
    eventually_eq("counted", Some(facts.len() as i64), async || system.users.registrations().await).await;
    eventually_eq("an offset is committed for each partition", 6, async || {
        system.kafka.committed(ANALYTICS_USERS).len()
    })
    .await;
    system.kafka.until_caught_up(ANALYTICS_USERS).await;
    system.processes.stop(ANALYTICS).await;
    system
}

async fn write(system: &System, partition: i32, facts: usize) {
    let facts: Vec<_> =
        (0..facts).map(|_| Draft::user_event("user.registered", Uuid::now_v7(), 1).on(partition)).collect();
    system.kafka.write_all(USER_EVENTS, &facts).await;
}

async fn stops_loudly_when_deleted(system: &mut System, partition: i32, before: i64) {
    system.kafka.delete_records(USER_EVENTS, partition, before).await;
    let committed = system.kafka.committed(ANALYTICS_USERS);
    for _ in 0..2 {
        system.processes.spawn(ANALYTICS);
        system.processes.until_ended(ANALYTICS).await;
    }
    assert_eq!(system.processes.log(ANALYTICS).matches(LOUD).count(), 2, "it says why, each time");
    assert_eq!(system.kafka.committed(ANALYTICS_USERS), committed, "nothing is skipped");
}
