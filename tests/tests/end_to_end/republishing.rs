//! States that are told once more: by an operator, where the topic is damaged; and daily, so that a quiet topic is compacted.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use reqwest::StatusCode;
use shared::events::Topic;
use sqlx::Connection;
use tests::log::Raw;
use tests::{Part, System, api, eventually, eventually_eq, throughout};
use uuid::Uuid;

const STATE: &str = "user.state.v1";

/// A user service, ready.
async fn user_service(settings: &[(&str, &str)]) -> System {
    let mut system = System::empty().await;
    system.restart(Part::User, settings).await;
    system
}

/// Users whose events no topic has, as after a loss; written in place of thousands of requests.
async fn unheard_of(system: &System, users: i32) {
    let insert = "insert into users select uuidv7(), 1, 'user-' || n || '@example.com', 'Number ' || n from generate_series(1, $1) n";
    sqlx::query(insert).bind(users).execute(&system.database(Part::User).await).await.unwrap();
}

/// The versions of the states in the log by key, in the log's order; negative: a tombstone.
async fn states(system: &System) -> BTreeMap<Uuid, Vec<i64>> {
    let db = system.database(Part::User).await;
    let waiting = async || sqlx::query_scalar::<_, i64>("select count(*) from outbox").fetch_one(&db).await.unwrap();
    eventually_eq("the outbox is empty", 0, waiting).await;
    let mut states: BTreeMap<Uuid, Vec<i64>> = BTreeMap::new();
    for record in system.read(STATE) {
        let version = if record.value.is_some() { record.version() } else { -record.version() };
        states.entry(record.key_text().parse().unwrap()).or_default().push(version);
    }
    states
}

/// I4: one user or all, each at the version they have, under new event ids; who was erased is a tombstone again. Readers who know
/// it all take it for what it is.
#[tokio::test(flavor = "multi_thread")]
async fn states_are_republished_as_they_are_and_nothing_else() {
    let mut system = System::empty().await;
    system.restart(Part::User, &[]).await;
    system.restart(Part::Cache, &[]).await;
    let (alive, erased) = (system.register().await, system.register().await);
    system.rename(alive, "Countess").await.unwrap();
    assert_eq!(system.erase(erased).await.unwrap().status, StatusCode::NO_CONTENT);

    let user = alive.to_string();
    let printed = system.run(Part::User, &["republish", "--user", &user]).await.unwrap();
    assert_eq!(printed, "republished: 1 states, 0 tombstones\n");
    assert_eq!(states(&system).await, [(alive, vec![1, 2, 2]), (erased, vec![1, -2])].into());

    let printed = system.run(Part::User, &["republish"]).await.unwrap();
    assert!(printed.ends_with("republished: 1 states, 1 tombstones\n"), "{printed}");
    assert_eq!(states(&system).await, [(alive, vec![1, 2, 2, 2]), (erased, vec![1, -2, -2])].into());
    let ids: BTreeSet<Uuid> =
        system.read(STATE).iter().map(|record| record.header("ce_id").unwrap().parse().unwrap()).collect();
    assert_eq!(ids.len(), 7, "every one has an event id of its own");
    assert_eq!(system.read("user.events.v1").len(), 4, "nothing happened, so there is no fact of it");
    eventually_eq("the cache knows them", 3.0, async || system.counted("cache.profiles", "duplicate").await).await;
    assert_eq!((system.seen(alive).await, system.seen(erased).await), (Ok(2), Err(StatusCode::NOT_FOUND)));

    let nobody = Uuid::now_v7().to_string();
    let refused = system.run(Part::User, &["republish", "--user", &nobody]).await.unwrap_err().to_string();
    assert!(refused.contains(&format!("--user {nobody}: nobody was ever registered under this id")), "{refused}");
}

