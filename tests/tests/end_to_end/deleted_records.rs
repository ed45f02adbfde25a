//! Records are deleted before a group has read them. The service cannot restore them, so it exits
//! with an error that reports the loss.

use tests::record::Draft;
use tests::services::{ANALYTICS_USERS, USER_EVENTS};
use tests::{System, eventually, eventually_eq};
use topology::{ANALYTICS, EMAIL, USER};
use uuid::Uuid;

/// Records that fill a batch. A consumer with a full batch polls no further records.
const FULL_BATCH: usize = 500;
const MISSING_OFFSET: &str = "Kafka does not have the offset at which group";

/// T38, T46, I11: Retention passes the group's offset while the service is down. The service exits
/// at each start, and skips nothing.
#[tokio::test(flavor = "multi_thread")]
async fn a_service_exits_with_an_error_if_unread_records_were_deleted() {
    let mut system = analytics_after(&[0]).await;
    write_registrations(&system, 0, 4).await;
    assert_exits_if_deleted(&mut system, 0, 3).await;
}

/// The same for a partition in which the group has seen no record: it has committed offset 0.
#[tokio::test(flavor = "multi_thread")]
async fn a_service_exits_with_an_error_if_the_first_records_of_a_partition_were_deleted() {
    let mut system = analytics_after(&[]).await;
    write_registrations(&system, 0, 4).await;
    assert_exits_if_deleted(&mut system, 0, 3).await;
}

/// The same while the consumer waits for its database with a batch of another partition. So all
/// partitions are paused when Kafka reports the missing offset, unless the report comes before the
/// pause.
#[tokio::test(flavor = "multi_thread")]
async fn a_waiting_service_exits_with_an_error_if_unread_records_were_deleted() {
    let mut system = analytics_after(&[0, 1]).await;
    let committed = system.kafka.committed(ANALYTICS_USERS)[&1];
    write_registrations(&system, 0, FULL_BATCH).await;
    write_registrations(&system, 1, 4).await;
    system.kafka.delete_records(USER_EVENTS, 1, 3).await;
    let mut lock = system.stores.database(ANALYTICS).await.begin().await.unwrap();
    sqlx::raw_sql("lock table inbox, audit in access exclusive mode").execute(&mut *lock).await.unwrap();
    system.processes.spawn(ANALYTICS);
    eventually("the consumer is paused, or the service has exited", async || {
        let paused = system.processes.log(ANALYTICS).contains("consumer paused");
        (paused || system.processes.has_ended(ANALYTICS)).then_some(())
    })
    .await;
    lock.rollback().await.unwrap();
    system.processes.until_ended(ANALYTICS).await;
    assert!(system.processes.log(ANALYTICS).contains(MISSING_OFFSET), "the service did not report the missing offset");
    assert_eq!(system.kafka.committed(ANALYTICS_USERS)[&1], committed, "the group has skipped records");
}

/// T38: A topic is deleted and created again. The group's offsets are those of the old topic, so
/// the service exits until an operator resets them. Then it counts every record of the new topic.
#[tokio::test(flavor = "multi_thread")]
async fn a_service_reads_a_recreated_topic_after_an_operator_resets_the_offsets() {
    let mut system = analytics_after(&[0, 0, 0, 1]).await;
    system.kafka.delete_topic(USER_EVENTS).await;
    let settings = [("cleanup.policy", "delete"), ("retention.ms", "-1")];
    eventually("the topic can be created again", async || {
        system.kafka.try_create_topic(USER_EVENTS, 6, &settings).await.ok()
    })
    .await;
    // Kafka deletes the offsets with the topic, but a member that still runs may commit them again.
    system.kafka.commit(ANALYTICS_USERS, 0, 3);
    write_registrations(&system, 0, 2).await;
    write_registrations(&system, 5, 2).await;
    system.processes.spawn(ANALYTICS);
    system.processes.until_ended(ANALYTICS).await;
    assert!(system.processes.log(ANALYTICS).contains(MISSING_OFFSET), "the service did not report the missing offset");

    system.kafka.commit(ANALYTICS_USERS, 0, 0);
    system.processes.start(&[ANALYTICS]).await;
    eventually_eq("registrations of both topics", Some(4 + 4), async || system.users.registrations().await).await;
    system.kafka.until_caught_up(ANALYTICS_USERS).await;
}

/// A stopped analytics service. It has read one registration for each entry of `partitions`, from
/// that partition, and its group has committed an offset for all six partitions.
async fn analytics_after(partitions: &[i32]) -> System {
    let mut system = System::start_only(&[USER, EMAIL, ANALYTICS]).await;
    for partition in partitions {
        write_registrations(&system, *partition, 1).await;
    }
    let count = partitions.len() as i64;
    eventually_eq("registrations", Some(count), async || system.users.registrations().await).await;
    eventually_eq("partitions with a committed offset", 6, async || system.kafka.committed(ANALYTICS_USERS).len())
        .await;
    system.kafka.until_caught_up(ANALYTICS_USERS).await;
    system.processes.stop(ANALYTICS).await;
    system
}

async fn write_registrations(system: &System, partition: i32, count: usize) {
    let registration = || Draft::user_event("user.registered", Uuid::now_v7(), 1).on(partition);
    let facts: Vec<Draft> = (0..count).map(|_| registration()).collect();
    system.kafka.write_all(USER_EVENTS, &facts).await;
}

/// Deletes the records of a partition before an offset, and starts the service twice.
async fn assert_exits_if_deleted(system: &mut System, partition: i32, before: i64) {
    system.kafka.delete_records(USER_EVENTS, partition, before).await;
    let committed = system.kafka.committed(ANALYTICS_USERS);
    for _ in 0..2 {
        system.processes.spawn(ANALYTICS);
        system.processes.until_ended(ANALYTICS).await;
    }
    // Two groups read the topic. The first one that reports ends the process.
    let reports = system.processes.log(ANALYTICS).matches(MISSING_OFFSET).count();
    assert!((2..=4).contains(&reports), "{reports} reports of the missing offset in two starts");
    assert_eq!(system.kafka.committed(ANALYTICS_USERS), committed, "the group has skipped records");
}
