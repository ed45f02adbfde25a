//! Kafka loses brokers: of three that have a copy of everything, any one may be away.

use tests::checker::{Asked, Outcome};
use tests::load::{Answers, Load};
use tests::services::USER_EVENTS;
use tests::{DEADLINE, System};
use tokio::time::timeout;

/// Accepted while a broker is away, each time.
const MEANWHILE: usize = 5;
/// The key of a record that nobody may ever see.
const LATE: &[u8] = b"late";

/// T14, I1 to I14: under load the leader of a partition is killed; its successor is frozen until it is given up, and thawed; then
/// a broker is restarted as a roll-out does, and in a full run all of them in turn. With one of them away everything goes on, and
/// registrations never even notice.
#[tokio::test(flavor = "multi_thread")]
async fn of_three_brokers_one_may_be_killed_frozen_or_restarted() {
    let mut system = System::empty_on_three_brokers().await;
    system.processes.start_all().await;
    let judge = system.judge().await;
    system.users.register().await; // with the patience that a service needs which has only just started
    let load = system.load(1);
    load.until_accepted(MEANWHILE).await;
    system.kafka.until_in_sync().await;

    kill_the_leader(&mut system, &load).await;
    freeze_the_leader(&mut system, &load).await;
    for id in tests::repeats(&[1], &[1, 2, 3]).map(u32::cast_signed) {
        system.broker(id).stop().await;
        load.until_accepted(MEANWHILE).await;
        system.broker(id).restart().await.unwrap();
        system.kafka.until_in_sync().await;
    }

    let answers = load.end().await;
    assert_eq!(not_done(&answers), Vec::<String>::new(), "writes without success");
    judge.check_with(&mut system, &answers).await;
}

/// SIGKILL: what it had acknowledged is on another.
async fn kill_the_leader(system: &mut System, load: &Load) {
    let leader = system.kafka.leader_of(USER_EVENTS, 0).await;
    system.broker(leader).process.kill();
    load.until_accepted(MEANWHILE).await;
    system.kafka.leader_other_than(leader, USER_EVENTS, 0).await;
    new_ones_arrive(system).await;
    system.broker(leader).restart().await.unwrap();
    system.kafka.until_in_sync().await;
}

/// SIGSTOP for longer than its session of 5 s. It wakes up as a leader, with a request in its socket, and must take nothing any
/// more: the record is not acknowledged, nor is it in the log.
async fn freeze_the_leader(system: &mut System, load: &Load) {
    let leader = system.kafka.leader_of(USER_EVENTS, 0).await;
    system.broker(leader).process.freeze();
    load.until_accepted(MEANWHILE).await;
    system.kafka.leader_other_than(leader, USER_EVENTS, 0).await;
    let address = system.broker(leader).address();
    let late = tokio::spawn(tests::kafka::append_at(address, system.kafka.prefixed(USER_EVENTS), 0, LATE));
    new_ones_arrive(system).await;
    system.broker(leader).process.thaw();
    let answer = timeout(DEADLINE, late).await.unwrap().unwrap();
    assert!(answer.is_err(), "a leader that was given up has acknowledged a record: {answer:?}");
    system.kafka.until_in_sync().await;
    let log = system.kafka.read(USER_EVENTS);
    assert!(log.iter().all(|record| record.key.as_deref() != Some(LATE)), "the late record is in the log");
}

/// Who registers now, so many that some are on a partition of the broker that is away.
async fn new_ones_arrive(system: &System) {
    for _ in 0..12 {
        let user = system.users.register().await;
        system.users.until_cached(user, 1).await;
    }
}

fn not_done(answers: &Answers) -> Vec<String> {
    let writes = answers.operations.iter().filter(|operation| operation.asked != Asked::Read);
    let failed = writes.filter(|operation| !matches!(operation.outcome, Outcome::Done(_)));
    failed.map(|operation| format!("{operation:?}")).collect()
}
