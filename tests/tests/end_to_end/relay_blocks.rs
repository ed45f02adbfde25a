//! What Kafka does not accept blocks the topic, the partition or the key that it is about, and
//! nothing else.

use std::time::Duration;

use serde_json::{Value, json};
use shared::events::key_hash;
use sqlx::PgPool;
use tests::services::{USER_EVENTS, USER_STATE};
use tests::stores::count;
use tests::{System, eventually, eventually_eq, throughout, within};
use topology::USER;
use uuid::Uuid;

use crate::outbox::{insert_event, insert_large_versions};

/// The time until a new event is published although others wait. Far below the time that one
/// attempt per blocked key would take.
const SOON: Duration = Duration::from_secs(15);

/// A little longer than the `idle_session_timeout` of a relay's session.
const IDLE_LIMIT: Duration = Duration::from_secs(20);

/// Registers a user and waits until its fact is published.
async fn assert_new_events_are_published(system: &System) {
    let user = system.users.register().await;
    within(SOON, "the fact of a new user", async || {
        (system.kafka.read_key(USER_EVENTS, user).len() == 1).then_some(())
    })
    .await;
}

async fn until_metric(system: &System, name: &str, expected: f64) {
    eventually_eq(name, Some(expected), async || system.processes.metric(USER, name, &[]).await).await;
}

/// What `/status` of the user service says about a component.
async fn reason(system: &System, component: &str) -> String {
    let (_, body) = system.processes.status(USER).await.unwrap();
    body["waiting_for"][component].as_str().unwrap_or_default().to_owned()
}

/// Ends the session of the relay, and with it the term of the leader.
async fn end_term(db: &PgPool) {
    let end_session = "select pg_terminate_backend(pid) from pg_stat_activity
                       where application_name = 'relay' and datname = current_database()";
    sqlx::query(end_session).execute(db).await.unwrap();
}

/// Inserts one event for each of many new keys.
pub async fn insert_keys(db: &PgPool, topic: &str, keys: usize) {
    let keys: Vec<Uuid> = (0..keys).map(|_| Uuid::now_v7()).collect();
    let hashes: Vec<i32> = keys.iter().map(|key| key_hash(*key)).collect();
    let insert = "insert into outbox
                      (event_id, topic, aggregatetype, aggregateid, key_hash, version, type, payload, occurred_at)
                  select gen_random_uuid(), $1, 'user', key, hash, 1, 'user.profile_changed',
                      convert_to(json_build_object('user_id', key)::text, 'utf8'), now()
                  from unnest($2::uuid[], $3::int[]) keys (key, hash)";
    sqlx::query(insert).bind(topic).bind(keys).bind(hashes).execute(db).await.unwrap();
}

/// The relay has found out once in each term that one topic is blocked, and has blocked no key. A
/// slow Kafka may end a term, or make a partition of another topic unavailable for a moment.
fn assert_blocked_once_in_each_term(log: &str) {
    for term in log.split("became outbox relay leader").skip(1) {
        let blocked_topics = term.lines().filter_map(|line| {
            if line.contains("all outbox rows can be published again") {
                return Some(0);
            }
            let is_about_blocks = line.contains("outbox rows wait because Kafka does not accept them");
            let line: Value = is_about_blocks.then(|| serde_json::from_str(line).unwrap())?;
            assert_eq!(line["keys"], 0, "keys are blocked: {line}");
            line["topics"].as_u64()
        });
        let mut changes: Vec<u64> = blocked_topics.collect();
        changes.dedup();
        assert!(matches!(*changes, [] | [1] | [0, 1]), "numbers of blocked topics in one term: {changes:?}");
    }
}

