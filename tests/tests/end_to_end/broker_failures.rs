//! Kafka loses brokers. Each of three brokers has a copy of everything, so any one may be down.

use tests::checker::{Outcome, Request};
use tests::load::{Answers, Load};
use tests::record::Draft;
use tests::services::{OPERATOR_ACTIONS, TOPICS, USER_EVENTS, dead_letters_of, groups};
use tests::{DEADLINE, System, eventually, eventually_eq};
use tokio::time::timeout;
use topology::ANALYTICS;
use uuid::Uuid;

/// Registrations that must be accepted during each fault.
const ACCEPTED: usize = 5;
/// Key of a record that a former leader must not append.
const LATE: &[u8] = b"late";

/// T14, I1 to I14: Under load the leader of a partition is killed. Then its successor is frozen
/// until another broker leads, and is thawed. Then a broker is restarted, as in a rolling upgrade;
/// a full run restarts all three in turn. While one broker is down, the system keeps working, and
/// every write of the clients succeeds.
#[tokio::test(flavor = "multi_thread")]
async fn any_one_of_three_brokers_can_be_killed_frozen_or_restarted() {
    let mut system = System::empty_on_three_brokers().await;
    system.processes.start_all().await;
    let judge = system.judge().await;
    // Retries while the service starts. The load does not: it would count a 503 as a failed write.
    system.users.register().await;
    let load = system.load(1);
    load.until_accepted(ACCEPTED).await;
    system.kafka.until_in_sync().await;

    kill_the_leader(&mut system, &load).await;
    freeze_the_leader(&mut system, &load).await;
    for id in tests::repeats(&[1], &[1, 2, 3]).map(u32::cast_signed) {
        system.broker(id).stop().await;
        load.until_accepted(ACCEPTED).await;
        system.broker(id).restart().await.unwrap();
        system.kafka.until_in_sync().await;
    }

    let answered = load.end().await;
    assert_eq!(unsuccessful_writes(&answered), Vec::<String>::new(), "writes that did not succeed");
    judge.check_with(&mut system, &answered).await;
}

/// T14, I3: Kafka's own default lets one replica acknowledge a record, which is lost with that
/// replica. The services create their topics so that most replicas must have it. When one of three
/// is left, it refuses records.
#[tokio::test(flavor = "multi_thread")]
async fn one_of_three_replicas_acknowledges_nothing_alone() {
    const NOT_ENOUGH_REPLICAS: [i16; 2] = [19, 20];
    let mut system = System::empty_on_three_brokers().await;
    let brokers = ["--entity-type", "brokers", "--entity-default"];
    let change = ["--alter", "--add-config", "min.insync.replicas=1"];
    let arguments: Vec<&str> = brokers.iter().chain(&change).copied().collect();
    system.broker(1).tool("kafka.admin.ConfigCommand", &arguments).await.unwrap();
    system.processes.start_all().await;
    let letters = groups().map(dead_letters_of);
    for topic in TOPICS.into_iter().chain([OPERATOR_ACTIONS]).map(str::to_owned).chain(letters) {
        let (settings, replicas) = system.kafka.topic_settings(&topic).await;
        let in_sync = settings.get("min.insync.replicas").map(String::as_str);
        assert_eq!((in_sync, replicas), (Some("2"), 3), "{topic}");
    }

    system.kafka.until_in_sync().await;
    let leader = system.kafka.leader_of(USER_EVENTS, 0).await;
    for id in [1, 2, 3].into_iter().filter(|id| *id != leader) {
        system.broker(id).stop().await;
    }
    let address = system.broker(leader).address();
    let topic = system.kafka.prefixed(USER_EVENTS);
    eventually("the last replica refuses a record", async || {
        match tests::kafka::append_at(address.clone(), topic.clone(), 0, LATE).await {
            Ok(offset) => panic!("one replica has acknowledged a record alone, at offset {offset}"),
            Err(code) => NOT_ENOUGH_REPLICAS.contains(&code).then_some(()),
        }
    })
    .await;
    for id in [1, 2, 3].into_iter().filter(|id| *id != leader) {
        system.broker(id).spawn_again().unwrap();
    }
    system.kafka.until_in_sync().await;
    system.users.register().await;
}

