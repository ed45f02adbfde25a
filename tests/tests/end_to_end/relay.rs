//! The way from the outbox to Kafka, and what follows from it, while processes die, freeze and find Kafka gone.

use std::collections::BTreeMap;
use std::time::Duration;

use reqwest::{Client, StatusCode};
use serde_json::json;
use sqlx::PgConnection;
use testbed::services::RunningService;
use tests::api::{self, Answer, send};
use tests::checker::{Asked, Outcome};
use tests::load::Answered;
use tests::log::Raw;
use tests::watch::{Watch, copies};
use tests::{Part, System, eventually, eventually_eq, throughout};
use uuid::Uuid;

/// The user service alone, ready, and every event it will ever commit.
async fn user_alone() -> (System, Watch) {
    let mut system = System::empty().await;
    system.restart(Part::User, &[]).await;
    let watch = system.watch().await;
    (system, watch)
}

async fn until_frozen(system: &mut System, part: Part) {
    eventually(&format!("{part:?} is frozen"), async || system.is_frozen(part).then_some(())).await;
}

/// T04, T05, I1, I3, I4: wherever the relay is killed, under load, no event is lost and none comes out of order; and though some
/// were published twice, at new offsets, each has its effects once. Twice per point, and in a full run eight times.
#[tokio::test(flavor = "multi_thread")]
async fn a_relay_killed_at_any_point_loses_nothing_reorders_nothing_and_doubles_no_effect() {
    let mut system = System::start().await;
    let watch = system.watch().await;
    let load = system.load(2);
    for point in ["after_read", "after_enqueue", "after_ack", "after_commit", "after_delete"] {
        for nth in tests::repeats(&[1, 4], &[1, 2, 3, 4, 5, 6, 7, 8]) {
            system.spawn(Part::User, &[("FAULT_AT", &format!("relay.{point}:{nth}:kill"))]);
            system.until_ended(Part::User).await;
        }
    }
    system.restart(Part::User, &[]).await;
    load.until_accepted(10).await;
    let answered = load.end().await;
    assert!(answered.refused().is_empty(), "{:?}", answered.refused());
    let history = system.check(&watch, &answered).await;
    assert!(copies(&history.facts) > 0, "a crash between commit and delete publishes twice");
    let duplicates = system.metric(Part::Analytics, "events_consumed_total", &["outcome=\"duplicate\""]).await;
    assert!(duplicates.is_some_and(|count| count > 0.0), "the copies have reached analytics: {duplicates:?}");
}

/// Puts an event into the outbox, as a command would.
async fn put(db: &mut PgConnection, topic: &str, key: Uuid, version: i64) {
    let insert = "insert into outbox (event_id, topic, aggregatetype, aggregateid, version, type, payload, occurred_at)
                  values ($1, $2, 'user', $3, $4, 'user.profile_changed', $5, now())";
    let payload = json!({ "user_id": key }).to_string().into_bytes();
    let row = sqlx::query(insert).bind(Uuid::now_v7()).bind(topic).bind(key).bind(version).bind(payload);
    row.execute(db).await.unwrap();
}

/// T06, I3, I4: ids are given out before the commit, so a transaction with low ids may become visible after one with high ids
/// was published. A relay that remembers how far it has read would never see it.
#[tokio::test(flavor = "multi_thread")]
async fn a_transaction_that_commits_after_later_ids_were_published_is_not_lost() {
    let (mut system, watch) = user_alone().await;
    let (late, early) = (Uuid::now_v7(), Uuid::now_v7());
    let mut first = watch.user.begin().await.unwrap();
    put(&mut first, "user.events.v1", late, 1).await;

    let mut second = watch.user.begin().await.unwrap();
    for version in [1, 2] {
        put(&mut second, "user.events.v1", early, version).await;
    }
    second.commit().await.unwrap();
    eventually_eq("the later ids are published", 2, async || system.read("user.events.v1").len()).await;

    put(&mut first, "user.events.v1", late, 2).await;
    first.commit().await.unwrap();
    let mut third = watch.user.acquire().await.unwrap();
    put(&mut third, "user.events.v1", late, 3).await;
    system.check(&watch, &Answered::default()).await;
    assert_eq!(system.read("user.events.v1").len(), 5, "all of them");
}