/// T10, I4: thousands of rows of different keys are for a topic that does not exist. The relay
/// finds that out once. Other events are published, and the rows of the topic follow when it
/// exists. The metric of waiting rows counts up to a limit.
#[tokio::test(flavor = "multi_thread")]
async fn rows_of_a_missing_topic_block_no_other_topic() {
    let system = System::start_only(&[USER]).await;
    // A service is ready before its own topics exist, and they would be blocked too.
    system.processes.until_logged(USER, "the topics of this service exist as declared").await;
    let db = system.stores.database(USER).await;
    insert_keys(&db, "no.such.topic", 12_000).await;
    assert_new_events_are_published(&system).await;
    until_metric(&system, "outbox_blocked_topics", 1.0).await;
    until_metric(&system, "outbox_blocked_keys", 0.0).await;
    until_metric(&system, "outbox_rows", 10_000.0).await;
    assert_blocked_once_in_each_term(&system.processes.log(USER));
    let reason = reason(&system, "outbox rows").await;
    assert!(reason.contains("1 topics") && reason.contains("topic no.such.topic"), "{reason}");

    system.kafka.create_topic("no.such.topic", 1, &[]).await;
    system.stores.until_outbox_empty(USER).await;
    until_metric(&system, "outbox_blocked_topics", 0.0).await;
    assert_eq!(system.kafka.read("no.such.topic").len(), 12_000);
    assert_eq!(self::reason(&system, "outbox rows").await, "");
}

/// A term ends while rows are blocked, and the next one begins without them. The metrics show what
/// the new term knows.
#[tokio::test(flavor = "multi_thread")]
async fn a_new_term_does_not_report_what_an_earlier_one_had_blocked() {
    let system = System::start_only(&[USER]).await;
    system.processes.until_logged(USER, "the topics of this service exist as declared").await;
    let db = system.stores.database(USER).await;
    insert_keys(&db, "no.such.topic", 1).await;
    until_metric(&system, "outbox_blocked_topics", 1.0).await;
    sqlx::query("delete from outbox").execute(&db).await.unwrap();
    end_term(&db).await;
    until_metric(&system, "outbox_blocked_topics", 0.0).await;
    assert_new_events_are_published(&system).await;
}

/// T10, I4: the name of a topic is invalid. For some of these names the Kafka client would panic.
#[tokio::test(flavor = "multi_thread")]
async fn a_row_with_an_invalid_topic_blocks_no_other_topic() {
    let system = System::start_only(&[USER]).await;
    let db = system.stores.database(USER).await;
    let mut connection = db.acquire().await.unwrap();
    let long = [250, 600].map(|length| "x".repeat(length));
    for topic in ["order events!", "über", "..", &long[0], &long[1]] {
        insert_event(&mut connection, topic, Uuid::now_v7(), 1).await;
    }
    assert_new_events_are_published(&system).await;
    until_metric(&system, "outbox_blocked_topics", 5.0).await;
    assert_eq!(count(&db, "select count(*) from outbox").await, 5);
}

/// T10, I4: a topic has fewer partitions than the declaration of a state topic. The keys of the
/// missing partitions wait, and everything else is published.
#[tokio::test(flavor = "multi_thread")]
async fn a_state_topic_with_fewer_partitions_blocks_no_other_topic() {
    let system = System::start_only(&[USER]).await;
    system.processes.until_logged(USER, "the topics of this service exist as declared").await;
    system.users.register().await;
    system.stores.until_outbox_empty(USER).await;
    let db = system.stores.database(USER).await;
    system.kafka.delete_topic(USER_STATE).await;
    system.kafka.create_topic(USER_STATE, 3, &[("cleanup.policy", "compact")]).await;
    let mut users = vec![];
    for _ in 0..20 {
        users.push(system.users.register().await);
    }
    within(SOON, "the facts of all users", async || {
        users.iter().all(|user| system.kafka.read_key(USER_EVENTS, *user).len() == 1).then_some(())
    })
    .await;
    until_metric(&system, "outbox_blocked_partitions", 3.0).await;
    assert!(count(&db, "select count(*) from outbox").await > 0, "no key of a missing partition");

    system.kafka.delete_topic(USER_STATE).await;
    system.kafka.create_topic(USER_STATE, 6, &[("cleanup.policy", "compact")]).await;
    system.stores.until_outbox_empty(USER).await;
    until_metric(&system, "topic_partitions_changed", 0.0).await;
}