/// I3 I4: among commands that go on, the last record of each key still has its highest version.
#[tokio::test(flavor = "multi_thread")]
async fn a_republish_under_load_leaves_each_newest_state_last() {
    let system = user_service(&[]).await;
    let watch = system.watch().await;
    unheard_of(&system, 450).await;
    let load = system.load(4);
    let at_least = async |accepted| {
        eventually("users are registered", async || (load.accepted() >= accepted).then_some(())).await;
    };
    at_least(8).await;
    let mut runs = 0;
    while runs < 3 || load.accepted() < 24 {
        system.run(Part::User, &["republish"]).await.unwrap();
        runs += 1;
    }
    load.end().await;
    system.until_published(&watch).await;
    let mut newest: BTreeMap<Uuid, i64> = BTreeMap::new();
    for (key, versions) in states(&system).await {
        let versions: Vec<i64> = versions.into_iter().map(i64::abs).collect();
        assert!(versions.is_sorted(), "{key} goes back: {versions:?}");
        let known: BTreeSet<i64> = versions.iter().copied().collect();
        assert!(known.into_iter().eq(1..=versions[versions.len() - 1]), "{key} has gaps: {versions:?}");
        newest.insert(key, versions[versions.len() - 1]);
    }
    let users: Vec<(Uuid, i64)> = sqlx::query_as("select id, version from users").fetch_all(&watch.user).await.unwrap();
    assert_eq!(newest, users.into_iter().collect(), "the last state of each user");
}

/// While nothing is published a run fills the outbox up to its mark of 2,000 rows and waits there; then it goes on by itself.
#[tokio::test(flavor = "multi_thread")]
async fn a_republish_waits_for_the_relay() {
    let mut system = System::empty().await;
    let db = system.database(Part::User).await;
    let mut leader = db.acquire().await.unwrap().detach();
    sqlx::raw_sql("select pg_advisory_lock(x'6f7574626f78'::bigint)").execute(&mut leader).await.unwrap();
    system.restart(Part::User, &[]).await;
    unheard_of(&system, 3_000).await;
    let rows = async || sqlx::query_scalar::<_, i64>("select count(*) from outbox").fetch_one(&db).await.unwrap();
    let republish = system.run(Part::User, &["republish"]);
    let watch = async {
        eventually_eq("the outbox is filled up to the mark", 2_000, rows).await;
        throughout(Duration::from_secs(1), "it waits", async || rows().await == 2_000).await;
        leader.close().await.unwrap();
    };
    let (printed, ()) = tokio::join!(republish, watch);
    assert!(printed.unwrap().ends_with("republished: 3000 states, 0 tombstones\n"));
    assert_eq!(states(&system).await.len(), 3_000);
}

/// A run that is killed in the middle has written whole batches; it goes on where it was, or from the beginning, and misses nobody.
#[tokio::test(flavor = "multi_thread")]
async fn a_republish_that_is_killed_is_run_again() {
    let mut system = user_service(&[]).await;
    unheard_of(&system, 1_200).await;
    let erased = system.register().await;
    assert_eq!(system.erase(erased).await.unwrap().status, StatusCode::NO_CONTENT);

    system.set("FAULT_AT", "republish.before_commit:2:kill");
    system.run(Part::User, &["republish"]).await.unwrap_err();
    let told = states(&system).await;
    assert_eq!(told.len(), 500 + 1, "one batch, and who told of themselves");
    let last = told.keys().filter(|key| **key != erased).max().unwrap().to_string();

    system.set("FAULT_AT", "nowhere:1:kill");
    let printed = system.run(Part::User, &["republish", "--after", &last]).await.unwrap();
    assert!(printed.ends_with("republished: 700 states, 1 tombstones\n"), "{printed}");
    let told = states(&system).await;
    assert_eq!(told.len(), 1_201);
    assert_eq!(told[&erased], [1, -2, -2]);

    let printed = system.run(Part::User, &["republish"]).await.unwrap();
    assert!(printed.ends_with("republished: 1200 states, 1 tombstones\n"), "{printed}");
    assert!(states(&system).await.into_iter().all(|(key, versions)| key == erased || versions == [1, 1]));
}

