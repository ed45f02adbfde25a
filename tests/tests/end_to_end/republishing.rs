//! States that are told once more: by an operator, where the topic is damaged; and daily, so that a quiet topic is compacted.

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

/// A user service, ready.
async fn user_service(settings: &[(&str, &str)]) -> System {
    let mut system = System::empty().await;
    system.processes.start_with(USER, settings).await;
    system
}

/// Users whose events no topic has, as after a loss; written in place of thousands of requests.
async fn unheard_of(system: &System, users: i32) {
    let insert = "insert into users select uuidv7(), 1, 'user-' || n || '@example.com', 'Number ' || n from generate_series(1, $1) n";
    sqlx::query(insert).bind(users).execute(&system.stores.database(USER).await).await.unwrap();
}

/// The versions of the states in the log by key, in the log's order; negative: a tombstone.
async fn states(system: &System) -> BTreeMap<Uuid, Vec<i64>> {
    let db = system.stores.database(USER).await;
    let waiting = async || sqlx::query_scalar::<_, i64>("select count(*) from outbox").fetch_one(&db).await.unwrap();
    eventually_eq("the outbox is empty", 0, waiting).await;
    let mut states: BTreeMap<Uuid, Vec<i64>> = BTreeMap::new();
    for record in system.kafka.read(USER_STATE) {
        let version = if record.value.is_some() { record.version() } else { -record.version() };
        states.entry(record.key_text().parse().unwrap()).or_default().push(version);
    }
    states
}

/// I4: one user or all, each at the version they have, under new event ids; who was erased is a tombstone again. Readers who know
/// it all take it for what it is.
#[tokio::test(flavor = "multi_thread")]
async fn states_are_republished_as_they_are_and_nothing_else() {
    let mut system = System::start_only(&[USER]).await;
    system.processes.start(&[CACHE]).await;
    let alive = system.users.register().await;
    let erased = system.users.register().await;
    system.users.rename(alive, "Countess").await.unwrap();
    assert_eq!(system.users.erase(erased).await.unwrap().status, StatusCode::NO_CONTENT);

    let user = alive.to_string();
    let printed = system.processes.run(USER, &["republish", "--user", &user]).await.unwrap();
    assert_eq!(printed, "republished: 1 states, 0 tombstones\n");
    assert_eq!(states(&system).await, [(alive, vec![1, 2, 2]), (erased, vec![1, -2])].into());

    let printed = system.processes.run(USER, &["republish"]).await.unwrap();
    assert!(printed.ends_with("republished: 1 states, 1 tombstones\n"), "{printed}");
    assert_eq!(states(&system).await, [(alive, vec![1, 2, 2, 2]), (erased, vec![1, -2, -2])].into());
    let ids: BTreeSet<Uuid> =
        system.kafka.read(USER_STATE).iter().map(|record| record.header("ce_id").unwrap().parse().unwrap()).collect();
    assert_eq!(ids.len(), 7, "every one has an event id of its own");
    assert_eq!(system.kafka.read(USER_EVENTS).len(), 4, "nothing happened, so there is no fact of it");
    eventually_eq("the cache knows them", 3.0, async || system.processes.counted(CACHE_PROFILES, "duplicate").await)
        .await;
    assert_eq!(
        (system.users.cached_version(alive).await, system.users.cached_version(erased).await),
        (Ok(2), Err(StatusCode::NOT_FOUND))
    );

    let nobody = Uuid::now_v7().to_string();
    let refused = system.processes.run(USER, &["republish", "--user", &nobody]).await.unwrap_err().to_string();
    assert!(refused.contains(&format!("--user {nobody}: nobody was ever registered under this id")), "{refused}");
}

/// I3 I4: among commands that go on, the last record of each key still has its highest version.
#[tokio::test(flavor = "multi_thread")]
async fn a_republish_under_load_leaves_each_newest_state_last() {
    let system = user_service(&[]).await;
    unheard_of(&system, 450).await;
    let load = system.load(4);
    let at_least = async |accepted| {
        eventually("users are registered", async || (load.accepted() >= accepted).then_some(())).await;
    };
    at_least(8).await;
    let mut runs = 0;
    while runs < 3 || load.accepted() < 24 {
        system.processes.run(USER, &["republish"]).await.unwrap();
        runs += 1;
    }
    load.end().await;
    system.stores.until_outbox_empty(USER).await;
    let mut newest: BTreeMap<Uuid, i64> = BTreeMap::new();
    for (key, versions) in states(&system).await {
        let versions: Vec<i64> = versions.into_iter().map(i64::abs).collect();
        assert!(versions.is_sorted(), "{key} goes back: {versions:?}");
        let known: BTreeSet<i64> = versions.iter().copied().collect();
        assert!(known.into_iter().eq(1..=versions[versions.len() - 1]), "{key} has gaps: {versions:?}");
        newest.insert(key, versions[versions.len() - 1]);
    }
    let users = system.stores.users().await.into_iter().map(|(user, known)| (user, known.version));
    assert_eq!(newest, users.collect(), "the last state of each user");
}