/// T10, I4: Kafka rejects one record of a topic. It and the later records of its key wait. All
/// other keys of the topic are published. When the cause is fixed, the key continues in order.
#[tokio::test(flavor = "multi_thread")]
async fn a_rejected_record_blocks_only_its_key() {
    const TOPIC: &str = "small.records";
    let system = System::start_only(&[USER]).await;
    let db = system.stores.database(USER).await;
    system.kafka.create_topic(TOPIC, 1, &[("max.message.bytes", "1000")]).await;
    let large = Uuid::now_v7();
    insert_large(&db, TOPIC, &[large]).await;
    let mut connection = db.acquire().await.unwrap();
    insert_event(&mut connection, TOPIC, large, 2).await;
    let other = Uuid::now_v7();
    insert_event(&mut connection, TOPIC, other, 1).await;

    eventually_eq("records of another key", 1, async || system.kafka.read_key(TOPIC, other).len()).await;
    until_metric(&system, "outbox_blocked_keys", 1.0).await;
    assert_new_events_are_published(&system).await;
    assert!(system.kafka.read_key(TOPIC, large).is_empty(), "version 2 must not overtake version 1");

    system.kafka.alter_topic(TOPIC, &[("max.message.bytes", "100000")]).await;
    system.stores.until_outbox_empty(USER).await;
    let versions: Vec<i64> = system.kafka.read_key(TOPIC, large).iter().map(|record| record.version()).collect();
    assert_eq!(versions, [1, 2]);
    until_metric(&system, "outbox_blocked_keys", 0.0).await;
}

/// T10, I4: a rejected record and a later row of its key are in different rounds of a backlog. The
/// relay has read the later round before Kafka rejects the first one. The later row waits all the
/// same.
#[tokio::test(flavor = "multi_thread")]
async fn a_rejected_record_also_blocks_the_rows_that_were_read_ahead() {
    const TOPIC: &str = "small.records";
    let mut system = System::start_only(&[USER]).await;
    let db = system.stores.database(USER).await;
    system.kafka.create_topic(TOPIC, 1, &[("max.message.bytes", "1000")]).await;
    system.processes.stop(USER).await;
    let large = Uuid::now_v7();
    insert_large(&db, TOPIC, &[large]).await;
    // More than one round, and less than two.
    insert_large_versions(&db, Uuid::now_v7(), 1..=8).await;
    insert_event(&mut db.acquire().await.unwrap(), TOPIC, large, 2).await;

    system.processes.start(&[USER]).await;
    eventually_eq("rows that wait", 2, async || count(&db, "select count(*) from outbox").await).await;
    assert!(system.kafka.read_key(TOPIC, large).is_empty(), "version 2 must not overtake version 1");
    until_metric(&system, "outbox_blocked_keys", 1.0).await;

    system.kafka.alter_topic(TOPIC, &[("max.message.bytes", "100000")]).await;
    system.stores.until_outbox_empty(USER).await;
    let versions: Vec<i64> = system.kafka.read_key(TOPIC, large).iter().map(|record| record.version()).collect();
    assert_eq!(versions, [1, 2]);
}

/// T10, I4: one of thousands of rows is rejected. The relay finds it, and blocks no other key.
#[tokio::test(flavor = "multi_thread")]
async fn a_rejected_record_in_a_large_backlog_blocks_only_its_key() {
    const TOPIC: &str = "small.records";
    let mut system = System::start_only(&[USER]).await;
    let db = system.stores.database(USER).await;
    system.kafka.create_topic(TOPIC, 1, &[("max.message.bytes", "1000")]).await;
    system.processes.stop(USER).await;
    let large = Uuid::now_v7();
    insert_large(&db, TOPIC, &[large]).await;
    insert_keys(&db, USER_EVENTS, 10_000).await;

    system.processes.start(&[USER]).await;
    eventually_eq("rows that wait", 1, async || count(&db, "select count(*) from outbox").await).await;
    until_metric(&system, "outbox_blocked_keys", 1.0).await;
    let log = system.processes.log(USER);
    let lines = log.lines().filter(|line| line.contains("outbox rows wait because Kafka does not accept them"));
    let others: Vec<_> = lines.filter(|line| !line.contains(&large.to_string())).collect();
    assert!(others.is_empty(), "other keys were blocked: {others:?}");
}