/// SIGKILL. Every record that the leader acknowledged is on another broker too.
async fn kill_the_leader(system: &mut System, load: &Load) {
    let leader = system.kafka.leader_of(USER_EVENTS, 0).await;
    system.broker(leader).process.kill();
    load.until_accepted(ACCEPTED).await;
    system.kafka.leader_other_than(leader, USER_EVENTS, 0).await;
    new_users_reach_the_cache(system).await;
    system.broker(leader).restart().await.unwrap();
    system.kafka.until_in_sync().await;
}

/// SIGSTOP for longer than the broker's session of 5 s. When the broker resumes, it believes that
/// it still leads, and its socket holds a request. It must not accept the request: the record is
/// neither acknowledged nor in the log.
async fn freeze_the_leader(system: &mut System, load: &Load) {
    let leader = system.kafka.leader_of(USER_EVENTS, 0).await;
    system.broker(leader).process.freeze();
    load.until_accepted(ACCEPTED).await;
    system.kafka.leader_other_than(leader, USER_EVENTS, 0).await;
    let address = system.broker(leader).address();
    let late = tokio::spawn(tests::kafka::append_at(address, system.kafka.prefixed(USER_EVENTS), 0, LATE));
    new_users_reach_the_cache(system).await;
    system.broker(leader).process.thaw();
    let answer = timeout(DEADLINE, late).await.unwrap().unwrap();
    assert!(answer.is_err(), "the former leader has acknowledged a record: {answer:?}");
    system.kafka.until_in_sync().await;
    let log = system.kafka.read(USER_EVENTS);
    assert!(log.iter().all(|record| record.key.as_deref() != Some(LATE)), "the late record is in the log");
}

/// Registers enough users that some of them are on a partition that the lost broker led.
async fn new_users_reach_the_cache(system: &System) {
    for _ in 0..12 {
        let user = system.users.register().await;
        system.users.until_cached(user, 1).await;
    }
}

fn unsuccessful_writes(answered: &Answers) -> Vec<String> {
    let writes = answered.operations.iter().filter(|operation| operation.request != Request::Read);
    let unsuccessful = writes.filter(|operation| !matches!(operation.outcome, Outcome::Done(_)));
    unsuccessful.map(|operation| format!("{operation:?}")).collect()
}

/// T14, I12: a group reads its topic for the first time, and one broker, which has the only replica
/// of some partitions, is down. The group starts with the other partitions.
#[tokio::test(flavor = "multi_thread")]
async fn a_new_group_reads_the_partitions_that_have_a_leader() {
    const PARTITIONS: i32 = 6;
    let mut system = System::empty_on_three_brokers().await;
    system.kafka.create_topic(USER_EVENTS, PARTITIONS, &[("min.insync.replicas", "1"), ("retention.ms", "-1")]).await;
    let fact = |partition| Draft::user_event("user.registered", Uuid::now_v7(), 1).on(partition);
    system.kafka.write_all(USER_EVENTS, &(0..PARTITIONS).map(fact).collect::<Vec<_>>()).await;
    let lost = system.kafka.leader_of(USER_EVENTS, 0).await;
    let mut readable = 0;
    for partition in 0..PARTITIONS {
        readable += i64::from(system.kafka.leader_of(USER_EVENTS, partition).await != lost);
    }
    assert!(readable > 0, "all partitions are on one broker");
    system.broker(lost).process.kill();
    system.kafka.until_no_leader(USER_EVENTS, 0).await;

    system.processes.spawn(ANALYTICS);
    eventually_eq("users of the other partitions", readable, async || system.users.funnel().await.0).await;
    system.broker(lost).restart().await.unwrap();
    eventually_eq("all users", i64::from(PARTITIONS), async || system.users.funnel().await.0).await;
}