/// While nothing is published a run fills the outbox up to its mark of 2,000 rows and waits there; then it goes on by itself.
#[tokio::test(flavor = "multi_thread")]
async fn a_republish_waits_for_the_relay() {
    let mut system = System::empty().await;
    let db = system.stores.database(USER).await;
    let mut leader = db.acquire().await.unwrap().detach();
    sqlx::raw_sql("select pg_advisory_lock(x'6f7574626f78'::bigint)").execute(&mut leader).await.unwrap();
    system.processes.start(&[USER]).await;
    unheard_of(&system, 3_000).await;
    let rows = async || sqlx::query_scalar::<_, i64>("select count(*) from outbox").fetch_one(&db).await.unwrap();
    let republish = system.processes.run(USER, &["republish"]);
    let relay = async {
        eventually_eq("the outbox is filled up to the mark", 2_000, rows).await;
        throughout(Duration::from_secs(1), "it waits", async || rows().await == 2_000).await;
        leader.close().await.unwrap();
    };
    let (printed, ()) = tokio::join!(republish, relay);
    assert!(printed.unwrap().ends_with("republished: 3000 states, 0 tombstones\n"));
    assert_eq!(states(&system).await.len(), 3_000);
}

/// A run that is killed in the middle has written whole batches; it goes on where it was, or from the beginning, and misses nobody.
#[tokio::test(flavor = "multi_thread")]
async fn a_republish_that_is_killed_is_run_again() {
    let mut system = user_service(&[]).await;
    unheard_of(&system, 1_200).await;
    let erased = system.users.register().await;
    assert_eq!(system.users.erase(erased).await.unwrap().status, StatusCode::NO_CONTENT);

    system.processes.set("FAULT_AT", "republish.before_commit:2:kill");
    system.processes.run(USER, &["republish"]).await.unwrap_err();
    let told = states(&system).await;
    assert_eq!(told.len(), 500 + 1, "one batch, and who told of themselves");
    let last = told.keys().filter(|key| **key != erased).max().unwrap().to_string();

    system.processes.set("FAULT_AT", "nowhere:1:kill");
    let printed = system.processes.run(USER, &["republish", "--after", &last]).await.unwrap();
    assert!(printed.ends_with("republished: 700 states, 1 tombstones\n"), "{printed}");
    let told = states(&system).await;
    assert_eq!(told.len(), 1_201);
    assert_eq!(told[&erased], [1, -2, -2]);

    let printed = system.processes.run(USER, &["republish"]).await.unwrap();
    assert!(printed.ends_with("republished: 1200 states, 1 tombstones\n"), "{printed}");
    assert!(states(&system).await.into_iter().all(|(key, versions)| key == erased || versions == [1, 1]));
}

/// T38: the compacted topic is deleted. It is filled again from the record of state, the users' table; and its readers, who start
/// anew, know everybody again and the erased still not.
#[tokio::test(flavor = "multi_thread")]
async fn a_state_topic_that_was_deleted_is_filled_again() {
    let mut system = System::empty().await;
    let _valkey = system.own_valkey().await;
    let services = [USER, EMAIL, CACHE];
    system.processes.start(&services).await;
    let email = address();
    let alive = system.users.register_as(&email).await;
    let erased = system.users.register().await;
    system.users.rename(alive, "Countess").await.unwrap();
    assert_eq!(system.users.erase(erased).await.unwrap().status, StatusCode::NO_CONTENT);
    eventually_eq("the cache has them", (Ok(2), Err(StatusCode::NOT_FOUND)), async || {
        (system.users.cached_version(alive).await, system.users.cached_version(erased).await)
    })
    .await;

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
    assert_eq!(system.kafka.read(USER_STATE), [], "the topic is new");

    system.processes.run(USER, &["republish"]).await.unwrap();
    assert_eq!(system.users.until_cached(alive, 2).await.body["display_name"], "Countess");
    assert_eq!(system.users.cached_version(erased).await, Err(StatusCode::NOT_FOUND));
    eventually_eq("the recipient", Some((2, Some(email.clone()))), async || system.stores.recipient(alive).await).await;
    eventually_eq("the erased one", Some((2, None)), async || system.stores.recipient(erased).await).await;
}