/// T10, I4: a topic rejects the records of all keys. It is blocked as a whole, and other events are
/// published meanwhile. When all records fit but the oldest, the others are published.
#[tokio::test(flavor = "multi_thread")]
async fn a_topic_that_rejects_every_record_delays_no_other_topic() {
    const TOPIC: &str = "tiny.records";
    let system = System::start_only(&[USER]).await;
    let db = system.stores.database(USER).await;
    system.kafka.create_topic(TOPIC, 1, &[("max.message.bytes", "100")]).await;
    let large = Uuid::now_v7();
    insert_large(&db, TOPIC, &[large]).await;
    insert_keys(&db, TOPIC, 300).await;
    for _ in 0..3 {
        assert_new_events_are_published(&system).await;
    }
    until_metric(&system, "outbox_blocked_topics", 1.0).await;
    assert!(system.kafka.read(TOPIC).is_empty());

    system.kafka.alter_topic(TOPIC, &[("max.message.bytes", "1000")]).await;
    eventually_eq("rows that wait", 1, async || count(&db, "select count(*) from outbox").await).await;
    assert_eq!(system.kafka.read(TOPIC).len(), 300);
    assert!(system.kafka.read_key(TOPIC, large).is_empty());
}

/// T10, I4: the service may describe a topic and not write it. The topic is blocked once, with
/// Kafka's code, and no other topic waits.
#[tokio::test(flavor = "multi_thread")]
async fn a_topic_that_may_not_be_written_is_blocked_once() {
    const TOPIC: &str = "denied.records";
    let mut system = System::empty().await;
    let (kafka, _proxy) = system.own_kafka().await;
    system.processes.start(&[USER]).await;
    let db = system.stores.database(USER).await;
    system.kafka.create_topic(TOPIC, 1, &[]).await;
    let topic = system.kafka.prefixed(TOPIC);
    kafka.component.deny_writing(&topic).await.unwrap();
    insert_keys(&db, TOPIC, 6_000).await;
    assert_new_events_are_published(&system).await;
    until_metric(&system, "outbox_blocked_topics", 1.0).await;
    until_metric(&system, "outbox_blocked_keys", 0.0).await;
    let reason = reason(&system, "outbox rows").await;
    assert!(reason.contains("TopicAuthorizationFailed"), "{reason}");

    kafka.component.allow_writing(&topic).await.unwrap();
    system.stores.until_outbox_empty(USER).await;
    assert_eq!(system.kafka.read(TOPIC).len(), 6_000);
}

/// Inserts an event that is larger than 1,000 bytes for each key.
pub async fn insert_large(db: &PgPool, topic: &str, keys: &[Uuid]) {
    let insert = "insert into outbox
                      (event_id, topic, aggregatetype, aggregateid, key_hash, version, type, payload, occurred_at)
                  values ($1, $2, 'user', $3, $4, 1, 'user.profile_changed', $5, now())";
    for key in keys {
        let payload = json!({ "user_id": key, "more": random_text() }).to_string().into_bytes();
        let row = sqlx::query(insert).bind(Uuid::now_v7()).bind(topic).bind(key).bind(key_hash(*key)).bind(payload);
        row.execute(db).await.unwrap();
    }
}

/// Text that no compression makes small.
fn random_text() -> String {
    (0..200).map(|_| Uuid::new_v4().simple().to_string()).collect()
}

