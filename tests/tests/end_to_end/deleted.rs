//! Records that are gone before they were read. Nothing in here can bring them back; what matters is that somebody hears of it.

use tests::log::Draft;
use tests::{Part, System, eventually, eventually_eq};
use uuid::Uuid;

const GROUP: &str = "analytics.users";
const TOPIC: &str = "user.events.v1";
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
    let committed = system.committed(GROUP, TOPIC)[&1];
    write(&system, 0, A_BATCH).await;
    write(&system, 1, 4).await;
    system.delete_records(TOPIC, 1, 3).await;
    let mut lock = system.database(Part::Analytics).await.begin().await.unwrap();
    sqlx::raw_sql("lock table inbox in access exclusive mode").execute(&mut *lock).await.unwrap();
    system.spawn(Part::Analytics, &[]);
    eventually("analytics waits", async || {
        (system.has_ended(Part::Analytics) || system.log_of(Part::Analytics).contains("will try again")).then_some(())
    })
    .await;
    lock.rollback().await.unwrap();
    system.until_ended(Part::Analytics).await;
    assert!(system.log_of(Part::Analytics).contains(LOUD), "it says why");
    assert_eq!(system.committed(GROUP, TOPIC)[&1], committed, "nothing is skipped");
}

/// T38: a topic that was deleted and created again. The group's offsets are of the old one, so the consumer stops and says so,
/// until an operator sets them back; then every record of the new topic is counted.
#[tokio::test(flavor = "multi_thread")]
async fn a_topic_that_was_created_anew_is_read_from_its_beginning_when_an_operator_says_so() {
    let mut system = analytics_after(&[0, 0, 0, 1]).await;
    system.delete_topic(TOPIC).await;
    let policy = [("cleanup.policy", "delete"), ("retention.ms", "-1")];
    eventually("the name is free", async || system.try_create_topic(TOPIC, 6, &policy).await.ok()).await;
    // Kafka forgets the offsets with the topic, but an old member may commit them once more.
    system.commit(GROUP, TOPIC, 0, 3);
    write(&system, 0, 2).await;
    write(&system, 5, 2).await;
    system.spawn(Part::Analytics, &[]);
    system.until_ended(Part::Analytics).await;
    assert!(system.log_of(Part::Analytics).contains(LOUD), "it says why");

    system.commit(GROUP, TOPIC, 0, 0);
    system.restart(Part::Analytics, &[]).await;
    eventually_eq("counted, old and new", Some(4 + 4), async || system.registrations().await).await;
    system.until_read(GROUP, TOPIC).await;
}

/// A stopped analytics service that has read a fact on each of these partitions, and committed so on all six.
async fn analytics_after(facts: &[i32]) -> System {
    let mut system = System::empty().await;
    for part in [Part::User, Part::Email, Part::Analytics] {
        system.spawn(part, &[]);
    }
    system.ready(&[Part::User, Part::Email, Part::Analytics]).await;
    for partition in facts {
        write(&system, *partition, 1).await;
    }
    eventually_eq("counted", Some(facts.len() as i64), async || system.registrations().await).await;
    eventually_eq("an offset is committed for each partition", 6, async || system.committed(GROUP, TOPIC).len()).await;
    system.until_read(GROUP, TOPIC).await;
    system.stop(Part::Analytics).await;
    system
}

async fn write(system: &System, partition: i32, facts: usize) {
    let facts: Vec<_> =
        (0..facts).map(|_| Draft::user_event("user.registered", Uuid::now_v7(), 1).on(partition)).collect();
    system.write_all(TOPIC, &facts).await;
}

async fn stops_loudly_when_deleted(system: &mut System, partition: i32, before: i64) {
    system.delete_records(TOPIC, partition, before).await;
    let committed = system.committed(GROUP, TOPIC);
    for _ in 0..2 {
        system.spawn(Part::Analytics, &[]);
        system.until_ended(Part::Analytics).await;
    }
    assert_eq!(system.log_of(Part::Analytics).matches(LOUD).count(), 2, "it says why, each time");
    assert_eq!(system.committed(GROUP, TOPIC), committed, "nothing is skipped");
}