/// I14: on a topic that nobody writes to any more the heartbeat alone brings it about that an erased address disappears, also from
/// closed segments. Times are shortened: a segment and a lag of 100 ms instead of a day and a week.
#[tokio::test(flavor = "multi_thread")]
async fn an_erased_address_disappears_from_a_quiet_topic() {
    let system = user_service(&[("HEARTBEAT_INTERVAL_MS", "1000")]).await;
    let email = address();
    let erased = system.users.register_as(&email).await;
    let other = system.users.register().await;
    eventually("the topic has both", async || (states(&system).await.len() == 2).then_some(())).await;
    let settings = [
        ("cleanup.policy", "compact"),
        ("message.timestamp.type", "LogAppendTime"),
        ("segment.ms", "100"),
        ("max.compaction.lag.ms", "100"),
    ];
    system.kafka.alter_topic(USER_STATE, &settings).await;
    assert_eq!(system.users.erase(erased).await.unwrap().status, StatusCode::NO_CONTENT);
    let holds = |record: &Record| record.text().contains(&email);
    eventually("nothing of the erased user is in the log", async || {
        let log = system.kafka.read(USER_STATE);
        // The tombstone is there, so what is not there any more has been there.
        let erasure = log.iter().any(|record| record.key_text() == erased.to_string() && record.value.is_none());
        (erasure && !log.iter().any(holds)).then_some(())
    })
    .await;
    let mut others = system.kafka.read(USER_STATE).into_iter().filter(|record| record.key_text() == other.to_string());
    assert_eq!(others.next_back().map(|record| record.value.is_some()), Some(true), "the other user's state is kept");
}

/// Every partition gets one record an interval, however many replicas there are. Where keys lie is worked out as the producer
/// does it.
#[tokio::test(flavor = "multi_thread")]
async fn a_heartbeat_is_one_record_in_each_partition_for_all_replicas_together() {
    const INTERVAL: f64 = 1.0;
    let mut system = user_service(&[]).await;
    let mut users: BTreeMap<i32, Uuid> = BTreeMap::new();
    while users.len() < 6 {
        let user = system.users.register().await;
        users.entry(Topic::USER_STATE.partition_of(user)).or_insert(user);
    }
    let log = states(&system).await;
    for record in system.kafka.read(USER_STATE) {
        assert_eq!(Topic::USER_STATE.partition_of(record.key_text().parse().unwrap()), record.partition);
    }
    let db = system.stores.database(USER).await;
    system.stores.record_outbox(USER).await;
    let diary = "create table beats (at timestamptz not null);
        create function keep_beat() returns trigger language plpgsql as $$
        begin insert into beats values (new.beaten_at); return null; end $$;
        create trigger keep_beat after update on heartbeats for each row execute function keep_beat();";
    sqlx::raw_sql(diary).execute(&db).await.unwrap();

    let interval = [("HEARTBEAT_INTERVAL_MS", "1000")];
    let second = system.processes.spawn_another_with(USER, &interval);
    system.processes.start_with(USER, &interval).await;
    eventually("four heartbeats", async || (count(&db, "select count(*) from beats").await >= 4).then_some(())).await;
    drop(second);
    system.processes.stop(USER).await;

    let gaps: Vec<f64> = sqlx::query_scalar(
        "select extract(epoch from at - lag(at) over (order by at))::float8 from beats order by at offset 1",
    )
    .fetch_all(&db)
    .await
    .unwrap();
    assert!(gaps.iter().all(|gap| *gap >= INTERVAL), "seconds between heartbeats: {gaps:?}");
    let told: Vec<(Uuid, i64)> = sqlx::query_as("select key, count(*) from ledger where topic = $1 group by key")
        .bind(USER_STATE)
        .fetch_all(&db)
        .await
        .unwrap();
    let partitions: BTreeSet<i32> = told.iter().map(|(key, _)| Topic::USER_STATE.partition_of(*key)).collect();
    assert_eq!((told.len(), partitions.len()), (6, 6), "one user in each partition");
    assert!(told.iter().all(|(key, beats)| *beats as usize == gaps.len() + 1 && log.contains_key(key)), "{told:?}");
}
