//! The topics: created as they are declared, and refused if they differ.

use tests::services::{CACHE_PROFILES, EMAIL_EVENTS, USER_EVENTS, USER_STATE, dead_letters_of};
use tests::{System, eventually, eventually_eq};
use topology::USER;

/// What an operator relies on: facts are kept for ever; of states the newest, and a tombstone for long enough; letters are a table.
#[tokio::test(flavor = "multi_thread")]
async fn topics_are_made_with_the_settings_that_the_promises_rest_on() {
    let mut system = System::empty().await;
    system.processes.set("KAFKA_REPLICATION_FACTOR", "1");
    system.processes.start_all().await;
    let common = [("message.timestamp.type", "LogAppendTime"), ("min.insync.replicas", "1")];
    let facts: &[_] = &[("cleanup.policy", "delete"), ("retention.ms", "-1")];
    let states = [
        ("cleanup.policy", "compact"),
        ("delete.retention.ms", "2592000000"),
        ("max.compaction.lag.ms", "604800000"),
        ("segment.ms", "86400000"),
    ];
    let letters = [("cleanup.policy", "compact"), ("max.message.bytes", "2097152")];
    let dead_letters = dead_letters_of(CACHE_PROFILES);
    let topics = [(USER_EVENTS, facts), (EMAIL_EVENTS, facts), (USER_STATE, &states), (&dead_letters, &letters)];
    for (topic, settings) in topics {
        let settings = settings.iter().chain(&common).map(|(name, value)| ((*name).to_owned(), (*value).to_owned()));
        assert_eq!(system.kafka.topic_settings(topic).await, (settings.collect(), 1), "{topic}");
    }
}

/// T46: a topic that is not what its owner declares is not written to; the service ends and says what to do.
async fn refuses_to_run_on(topic: &str, partitions: i32, settings: &[(&str, &str)], message: &str) {
    let mut system = System::empty().await;
    system.kafka.create_topic(topic, partitions, settings).await;
    for addr in ["HTTP_ADDR", "ADMIN_ADDR"] {
        system.processes.set(addr, &format!("127.0.0.1:{}", testbed::testing::free_port()));
    }
    let ended = system.processes.run(USER, &["serve"]).await.expect_err("it ends with a status that is not 0");
    assert!(ended.to_string().contains(message), "{message:?} is not in the log:\n{ended}");
}

/// T46: with another number of partitions keys would change their partition, and order would be lost.
#[tokio::test(flavor = "multi_thread")]
async fn a_topic_with_another_number_of_partitions_stops_its_owner_loudly() {
    refuses_to_run_on(USER_EVENTS, 3, &[], "has 3 partitions, declared are 6").await;
}

/// T46: without compaction what was erased would stay readable.
#[tokio::test(flavor = "multi_thread")]
async fn a_topic_with_another_cleanup_policy_stops_its_owner_loudly() {
    let settings = [("cleanup.policy", "delete")];
    refuses_to_run_on(USER_STATE, 6, &settings, "has cleanup.policy=delete, declared is compact").await;
}

/// Where an operator makes the topics, a service waits until they are there; what is registered meanwhile waits in the outbox.
#[tokio::test(flavor = "multi_thread")]
async fn a_service_that_may_not_create_topics_waits_for_them() {
    let mut system = System::empty().await;
    system.processes.set("MANAGE_TOPICS", "false");
    system.processes.start(&[USER]).await;
    system.users.register().await;
    eventually("it says what it waits for", async || {
        let log = system.processes.log(USER);
        (log.contains("waiting for Kafka") && log.contains(USER_EVENTS)).then_some(())
    })
    .await;
    system.kafka.create_topic(USER_EVENTS, 6, &[]).await;
    system.kafka.create_topic(USER_STATE, 6, &[("cleanup.policy", "compact")]).await;
    eventually_eq("published", 1, async || system.kafka.read(USER_STATE).len()).await;
}