/// A backlog of the largest rows does not become a round that no time-out allows: it goes out in rounds of some MiB.
#[tokio::test(flavor = "multi_thread")]
async fn a_backlog_of_large_rows_goes_out_in_rounds_that_can_succeed() {
    let (mut system, watch) = user_alone().await;
    let insert = "insert into outbox (event_id, topic, aggregatetype, aggregateid, version, type, payload, occurred_at)
                  select gen_random_uuid(), 'user.events.v1', 'user', $1, n, 'user.profile_changed',
                      case when n % 10 > 0 then convert_to(rpad('', 900000, 'x'), 'utf8') else '{}' end, now()
                  from generate_series(1, 40) n";
    sqlx::query(insert).bind(Uuid::now_v7()).execute(&watch.user).await.unwrap();
    system.until_published(&watch).await;
    let rounds = system.metric(Part::User, "relay_rounds_total", &["outcome=\"published\""]).await.unwrap();
    assert!(rounds >= 7.0, "{rounds} rounds for 32 MB");
    system.check(&watch, &Answered::default()).await;
}

/// `PATCH` or `DELETE` of a user, sent to any process of the service.
async fn change(process: &RunningService, id: Uuid, display_name: Option<&str>) -> Answer {
    let url = format!("{}/users/{id}", process.instance.url());
    let request = match display_name {
        Some(name) => Client::new().patch(url).json(&json!({ "display_name": name })),
        None => Client::new().delete(url),
    };
    api::answered(|| request.try_clone().unwrap()).await
}

fn of_key(records: Vec<Raw>, key: Uuid) -> Vec<Raw> {
    records.into_iter().filter(|record| record.key_text() == key.to_string()).collect()
}

/// T09: the leader is frozen inside the round that publishes version 2, at `point`. A second process publishes newer versions,
/// the last of which erases the user. Then the first wakes up with its round still in hand.
async fn a_leader_frozen_at(point: &str) {
    let (mut system, watch) = user_alone().await;
    let id = system.register().await;
    system.until_published(&watch).await;
    system.restart(Part::User, &[("FAULT_AT", &format!("{point}:1:stop"))]).await;
    let url = system.url(Part::User, &format!("/users/{id}"));
    let renaming = Client::new().patch(url).json(&json!({ "display_name": "Two" }));
    let renaming = tokio::spawn(send(renaming)); // frozen before or after it has answered
    until_frozen(&mut system, Part::User).await;

    let mut successor = system.spawn_another(Part::User, &[]);
    successor.until_ready().await.unwrap();
    assert_eq!(change(&successor, id, Some("Three")).await.version(), 3);
    assert_eq!(change(&successor, id, None).await.status, StatusCode::NO_CONTENT);
    // Postgres ends the frozen session, and with it the lock, after 15 s.
    system.until_published(&watch).await;

    system.thaw(Part::User);
    assert_eq!(renaming.await.unwrap().unwrap().version(), 2);
    eventually("the thawed relay has given up its round", async || {
        system.log_of(Part::User).contains("the relay starts over").then_some(())
    })
    .await;
    system.check(&watch, &Answered::default()).await;
    assert_eq!(of_key(system.read("user.events.v1"), id).len(), 4, "each version once: nothing of the round came late");

    system.force_compaction().await;
    let left = eventually("the topic is compacted", async || {
        system.roll_states().await;
        let records = of_key(system.read("user.state.v1"), id);
        (records.len() <= 1).then_some(records)
    });
    for record in left.await {
        assert_eq!((record.version(), record.value), (4, None), "I4: the tombstone is what stays");
    }
    system.check(&watch, &Answered::default()).await;
}

/// T09, I3, I4: what was handed to the client library and not sent before the freeze is not sent after it.
#[tokio::test(flavor = "multi_thread")]
async fn a_leader_frozen_before_its_records_were_sent_is_fenced() {
    a_leader_frozen_at("relay.after_enqueue").await;
}

/// T09, I3, I4: what Kafka had before the freeze is not committed after it.
#[tokio::test(flavor = "multi_thread")]
async fn a_leader_frozen_before_its_commit_is_fenced() {
    a_leader_frozen_at("relay.after_ack").await;
}

