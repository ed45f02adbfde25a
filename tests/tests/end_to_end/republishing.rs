//! States that are published again: by an operator, if the topic lost records, and once a day, so
//! that Kafka compacts a quiet topic.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use reqwest::StatusCode;
use shared::events::Topic;
use sqlx::Connection;
use tests::record::Record;
use tests::services::{CACHE_PROFILES, EMAIL_RECIPIENTS, USER_EVENTS, USER_STATE};
use tests::stores::count;
use tests::users::address;
use tests::{System, eventually, eventually_eq, throughout};
use topology::{CACHE, EMAIL, USER};
use uuid::Uuid;

/// Only a user service, ready.
async fn user_service(settings: &[(&str, &str)]) -> System {
    let mut system = System::empty().await;
    system.processes.start_with(USER, settings).await;
    system
}

/// Inserts users whose events are in no topic, as after a loss of the topic. Thousands of requests
/// would take too long.
async fn insert_users_without_events(system: &System, users: i32) {
    let insert = "insert into users select uuidv7(), 1, 'user-' || n || '@example.com', 'Number ' || n from generate_series(1, $1) n";
    sqlx::query(insert).bind(users).execute(&system.stores.database(USER).await).await.unwrap();
}

/// The versions of the states in the log, by key, in the order of the log. The version of a
/// tombstone is negative.
async fn published_states(system: &System) -> BTreeMap<Uuid, Vec<i64>> {
    system.stores.until_outbox_empty(USER).await;
    let mut states: BTreeMap<Uuid, Vec<i64>> = BTreeMap::new();
    for record in system.kafka.read(USER_STATE) {
        let version = if record.value.is_some() { record.version() } else { -record.version() };
        states.entry(record.key_text().parse().unwrap()).or_default().push(version);
    }
    states
}

/// I4: a republish of one user or of all writes each state with its current version and a new event
/// id. An erased user is a tombstone again. The cache counts the states as duplicates.
#[tokio::test(flavor = "multi_thread")]
async fn republish_writes_current_states_and_no_facts() {
    let mut system = System::start_only(&[USER]).await;
    system.processes.start(&[CACHE]).await;
    let current = system.users.register().await;
    let erased = system.users.register().await;
    system.users.rename(current, "Countess").await.unwrap();
    assert_eq!(system.users.erase(erased).await.unwrap().status, StatusCode::NO_CONTENT);

    let printed = system.processes.run(USER, &["republish", "--user", &current.to_string()]).await.unwrap();
    assert_eq!(printed, "republished: 1 states, 0 tombstones\n");
    assert_eq!(published_states(&system).await, [(current, vec![1, 2, 2]), (erased, vec![1, -2])].into());

    let printed = system.processes.run(USER, &["republish"]).await.unwrap();
    assert!(printed.ends_with("republished: 1 states, 1 tombstones\n"), "{printed}");
    assert_eq!(published_states(&system).await, [(current, vec![1, 2, 2, 2]), (erased, vec![1, -2, -2])].into());
    let states = system.kafka.read(USER_STATE);
    let ids: BTreeSet<Uuid> = states.iter().map(|record| record.header("ce_id").unwrap().parse().unwrap()).collect();
    assert_eq!(ids.len(), 7, "event ids: each record must have its own");
    assert_eq!(system.kafka.read(USER_EVENTS).len(), 4, "facts: a republish must not write any");
    let duplicates = async || system.processes.counted(CACHE_PROFILES, "duplicate").await;
    eventually_eq("states that the cache counts as duplicates", 3.0, duplicates).await;
    assert_eq!(system.users.cached_version(current).await, Ok(2));
    assert_eq!(system.users.cached_version(erased).await, Err(StatusCode::NOT_FOUND));

    let unknown = Uuid::now_v7().to_string();
    let refused = system.processes.run(USER, &["republish", "--user", &unknown]).await.unwrap_err().to_string();
    assert!(refused.contains(&format!("--user {unknown}: no user was ever registered")), "{refused}");
}