/// T38: the compacted topic is deleted. It is filled again from the record of state, the users' table; and its readers, who start
/// anew, know everybody again and the erased still not.
#[tokio::test(flavor = "multi_thread")]
async fn a_state_topic_that_was_deleted_is_filled_again() {
    let mut system = System::empty().await;
    let _valkey = system.own_valkey().await;
    let parts = [Part::User, Part::Email, Part::Cache];
    for part in parts {
        system.spawn(part, &[]);
    }
    system.ready(&parts).await;
    let email = api::address();
    let (alive, erased) = (system.register_as(&email).await, system.register().await);
    system.rename(alive, "Countess").await.unwrap();
    assert_eq!(system.erase(erased).await.unwrap().status, StatusCode::NO_CONTENT);
    eventually_eq("the cache has them", (Ok(2), Err(StatusCode::NOT_FOUND)), async || {
        (system.seen(alive).await, system.seen(erased).await)
    })
    .await;

    for part in parts {
        system.stop(part).await;
    }
    system.delete_topic(STATE).await;
    system.reset_group("email.recipients").await;
    system.reset_group("cache.profiles").await;
    let () = redis::cmd("FLUSHALL").query_async(&mut system.valkey().await).await.unwrap();
    let db = system.database(Part::Email).await;
    sqlx::query("delete from recipients").execute(&db).await.unwrap();
    for part in parts {
        system.spawn(part, &[]);
    }
    system.ready(&parts).await;
    assert_eq!(system.read(STATE), [], "the topic is new");

    system.run(Part::User, &["republish"]).await.unwrap();
    assert_eq!(system.until_cached(alive, 2).await.body["display_name"], "Countess");
    assert_eq!(system.seen(erased).await, Err(StatusCode::NOT_FOUND));
    eventually_eq("the recipient", Some((2, Some(email.clone()))), async || system.recipient(alive).await).await;
    eventually_eq("the erased one", Some((2, None)), async || system.recipient(erased).await).await;
}

/// I14: on a topic that nobody writes to any more the heartbeat alone brings it about that an erased address disappears, also from
/// closed segments. Times are shortened: a segment and a lag of 100 ms instead of a day and a week.
#[tokio::test(flavor = "multi_thread")]
async fn an_erased_address_disappears_from_a_quiet_topic() {
    let system = user_service(&[("HEARTBEAT_INTERVAL_MS", "1000")]).await;
    let email = api::address();
    let (erased, other) = (system.register_as(&email).await, system.register().await);
    eventually("the topic has both", async || (states(&system).await.len() == 2).then_some(())).await;
    let settings = [
        ("cleanup.policy", "compact"),
        ("message.timestamp.type", "LogAppendTime"),
        ("segment.ms", "100"),
        ("max.compaction.lag.ms", "100"),
    ];
    system.alter_topic(STATE, &settings).await;
    assert_eq!(system.erase(erased).await.unwrap().status, StatusCode::NO_CONTENT);
    let holds = |record: &Raw| record.text().contains(&email);
    eventually("nothing of the erased user is in the log", async || {
        let log = system.read(STATE);
        // The tombstone is there, so what is not there any more has been there.
        let erasure = log.iter().any(|record| record.key_text() == erased.to_string() && record.value.is_none());
        (erasure && !log.iter().any(holds)).then_some(())
    })
    .await;
    let mut others = system.read(STATE).into_iter().filter(|record| record.key_text() == other.to_string());
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
        let user = system.register().await;
        users.entry(Topic::USER_STATE.partition_of(user)).or_insert(user);
    }
    let log = states(&system).await;
    for record in system.read(STATE) {
        assert_eq!(Topic::USER_STATE.partition_of(record.key_text().parse().unwrap()), record.partition);
    }
    let watch = system.watch().await;
    let diary = "create table beats (at timestamptz not null);
        create function keep_beat() returns trigger language plpgsql as $$
        begin insert into beats values (new.beaten_at); return null; end $$;
        create trigger keep_beat after update on heartbeats for each row execute function keep_beat();";
    sqlx::raw_sql(diary).execute(&watch.user).await.unwrap();

    let interval = [("HEARTBEAT_INTERVAL_MS", "1000")];
    let second = system.spawn_another(Part::User, &interval);
    system.restart(Part::User, &interval).await;
    eventually("four heartbeats", async || (watch.count("select count(*) from beats").await >= 4).then_some(())).await;
    drop(second);
    system.stop(Part::User).await;

    let gaps: Vec<f64> = sqlx::query_scalar(
        "select extract(epoch from at - lag(at) over (order by at))::float8 from beats order by at offset 1",
    )
    .fetch_all(&watch.user)
    .await
    .unwrap();
    assert!(gaps.iter().all(|gap| *gap >= INTERVAL), "seconds between heartbeats: {gaps:?}");
    let told: Vec<(Uuid, i64)> = sqlx::query_as("select key, count(*) from ledger where topic = $1 group by key")
        .bind(STATE)
        .fetch_all(&watch.user)
        .await
        .unwrap();
    let partitions: BTreeSet<i32> = told.iter().map(|(key, _)| Topic::USER_STATE.partition_of(*key)).collect();
    assert_eq!((told.len(), partitions.len()), (6, 6), "one user in each partition");
    assert!(told.iter().all(|(key, beats)| *beats as usize == gaps.len() + 1 && log.contains_key(key)), "{told:?}");
}
