//! Events that are not published, and topics that an operator has changed.

use std::collections::BTreeMap;

use sqlx::PgPool;
use tests::System;
use tests::alerts::SCRAPES;
use tests::services::{USER_EVENTS, USER_STATE};
use topology::USER;
use uuid::Uuid;

use super::{record, until, until_at_least};
use crate::relay_blocks::{insert_keys, insert_large};

const MISSING: &str = "no.such.topic";
const SMALL: &str = "small.records";
/// Events that are published while a session uses an old snapshot. Above the threshold of the
/// alert.
const DEAD_ROWS: usize = 60_000;

/// I12: rows of a topic that does not exist, one of which is old; a record that is too large; keys
/// whose partitions do not exist, because an operator has created a topic with too few; another
/// topic that would delete facts; and a session whose snapshot keeps Postgres from vacuuming the
/// outbox.
#[tokio::test(flavor = "multi_thread")]
async fn events_that_are_not_published() {
    let system = System::start_only(&[USER]).await;
    system.processes.until_logged(USER, "the topics of this service exist as declared").await;
    system.users.register().await;
    system.stores.until_outbox_empty(USER).await;
    let Some(mut recording) = record(&system, &[USER]).await else { return };
    recording.scrapes(SCRAPES).await;
    recording.fault_begins();

    let db = system.stores.database(USER).await;
    let mut snapshot = db.begin().await.unwrap();
    sqlx::raw_sql("set transaction isolation level repeatable read; select 1").execute(&mut *snapshot).await.unwrap();
    let facts = system.kafka.topic_settings(USER_EVENTS).await.0;
    let states = system.kafka.topic_settings(USER_STATE).await.0;
    insert_old(&db).await;
    insert_keys(&db, USER_EVENTS, DEAD_ROWS).await;
    until_at_least(&system, USER, "outbox_dead_rows", &[], 50_001.0).await;
    system.kafka.alter_topic(USER_EVENTS, &[("retention.ms", "604800000")]).await;
    system.kafka.create_topic(SMALL, 1, &[("max.message.bytes", "1000")]).await;
    insert_large(&db, SMALL, &[Uuid::now_v7()]).await;
    system.kafka.delete_topic(USER_STATE).await;
    system.kafka.create_topic(USER_STATE, 3, &[("cleanup.policy", "compact")]).await;
    system.users.register_many(20).await;

    until_shown(&system).await;
    recording.fault_shows();
    recording.scrapes(SCRAPES).await;
    recording.fault_ends();

    snapshot.rollback().await.unwrap();
    let owner = PgPool::connect(system.stores.owner_url(USER)).await.unwrap();
    sqlx::raw_sql("vacuum outbox").execute(&owner).await.unwrap();
    system.kafka.alter_topic(USER_EVENTS, &borrowed(&facts)).await;
    system.kafka.alter_topic(SMALL, &[("max.message.bytes", "100000")]).await;
    system.kafka.create_topic(MISSING, 1, &[]).await;
    system.kafka.delete_topic(USER_STATE).await;
    system.kafka.create_topic(USER_STATE, 6, &borrowed(&states)).await;
    system.stores.until_outbox_empty(USER).await;
    let gauges = [
        "outbox_blocked_topics",
        "outbox_blocked_keys",
        "outbox_blocked_partitions",
        "outbox_oldest_age_seconds",
        "topic_partitions_changed",
        "topic_settings_changed",
    ];
    for gauge in gauges {
        until(&system, USER, gauge, &[], 0.0).await;
    }
    recording.scrapes(SCRAPES).await;
    recording.check(&[
        "OutboxAges",
        "OutboxDeadRows",
        "OutboxKeyBlocked",
        "OutboxPartitionBlocked",
        "OutboxTopicBlocked",
        "TopicPartitionsChanged",
        "TopicSettingsDiffer",
    ]);
}

/// Waits until the metrics show all faults.
async fn until_shown(system: &System) {
    until(system, USER, "outbox_blocked_topics", &[], 1.0).await;
    until(system, USER, "outbox_blocked_keys", &[], 1.0).await;
    until(system, USER, "outbox_blocked_partitions", &[], 3.0).await;
    until(system, USER, "topic_partitions_changed", &[], 1.0).await;
    until_at_least(system, USER, "topic_settings_changed", &[USER_EVENTS], 1.0).await;
    until_at_least(system, USER, "outbox_oldest_age_seconds", &[], 120.0).await;
    until_at_least(system, USER, "outbox_dead_rows", &[], 50_001.0).await;
}

/// Inserts an event of two minutes ago for a topic that does not exist.
async fn insert_old(db: &PgPool) {
    let insert = "insert into outbox
                      (event_id, topic, aggregatetype, aggregateid, key_hash, version, type, payload, occurred_at)
                  values ($1, $2, 'user', $1, 0, 1, 'user.profile_changed', '{}', now() - interval '2 minutes')";
    sqlx::query(insert).bind(Uuid::now_v7()).bind(MISSING).execute(db).await.unwrap();
}

fn borrowed(settings: &BTreeMap<String, String>) -> Vec<(&str, &str)> {
    settings.iter().map(|(name, value)| (&**name, &**value)).collect()
}