/// I3, I4: while commands run concurrently, the last record of each key has its highest version.
#[tokio::test(flavor = "multi_thread")]
async fn a_republish_under_load_leaves_each_newest_state_last() {
    let system = user_service(&[]).await;
    insert_users_without_events(&system, 450).await;
    let load = system.load(4);
    load.until_accepted(8).await;
    let mut runs = 0;
    while runs < 3 || load.accepted() < 24 {
        system.processes.run(USER, &["republish"]).await.unwrap();
        runs += 1;
    }
    load.end().await;
    system.stores.until_outbox_empty(USER).await;
    let mut newest: BTreeMap<Uuid, i64> = BTreeMap::new();
    for (key, versions) in published_states(&system).await {
        let versions: Vec<i64> = versions.into_iter().map(i64::abs).collect();
        assert!(versions.is_sorted(), "the versions of {key} decrease: {versions:?}");
        let known: BTreeSet<i64> = versions.iter().copied().collect();
        let last = versions[versions.len() - 1];
        assert!(known.into_iter().eq(1..=last), "the versions of {key} have gaps: {versions:?}");
        newest.insert(key, last);
    }
    let users = system.stores.users().await.into_iter().map(|(user, known)| (user, known.version));
    assert_eq!(newest, users.collect(), "the version of each user's last state");
}

/// The outbox limit of a republish.
const OUTBOX_LIMIT: i64 = 2_000;

/// No relay publishes, because the test holds the lock of the leader. The republish fills the
/// outbox up to its limit and waits. It continues by itself as soon as a relay publishes.
#[tokio::test(flavor = "multi_thread")]
async fn a_republish_waits_while_the_outbox_is_full() {
    let mut system = System::empty().await;
    let db = system.stores.database(USER).await;
    let mut leader = db.acquire().await.unwrap().detach();
    sqlx::raw_sql("select pg_advisory_lock(('x' || substr(md5(current_schema() || '/'), 1, 16))::bit(64)::bigint)")
        .execute(&mut leader)
        .await
        .unwrap();
    system.processes.start(&[USER]).await;
    insert_users_without_events(&system, 3_000).await;
    let rows = async || count(&db, "select count(*) from outbox").await;
    let republish = system.processes.run(USER, &["republish"]);
    let relay = async {
        eventually_eq("outbox rows", OUTBOX_LIMIT, rows).await;
        let full = async || rows().await == OUTBOX_LIMIT;
        throughout(Duration::from_secs(1), "the republish writes no more rows", full).await;
        leader.close().await.unwrap();
    };
    let (printed, ()) = tokio::join!(republish, relay);
    assert!(printed.unwrap().ends_with("republished: 3000 states, 0 tombstones\n"));
    assert_eq!(published_states(&system).await.len(), 3_000);
}

/// Rows of another topic wait, because Kafka does not accept them. They do not delay a republish.
#[tokio::test(flavor = "multi_thread")]
async fn a_republish_does_not_wait_for_the_rows_of_another_topic() {
    let system = user_service(&[]).await;
    let db = system.stores.database(USER).await;
    let insert = "insert into outbox (event_id, topic, aggregatetype, aggregateid, key_hash, version, type, occurred_at)
                  select gen_random_uuid(), 'nowhere', 'user', gen_random_uuid(), 0, 1, 'none', now() from generate_series(1::bigint, $1)";
    sqlx::query(insert).bind(OUTBOX_LIMIT).execute(&db).await.unwrap();
    insert_users_without_events(&system, 3).await;
    let printed = system.processes.run(USER, &["republish"]).await.unwrap();
    assert!(printed.ends_with("republished: 3 states, 0 tombstones\n"), "{printed}");
    eventually_eq("states in the topic", 3, async || system.kafka.read(USER_STATE).len()).await;
    let blocked = "select count(*) from outbox where topic = 'nowhere'";
    assert_eq!(count(&db, blocked).await, OUTBOX_LIMIT, "rows of the other topic");
}

