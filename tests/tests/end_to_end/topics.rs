//! Topics are created as their owner declares them. If an existing topic differs, its owner exits.

use tests::services::{CACHE_PROFILES, EMAIL_EVENTS, USER_EVENTS, USER_STATE, dead_letters_of};
use tests::{System, eventually, eventually_eq};
use topology::USER;

use crate::analytics_rebuild::rebuild;

/// Facts are kept permanently. A state topic keeps the newest state of each key, and tombstones
/// long enough for slow consumers. Dead letters are a table.
#[tokio::test(flavor = "multi_thread")]
async fn topics_are_created_with_the_settings_that_the_guarantees_need() {
    let mut system = System::empty().await;
    system.processes.set("KAFKA_REPLICATION_FACTOR", "1");
    system.processes.start_all().await;
    let common = [
        ("message.timestamp.type", "LogAppendTime"),
        ("min.insync.replicas", "1"),
        ("unclean.leader.election.enable", "false"),
    ];
    let facts: &[_] = &[("cleanup.policy", "delete"), ("retention.bytes", "-1"), ("retention.ms", "-1")];
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

/// T46: an operator created the topic, and Kafka's default deletes records after a week.
#[tokio::test(flavor = "multi_thread")]
async fn a_service_exits_if_its_topic_deletes_facts() {
    let message = "has retention.ms=604800000, but its declaration has -1";
    assert_user_service_exits(USER_EVENTS, 6, &[], message).await;
}

/// T46, I12: an operator changes topics while their owner runs. The owner reports every difference
/// that its declaration names, and continues to publish. When it starts again, it exits because of
/// the one that would lose facts.
#[tokio::test(flavor = "multi_thread")]
async fn a_topic_that_is_changed_later_is_reported_and_stops_no_service() {
    let mut system = System::start_only(&[USER]).await;
    system.processes.until_logged(USER, "the topics of this service exist").await;
    let topic = |name: &str| format!("topic {}", system.kafka.prefixed(name));
    system.kafka.alter_topic(USER_EVENTS, &[("retention.ms", "604800000")]).await;
    system.kafka.alter_topic(USER_STATE, &[("cleanup.policy", "compact"), ("max.compaction.lag.ms", "1000")]).await;
    let reported = system.processes.until_reported(USER, "retention.ms=604800000").await;
    assert_eq!(reported, [topic(USER_EVENTS)]);
    let reported = system.processes.until_reported(USER, "max.compaction.lag.ms=1000").await;
    assert_eq!(reported, [topic(USER_STATE)]);
    let label = format!("topic=\"{}\"", system.kafka.prefixed(USER_EVENTS));
    let differences = system.processes.metric(USER, "topic_settings_changed", &[&label]).await;
    assert!(differences.is_some_and(|count| count >= 1.0), "{differences:?}");
    assert_eq!(system.processes.admin(USER).is_ready().await, Some(true), "/readyz");
    let user = system.users.register().await;
    eventually_eq("published facts", 1, async || system.kafka.read_key(USER_EVENTS, user).len()).await;

    system.processes.stop(USER).await;
    for addr in ["HTTP_ADDR", "ADMIN_ADDR"] {
        system.processes.set(addr, &format!("127.0.0.1:{}", testbed::testing::free_port()));
    }
    let log = system.processes.run(USER, &["serve"]).await.unwrap_err().to_string();
    assert!(log.contains("has retention.ms=604800000, but its declaration has -1"), "{log}");
}

/// I3, I7: an operator created a topic of facts with more partitions than its declaration has.
/// Every service reads all of them, and so does a rebuild.
#[tokio::test(flavor = "multi_thread")]
async fn a_topic_of_facts_may_have_more_partitions_than_declared() {
    let mut system = System::empty().await;
    system.kafka.create_topic(USER_EVENTS, 12, &[("retention.ms", "-1")]).await;
    system.processes.start_all().await;
    let judge = system.judge().await;
    system.users.register_many(24).await;
    system.users.until_counted(24, 24).await;
    let used: std::collections::BTreeSet<i32> =
        system.kafka.read(USER_EVENTS).iter().map(|record| record.partition).collect();
    assert!(used.iter().any(|partition| *partition >= 6), "no fact is in a partition above the declared ones");
    let rebuilt = rebuild(&system, &[]).await.unwrap();
    assert!(rebuilt.contains("swapped"), "{rebuilt}");
    judge.check(&mut system).await;
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
    system.kafka.create_topic(USER_EVENTS, 6, &[("retention.ms", "-1")]).await;
    system.kafka.create_topic(USER_STATE, 6, &[("cleanup.policy", "compact")]).await;
    eventually_eq("published states", 1, async || system.kafka.read(USER_STATE).len()).await;
}