/// T14, I3: a broker has the only replica of a partition and dies. The keys of that partition wait.
/// All other keys are published, also of the same topic. When the broker is back, everything is.
#[tokio::test(flavor = "multi_thread")]
async fn the_keys_of_a_partition_without_leader_wait_and_no_others() {
    const TOPIC: &str = "one.replica";
    const KEYS: usize = 60;
    let mut system = System::empty_on_three_brokers().await;
    system.processes.start(&[USER]).await;
    let db = system.stores.database(USER).await;
    system.kafka.create_topic(TOPIC, 3, &[("min.insync.replicas", "1")]).await;
    let lost = system.kafka.leader_of(TOPIC, 0).await;
    system.broker(lost).process.kill();
    system.kafka.until_no_leader(TOPIC, 0).await;

    insert_keys(&db, TOPIC, KEYS).await;
    assert_new_events_are_published(&system).await;
    eventually("a partition is blocked", async || {
        let blocked = system.processes.metric(USER, "outbox_blocked_partitions", &[]).await;
        blocked.filter(|blocked| *blocked >= 1.0)
    })
    .await;
    let waiting = eventually("only rows of partitions without leader wait", async || {
        let waiting: i64 = count(&db, "select count(*) from outbox").await;
        (waiting < KEYS as i64).then_some(waiting)
    })
    .await;
    assert!(waiting > 0, "no key waits for the lost partition");

    system.broker(lost).restart().await.unwrap();
    system.stores.until_outbox_empty(USER).await;
    assert_eq!(system.kafka.read(TOPIC).len(), KEYS);
    until_metric(&system, "outbox_blocked_partitions", 0.0).await;
}

/// T14, I3: a broker has the only replica of a partition. It dies within a round, after the relay
/// has seen that the partition has a leader: before the records are sent, or after the broker has
/// acknowledged them. Other events are published meanwhile. When the broker is back and the next
/// round has written to the partition, everything is.
#[tokio::test(flavor = "multi_thread")]
async fn a_leader_that_is_lost_within_a_round_delays_no_other_partition_for_long() {
    for point in ["relay.after_read", "relay.after_ack"] {
        lose_a_leader_within_a_round(point).await;
    }
}

async fn lose_a_leader_within_a_round(point: &str) {
    const TOPIC: &str = "one.replica";
    const KEYS: usize = 60;
    let mut system = System::empty_on_three_brokers().await;
    system.kafka.create_topic(TOPIC, 3, &[("min.insync.replicas", "1")]).await;
    let end_of_stall = system.processes.file("end-of-stall");
    let until = ("FAULT_UNTIL", end_of_stall.to_str().unwrap());
    system.processes.spawn_with(USER, &[("FAULT_AT", &format!("{point}:1:stall")), until]);
    system.processes.until_ready(&[USER]).await;
    let lost = system.kafka.leader_of(TOPIC, 0).await;
    let db = system.stores.database(USER).await;
    insert_keys(&db, TOPIC, KEYS).await;
    system.processes.until_logged(USER, "fault point reached").await;
    system.broker(lost).process.kill();
    system.kafka.until_no_leader(TOPIC, 0).await;
    std::fs::write(end_of_stall, "").unwrap();

    // The round that hangs ends by its time-outs, and a new term begins.
    let user = system.users.register().await;
    eventually_eq("facts of a new user", 1, async || system.kafka.read_key(USER_EVENTS, user).len()).await;
    system.broker(lost).restart().await.unwrap();
    system.stores.until_outbox_empty(USER).await;
    // Kafka may not end the transaction on the partition that was lost, although it was committed.
    // The next round that writes to the partition ends it.
    insert_keys(&db, TOPIC, KEYS).await;
    eventually_eq("records of the topic", 2 * KEYS, async || system.kafka.read(TOPIC).len()).await;
}

/// I4: a state topic gets more partitions while the services run. Records of a key stay in the
/// partition that has its older records, so that a tombstone erases them. The change is reported.
#[tokio::test(flavor = "multi_thread")]
async fn records_of_a_state_topic_that_has_grown_stay_in_their_partitions() {
    let system = System::start_only(&[USER]).await;
    let mut users = vec![];
    for _ in 0..12 {
        users.push(system.users.register().await);
    }
    system.stores.until_outbox_empty(USER).await;
    // A service that has not checked its topics yet would exit.
    system.processes.until_logged(USER, "the topics of this service exist as declared").await;
    system.kafka.set_partitions(USER_STATE, 12).await;
    // The next term has a new producer, which knows all twelve partitions.
    let db = system.stores.database(USER).await;
    end_term(&db).await;
    eventually("the topic's change is reported", async || {
        system.users.register().await;
        let changed = system.processes.metric(USER, "topic_partitions_changed", &[]).await;
        changed.filter(|changed| *changed == 1.0)
    })
    .await;
    for user in &users {
        system.users.erase(*user).await.unwrap();
    }
    system.stores.until_outbox_empty(USER).await;
    for user in users {
        let records = system.kafka.read_key(USER_STATE, user);
        assert_eq!(records.len(), 2, "a state and its tombstone");
        assert_eq!(records[0].partition, records[1].partition, "the tombstone is in another partition");
    }
}

