//! Topics are created as their owner declares them. If an existing topic differs, its owner exits.

use tests::services::{CACHE_PROFILES, EMAIL_EVENTS, USER_EVENTS, USER_STATE, dead_letters_of};
use tests::{System, eventually, eventually_eq};
use topology::USER;

/// Facts are kept permanently. A state topic keeps the newest state of each key, and tombstones
/// long enough for slow consumers. Dead letters are a table.
#[tokio::test(flavor = "multi_thread")]
async fn topics_are_created_with_the_settings_that_the_guarantees_need() {
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
    let cache_letters = dead_letters_of(CACHE_PROFILES);
    let topics = [(USER_EVENTS, facts), (EMAIL_EVENTS, facts), (USER_STATE, &states), (&cache_letters, &letters)];
    for (topic, settings) in topics {
        let settings = settings.iter().chain(&common).map(|(name, value)| ((*name).to_owned(), (*value).to_owned()));
        assert_eq!(system.kafka.topic_settings(topic).await, (settings.collect(), 1), "{topic}");
    }
}

/// Creates a topic that differs from its declaration, and checks that the user service exits with
/// an error that contains `message`.
async fn assert_user_service_exits(topic: &str, partitions: i32, settings: &[(&str, &str)], message: &str) {
    let mut system = System::empty().await;
    system.kafka.create_topic(topic, partitions, settings).await;
    for addr in ["HTTP_ADDR", "ADMIN_ADDR"] {
        system.processes.set(addr, &format!("127.0.0.1:{}", testbed::testing::free_port()));
    }
    let exit = system.processes.run(USER, &["serve"]).await;
    let log = exit.expect_err("the user service must exit with an error").to_string();
    assert!(log.contains(message), "{message:?} is not in the log:\n{log}");
}

/// T46: with another number of partitions, keys would move to other partitions and lose their
/// order.
#[tokio::test(flavor = "multi_thread")]
async fn a_service_exits_if_its_topic_has_another_number_of_partitions() {
    assert_user_service_exits(USER_EVENTS, 3, &[], "has 3 partitions, but its declaration has 6").await;
}

/// T46: without compaction, erased data would stay readable.
#[tokio::test(flavor = "multi_thread")]
async fn a_service_exits_if_its_topic_has_another_cleanup_policy() {
    let settings = [("cleanup.policy", "delete")];
    let message = "has cleanup.policy=delete, but its declaration has compact";
    assert_user_service_exits(USER_STATE, 6, &settings, message).await;
}

/// If an operator creates the topics, a service waits until they exist. Events wait in the outbox.
#[tokio::test(flavor = "multi_thread")]
async fn a_service_that_may_not_create_topics_waits_for_them() {
    let mut system = System::empty().await;
    system.processes.set("MANAGE_TOPICS", "false");
    system.processes.start(&[USER]).await;
    system.users.register().await;
    eventually("the log names the missing topic", async || {
        let log = system.processes.log(USER);
        let names_topic = |line: &str| line.contains("cannot create or check the topic") && line.contains(USER_EVENTS);
        log.lines().any(names_topic).then_some(())
    })
    .await;
    system.kafka.create_topic(USER_EVENTS, 6, &[]).await;
    system.kafka.create_topic(USER_STATE, 6, &[("cleanup.policy", "compact")]).await;
    eventually_eq("published states", 1, async || system.kafka.read(USER_STATE).len()).await;
}