/// A republish that is killed has written complete batches. Run again from the beginning, or with
/// `--after` the last user, it misses no user.
#[tokio::test(flavor = "multi_thread")]
async fn a_killed_republish_can_be_continued_or_repeated() {
    let mut system = user_service(&[]).await;
    insert_users_without_events(&system, 1_200).await;
    let erased = system.users.register().await;
    assert_eq!(system.users.erase(erased).await.unwrap().status, StatusCode::NO_CONTENT);

    system.processes.set("FAULT_AT", "republish.before_commit:2:kill");
    system.processes.run(USER, &["republish"]).await.unwrap_err();
    let states = published_states(&system).await;
    assert_eq!(states.len(), 500 + 1, "users: one batch, and the one that was registered and erased");
    let last = states.keys().filter(|key| **key != erased).max().unwrap().to_string();

    system.processes.set("FAULT_AT", "nowhere:1:kill");
    let printed = system.processes.run(USER, &["republish", "--after", &last]).await.unwrap();
    assert!(printed.ends_with("republished: 700 states, 1 tombstones\n"), "{printed}");
    let states = published_states(&system).await;
    assert_eq!(states.len(), 1_201);
    assert_eq!(states[&erased], [1, -2, -2]);

    let printed = system.processes.run(USER, &["republish"]).await.unwrap();
    assert!(printed.ends_with("republished: 1200 states, 1 tombstones\n"), "{printed}");
    let mut states = published_states(&system).await;
    states.remove(&erased);
    assert!(states.values().all(|versions| *versions == [1, 1]), "every other user must be published twice");
}

/// T38: the compacted topic is deleted. A republish refills it from the users table. The email
/// service and the cache start from scratch and know all users again; erased users stay erased.
#[tokio::test(flavor = "multi_thread")]
async fn a_republish_refills_a_deleted_state_topic() {
    let mut system = System::empty().await;
    let _valkey = system.own_valkey().await;
    let services = [USER, EMAIL, CACHE];
    system.processes.start(&services).await;
    let email = address();
    let current = system.users.register_as(&email).await;
    let erased = system.users.register().await;
    system.users.rename(current, "Countess").await.unwrap();
    assert_eq!(system.users.erase(erased).await.unwrap().status, StatusCode::NO_CONTENT);
    let cached = async || (system.users.cached_version(current).await, system.users.cached_version(erased).await);
    eventually_eq("cached versions of both users", (Ok(2), Err(StatusCode::NOT_FOUND)), cached).await;

    for service in services {
        system.processes.stop(service).await;
    }
    system.kafka.delete_topic(USER_STATE).await;
    system.kafka.reset_group(EMAIL_RECIPIENTS).await;
    system.kafka.reset_group(CACHE_PROFILES).await;
    system.stores.flush_valkey().await;
    let db = system.stores.database(EMAIL).await;
    sqlx::query("delete from recipients").execute(&db).await.unwrap();
    system.processes.start(&services).await;
    assert_eq!(system.kafka.read(USER_STATE), [], "records of the new topic");

    system.processes.run(USER, &["republish"]).await.unwrap();
    assert_eq!(system.users.until_cached(current, 2).await.body["display_name"], "Countess");
    assert_eq!(system.users.cached_version(erased).await, Err(StatusCode::NOT_FOUND));
    let recipient = async || system.stores.recipient(current).await;
    eventually_eq("the recipient", Some((2, Some(email.clone()))), recipient).await;
    let erased_recipient = async || system.stores.recipient(erased).await;
    eventually_eq("the erased recipient", Some((2, None)), erased_recipient).await;
}