/// T10, I4: a row that Kafka will never take blocks what comes after it under the same key, says so, and blocks nobody else.
#[tokio::test(flavor = "multi_thread")]
async fn a_row_that_kafka_refuses_blocks_its_key_and_no_other() {
    let (system, watch) = user_alone().await;
    let (poisoned, other) = (Uuid::now_v7(), Uuid::now_v7());
    let mut tx = watch.user.begin().await.unwrap();
    put(&mut tx, "no.such.topic", poisoned, 1).await;
    put(&mut tx, "user.events.v1", poisoned, 2).await;
    put(&mut tx, "user.events.v1", other, 1).await;
    tx.commit().await.unwrap();

    eventually_eq("the other key flows", 1, async || of_key(system.read("user.events.v1"), other).len()).await;
    let registered = system.register().await;
    eventually_eq("and new ones", 1, async || of_key(system.read("user.events.v1"), registered).len()).await;
    eventually_eq("the blocked key is told", Some(1.0), async || {
        system.metric(Part::User, "outbox_blocked_keys", &[]).await
    })
    .await;
    assert!(of_key(system.read("user.events.v1"), poisoned).is_empty(), "version 2 must not overtake version 1");
    let waiting = "select count(*) from outbox";
    eventually_eq("its rows stay", 2, async || watch.count(waiting).await).await;

    let second = Uuid::now_v7();
    let mut tx = watch.user.begin().await.unwrap();
    put(&mut tx, "none.either", second, 1).await;
    tx.commit().await.unwrap();
    let blocked = async || system.metric(Part::User, "outbox_blocked_keys", &[]).await;
    eventually_eq("a second key is blocked beside the first", Some(2.0), blocked).await;
    let refusals = system.log_of(Part::User).matches("their keys are set aside").count();
    assert!(refusals <= 4, "{refusals} refusals: each comes once, and not both in turn, which would stop everybody");
    let registered = system.register().await;
    eventually_eq("new ones flow", 1, async || of_key(system.read("user.events.v1"), registered).len()).await;

    // Both are asked again, half a minute after they were refused.
    for topic in ["no.such.topic", "none.either"] {
        system.create_topic(topic, 1, &[]).await;
    }
    eventually_eq("rows in the outbox", 0, async || watch.count(waiting).await).await;
    eventually_eq("nobody is blocked any more", Some(0.0), blocked).await;
    assert_eq!(of_key(system.read("user.events.v1"), poisoned).len(), 1, "version 2, after version 1");
}

/// What an operator relies on: facts are kept for ever; of states the newest, and a tombstone for long enough; letters are a table.
#[tokio::test(flavor = "multi_thread")]
async fn topics_are_made_with_the_settings_that_the_promises_rest_on() {
    let mut system = System::empty().await;
    system.set("KAFKA_REPLICATION_FACTOR", "1");
    system.start_all().await;
    let common = [("message.timestamp.type", "LogAppendTime"), ("min.insync.replicas", "1")];
    let facts: &[_] = &[("cleanup.policy", "delete"), ("retention.ms", "-1")];
    let states = [
        ("cleanup.policy", "compact"),
        ("delete.retention.ms", "2592000000"),
        ("max.compaction.lag.ms", "604800000"),
        ("segment.ms", "86400000"),
    ];
    let letters = [("cleanup.policy", "compact"), ("max.message.bytes", "2097152")];
    let topics = [
        ("user.events.v1", facts),
        ("email.events.v1", facts),
        ("user.state.v1", &states),
        ("cache.profiles.dlq", &letters),
    ];
    for (topic, settings) in topics {
        let settings = settings.iter().chain(&common).map(|(name, value)| ((*name).to_owned(), (*value).to_owned()));
        assert_eq!(system.topic_settings(topic).await, (settings.collect(), 1), "{topic}");
    }
}

/// T46: a topic that is not what its owner declares is not written to; the service ends and says what to do.
async fn refuses_to_run_on(topic: &str, partitions: i32, settings: &[(&str, &str)], message: &str) {
    let mut system = System::empty().await;
    system.create_topic(topic, partitions, settings).await;
    for addr in ["HTTP_ADDR", "ADMIN_ADDR"] {
        system.set(addr, &format!("127.0.0.1:{}", testbed::testing::free_port()));
    }
    let ended = system.run(Part::User, &["serve"]).await.expect_err("it ends with a status that is not 0");
    assert!(ended.to_string().contains(message), "{message:?} is not in the log:\n{ended}");
}

/// T46: with another number of partitions keys would change their partition, and order would be lost.
#[tokio::test(flavor = "multi_thread")]
async fn a_topic_with_another_number_of_partitions_stops_its_owner_loudly() {
    refuses_to_run_on("user.events.v1", 3, &[], "has 3 partitions, declared are 6").await;
}

/// T46: without compaction what was erased would stay readable.
#[tokio::test(flavor = "multi_thread")]
async fn a_topic_with_another_cleanup_policy_stops_its_owner_loudly() {
    let settings = [("cleanup.policy", "delete")];
    refuses_to_run_on("user.state.v1", 6, &settings, "has cleanup.policy=delete, declared is compact").await;
}

/// Where an operator makes the topics, a service waits until they are there; what is registered meanwhile waits in the outbox.
#[tokio::test(flavor = "multi_thread")]
async fn a_service_that_may_not_create_topics_waits_for_them() {
    let mut system = System::empty().await;
    system.set("MANAGE_TOPICS", "false");
    system.restart(Part::User, &[]).await;
    system.register().await;
    eventually("it says what it waits for", async || {
        let log = system.log_of(Part::User);
        (log.contains("waiting for Kafka") && log.contains("user.events.v1")).then_some(())
    })
    .await;
    system.create_topic("user.events.v1", 6, &[]).await;
    system.create_topic("user.state.v1", 6, &[("cleanup.policy", "compact")]).await;
    eventually_eq("published", 1, async || system.read("user.state.v1").len()).await;
}