/// I3: a session of the relay becomes read-only, as in a failover. The relay closes it and
/// continues with a session that can write. At most one round is published twice.
#[tokio::test(flavor = "multi_thread")]
async fn a_relay_whose_session_became_read_only_starts_a_new_term() {
    let mut system = System::start_only(&[USER]).await;
    let judge = system.judge().await;
    system.users.register().await;
    system.stores.until_outbox_empty(USER).await;
    let db = system.stores.database(USER).await;
    let read_only = "
        create function refuse() returns trigger language plpgsql as $$ begin
            if (select application_name from pg_stat_activity where pid = pg_backend_pid()) = 'relay'
                and pg_backend_pid() = (select pid from old_session) then
                raise exception 'cannot execute DELETE in a read-only transaction' using errcode = '25006';
            end if;
            return old;
        end $$;
        create table old_session as
            select pid from pg_stat_activity
            where application_name = 'relay' and datname = current_database() limit 1;
        create trigger refuse before delete on outbox for each row execute function refuse();";
    sqlx::raw_sql(read_only).execute(&db).await.unwrap();
    let user = system.users.register().await;
    system.stores.until_outbox_empty(USER).await;
    system.processes.until_logged(USER, "relay lost its term").await;
    let copies = system.kafka.read_key(USER_EVENTS, user).len();
    assert!(copies <= 2, "{copies} copies of a fact");
    judge.check(&mut system).await;
}

/// A relay that does not lead notifies the leader of new rows: they are published at once, although
/// the leader polls only once a minute.
#[tokio::test(flavor = "multi_thread")]
async fn a_registration_at_a_follower_is_published_without_waiting_for_the_poll() {
    let mut system = System::empty().await;
    system.processes.set("OUTBOX_POLL_MS", "60000");
    system.processes.start(&[USER]).await;
    let mut follower = system.processes.spawn_another(USER);
    follower.until_ready().await;
    let users = system.users.at(&follower);
    // Longer than Postgres keeps an idle session of a relay: the leader must not look idle.
    let lost = async || system.processes.log(USER).contains("relay lost its term");
    throughout(IDLE_LIMIT, "the leader keeps its term while it waits", async || !lost().await).await;
    for _ in 0..5 {
        let user = users.register().await;
        within(SOON, "the fact of a user", async || {
            (system.kafka.read_key(USER_EVENTS, user).len() == 1).then_some(())
        })
        .await;
    }
}

/// Two outboxes in schemas of one database are published by two relays that do not exclude or
/// fence each other.
#[tokio::test(flavor = "multi_thread")]
async fn two_outboxes_in_one_database_have_a_leader_each() {
    let system = System::start_only(&[USER]).await;
    let db = system.stores.database(USER).await;
    // The role of the service may create tables in this schema, so the service migrates it.
    sqlx::raw_sql("create schema blue; grant usage, create on schema blue to waybill_user").execute(&db).await.unwrap();
    let url = format!("{}?options=-c%20search_path%3Dblue", system.processes.setting("USER_DATABASE_URL"));
    let mut blue = system.processes.spawn_another_with(USER, &[("USER_DATABASE_URL", &url)]);
    blue.until_ready().await;
    for users in [system.users.clone(), system.users.at(&blue)] {
        let user = users.register().await;
        within(SOON, "the fact of a user", async || {
            (system.kafka.read_key(USER_EVENTS, user).len() == 1).then_some(())
        })
        .await;
    }
    for admin in [system.processes.admin(USER), blue.admin()] {
        assert_eq!(admin.metric("relay_leader", &[]).await, Some(1.0));
    }
}