/// I14: without other writes the heartbeat alone makes an erased address disappear from the topic,
/// including closed segments. Segments and compaction lag are 100 ms instead of a day and a week.
#[tokio::test(flavor = "multi_thread")]
async fn an_erased_address_disappears_from_a_quiet_topic() {
    let system = user_service(&[("HEARTBEAT_INTERVAL_MS", "1000")]).await;
    let email = address();
    let erased = system.users.register_as(&email).await;
    let other = system.users.register().await;
    eventually_eq("users in the topic", 2, async || published_states(&system).await.len()).await;
    let settings = [
        ("cleanup.policy", "compact"),
        ("message.timestamp.type", "LogAppendTime"),
        ("segment.ms", "100"),
        ("max.compaction.lag.ms", "100"),
    ];
    system.kafka.alter_topic(USER_STATE, &settings).await;
    assert_eq!(system.users.erase(erased).await.unwrap().status, StatusCode::NO_CONTENT);
    let has_address = |record: &Record| record.text().contains(&email);
    let is_tombstone = |record: &Record| record.key_text() == erased.to_string() && record.value.is_none();
    eventually("the topic has the tombstone and not the address", async || {
        let log = system.kafka.read(USER_STATE);
        (log.iter().any(is_tombstone) && !log.iter().any(has_address)).then_some(())
    })
    .await;
    let last = system.kafka.read_key(USER_STATE, other).pop();
    assert_eq!(last.map(|record| record.value.is_some()), Some(true), "compaction must keep the other user's state");
}

/// Each partition gets one record per interval, even if several replicas run. The service computes
/// the partition of a key as the producer does.
#[tokio::test(flavor = "multi_thread")]
async fn a_heartbeat_writes_one_record_per_partition_for_all_replicas() {
    const INTERVAL_SECONDS: f64 = 1.0;
    let mut system = user_service(&[]).await;
    let mut users: BTreeMap<i32, Uuid> = BTreeMap::new();
    while users.len() < 6 {
        let user = system.users.register().await;
        users.entry(Topic::USER_STATE.partition_of(user)).or_insert(user);
    }
    let registered = published_states(&system).await;
    for record in system.kafka.read(USER_STATE) {
        assert_eq!(Topic::USER_STATE.partition_of(record.key_text().parse().unwrap()), record.partition);
    }
    let db = system.stores.database(USER).await;
    system.stores.record_outbox(USER).await;
    let record_beats = "create table beats (at timestamptz not null);
        create function keep_beat() returns trigger language plpgsql as $$
        begin insert into beats values (new.beaten_at); return null; end $$;
        create trigger keep_beat after update on heartbeats for each row execute function keep_beat();";
    sqlx::raw_sql(record_beats).execute(&db).await.unwrap();

    let interval = [("HEARTBEAT_INTERVAL_MS", "1000")];
    let second = system.processes.spawn_another_with(USER, &interval);
    system.processes.start_with(USER, &interval).await;
    let beats = async || count(&db, "select count(*) from beats").await;
    eventually("four heartbeats are recorded", async || (beats().await >= 4).then_some(())).await;
    drop(second);
    system.processes.stop(USER).await;

    let gaps = "select extract(epoch from at - lag(at) over (order by at))::float8 from beats order by at offset 1";
    let gaps: Vec<f64> = sqlx::query_scalar(gaps).fetch_all(&db).await.unwrap();
    assert!(gaps.iter().all(|gap| *gap >= INTERVAL_SECONDS), "seconds between heartbeats: {gaps:?}");
    let records = "select key, count(*) from ledger where topic = $1 group by key";
    let records: Vec<(Uuid, i64)> = sqlx::query_as(records).bind(USER_STATE).fetch_all(&db).await.unwrap();
    let partitions: BTreeSet<i32> = records.iter().map(|(key, _)| Topic::USER_STATE.partition_of(*key)).collect();
    assert_eq!((records.len(), partitions.len()), (6, 6), "users and their partitions");
    for (user, beats) in records {
        assert!(registered.contains_key(&user), "{user} is not registered");
        assert_eq!(beats, gaps.len() as i64 + 1, "records of {user}: one per heartbeat");
    }
}