/// How long Kafka is away in the test below.
const OUTAGE: Duration = Duration::from_secs(20);

/// T12, I1, I3, I4: registering does not need Kafka. The outage takes 20 s instead of minutes: by then every time-out of the
/// relay's transaction and of the pool has passed, and what grows has grown.
#[tokio::test(flavor = "multi_thread")]
async fn while_kafka_is_away_registrations_are_accepted_and_afterwards_everything_drains_in_order() {
    let mut system = System::start_on_own_components().await;
    let watch = system.watch().await;
    system.register().await; // with the patience that a service needs which has only just started
    let load = system.load(2);
    load.until_accepted(5).await;
    system.stack.as_mut().unwrap().kafka.process.kill();
    let before = load.accepted();

    // A request waits for no Kafka, so no transaction does: none rests for a second between two statements.
    let resting = "select count(*) from pg_stat_activity where datname = current_database()
                   and state like 'idle in transaction%' and now() - state_change > interval '1 second'";
    throughout(OUTAGE, "no transaction is held open, and the service is ready", async || {
        let ready = system.readiness(Part::User).await.is_some_and(|(ready, _)| ready);
        ready && watch.count(resting).await == 0
    })
    .await;
    let during = load.accepted() - before;
    assert!(during > 20, "the load went on: {during} registrations");
    let waiting = watch.count("select count(*) from outbox").await;
    assert!(waiting >= i64::try_from(2 * during).unwrap(), "{waiting} rows wait after {during} registrations");
    eventually("the metric tells of them", async || {
        system.metric(Part::User, "outbox_rows", &[]).await.filter(|rows| *rows >= 2.0 * during as f64)
    })
    .await;

    system.stack.as_mut().unwrap().kafka.restart().await.unwrap();
    let answered = load.end().await;
    let all = answered.operations.iter().filter(|operation| operation.asked != Asked::Read);
    let failed: Vec<_> = all.filter(|operation| !matches!(operation.outcome, Outcome::Done(_))).collect();
    assert!(failed.is_empty(), "every write was answered with success: {failed:?}");
    system.check(&watch, &answered).await;
}

/// Who has how many mails.
async fn sent(system: &System) -> BTreeMap<String, usize> {
    let mut mails = BTreeMap::new();
    for mail in system.sink.mails() {
        *mails.entry(mail.to.join(",")).or_default() += 1;
    }
    mails
}

/// T45, I5, I7, I9: consumers that are frozen inside their transaction hold rows and partitions. Kafka takes the partitions away
/// after 10 s, Postgres ends the transactions after 5 s, and copies go on. What the first ones do when they wake up is undone.
#[tokio::test(flavor = "multi_thread")]
async fn consumers_frozen_inside_their_transaction_are_replaced_and_double_nothing() {
    let mut system = System::empty().await;
    system.spawn(Part::User, &[]);
    system.spawn(Part::Email, &[("FAULT_AT", "email.before_commit:1:stop")]);
    system.spawn(Part::Analytics, &[("FAULT_AT", "inbox.before_commit:1:stop")]);
    system.ready(&[Part::User, Part::Email, Part::Analytics]).await;
    let watch = system.watch().await;
    let mut addresses: Vec<String> = (0..5).map(|_| api::address()).collect();
    for email in &addresses {
        system.register_as(email).await;
    }
    until_frozen(&mut system, Part::Email).await;
    until_frozen(&mut system, Part::Analytics).await;

    let (mut email, mut analytics) =
        (system.spawn_another(Part::Email, &[]), system.spawn_another(Part::Analytics, &[]));
    email.until_ready().await.unwrap();
    analytics.until_ready().await.unwrap();
    let funnel = format!("{}/funnel", analytics.instance.url());
    eventually_eq("the copies have done all the work", json!({ "registered": 5, "mailed": 5 }), async || {
        send(Client::new().get(&funnel)).await.unwrap().body
    })
    .await;

    system.thaw(Part::Email);
    system.thaw(Part::Analytics);
    addresses.extend((0..5).map(|_| api::address()));
    for email in &addresses[5..] {
        system.register_as(email).await;
    }
    system.ready(&[Part::Email, Part::Analytics]).await;
    eventually_eq("the old and the new work together", (10, 10), async || system.funnel().await).await;
    system.check(&watch, &Answered::default()).await;
    let once: BTreeMap<String, usize> = addresses.into_iter().map(|address| (address, 1)).collect();
    assert_eq!(sent(&system).await, once, "one mail each");
}
