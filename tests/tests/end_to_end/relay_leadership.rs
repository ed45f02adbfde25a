//! One relay leads per outbox. Another takes over when the leader dies, and a frozen leader is
//! fenced.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use reqwest::StatusCode;
use tests::http::{send, send_with_retries};
use tests::processes::ServiceProcess;
use tests::services::{USER_EVENTS, USER_STATE};
use tests::users::Users;
use tests::{System, eventually, eventually_eq};
use tokio::task::JoinSet;
use topology::USER;
use uuid::Uuid;

/// The pause of a writer between two requests. It leaves the processor to the processes under test.
const PAUSE: Duration = Duration::from_millis(10);
/// A relay that has published this many rounds more than before is the leader.
const LEADER_ROUNDS: f64 = 5.0;

/// T07, I3, I4: one of three relays publishes. It is killed under load, and then its successor.
/// Each time another relay takes over at once, because Postgres frees the lock of a dead session.
/// No event is lost, and no key's order changes.
#[tokio::test(flavor = "multi_thread")]
async fn one_of_several_relays_leads_and_another_takes_over_when_it_dies() {
    let mut system = System::start_only(&[USER]).await;
    let judge = system.judge().await;
    let mut copies: Vec<ServiceProcess> = (0..3).map(|_| system.processes.spawn_another(USER)).collect();
    for copy in &mut copies {
        copy.until_ready().await;
    }
    let users = system.users.register_many(4).await;
    system.stores.until_outbox_empty(USER).await;
    system.processes.stop(USER).await;

    let writers = Writers::start(&system, &copies, &users);
    while copies.len() > 1 {
        let leader = only_leader(&copies).await;
        copies.remove(leader).kill();
    }
    only_leader(&copies).await;
    writers.end().await;
    judge.check(&mut system).await;
    assert!(system.stores.outbox_record(USER).await.len() > 20, "the writers must write more than 20 events");
}

/// Waits until one relay publishes, and returns its index. Panics if another one has published.
async fn only_leader(copies: &[ServiceProcess]) -> usize {
    let before = published_rounds(copies).await;
    let leader = eventually("a relay publishes", async || {
        let now = published_rounds(copies).await;
        (0..copies.len()).find(|copy| now[*copy] >= before[*copy] + LEADER_ROUNDS)
    })
    .await;
    let mut others = published_rounds(copies).await;
    others.remove(leader);
    // Former leaders are dead, so the other processes have never led.
    assert!(others.iter().all(|rounds| *rounds == 0.0), "rounds of relays that never led: {others:?}");
    leader
}

/// How many rounds the relay of each process has published.
async fn published_rounds(copies: &[ServiceProcess]) -> Vec<f64> {
    let mut rounds = vec![];
    for copy in copies {
        let published = copy.admin().metric("relay_rounds_total", &["outcome=\"published\""]).await;
        rounds.push(published.unwrap_or(0.0));
    }
    rounds
}

/// Tasks that rename users, through every copy in turn. They ignore a copy that does not answer.
struct Writers {
    tasks: JoinSet<()>,
    stop: Arc<AtomicBool>,
}

impl Writers {
    fn start(system: &System, copies: &[ServiceProcess], users: &[Uuid]) -> Self {
        let clients: Vec<Users> = copies.iter().map(|copy| system.users.at(copy)).collect();
        let mut writers = Self { tasks: JoinSet::new(), stop: Arc::default() };
        for &id in users {
            let clients = clients.clone();
            let stop = writers.stop.clone();
            writers.tasks.spawn(async move {
                for (turn, client) in clients.iter().cycle().enumerate() {
                    if stop.load(Ordering::Relaxed) {
                        break;
                    }
                    let _ = client.rename(id, &format!("Name {turn}")).await;
                    tokio::time::sleep(PAUSE).await;
                }
            });
        }
        writers
    }

    async fn end(mut self) {
        self.stop.store(true, Ordering::Relaxed);
        while let Some(writer) = self.tasks.join_next().await {
            writer.unwrap();
        }
    }
}

/// T09: the leader is frozen at `point`, inside the round that publishes version 2. A second
/// process publishes newer versions, and the last of them erases the user. Then the first process
/// is thawed, with its round still in progress. The user service of the system is ready.
pub(super) async fn a_leader_frozen_at(point: &str, system: &mut System) {
    let judge = system.judge().await;
    let id = system.users.register().await;
    system.stores.until_outbox_empty(USER).await;
    system.processes.start_with(USER, &[("FAULT_AT", &format!("{point}:1:stop"))]).await;
    // The process freezes before or after it has answered.
    let renaming = tokio::spawn(send(system.users.renaming(id, "Two")));
    system.processes.until_frozen(USER).await;

    let mut successor = system.processes.spawn_another(USER);
    successor.until_ready().await;
    let users = system.users.at(&successor);
    assert_eq!(send_with_retries(|| users.renaming(id, "Three")).await.version(), 3);
    assert_eq!(send_with_retries(|| users.erasure(id)).await.status, StatusCode::NO_CONTENT);
    // Postgres ends the frozen session after 15 s, which frees the lock.
    system.stores.until_outbox_empty(USER).await;

    system.processes.thaw(USER);
    assert_eq!(renaming.await.unwrap().unwrap().version(), 2);
    system.processes.until_logged(USER, "relay lost its term").await;
    judge.check(system).await;
    let facts = system.kafka.read_key(USER_EVENTS, id).len();
    assert_eq!(facts, 4, "facts: the thawed leader must not publish its round");

    system.kafka.force_compaction().await;
    let compacted = eventually("the state topic is compacted", async || {
        system.kafka.roll_states().await;
        let records = system.kafka.read_key(USER_STATE, id);
        (records.len() <= 1).then_some(records)
    })
    .await;
    for record in compacted {
        assert_eq!((record.version(), record.value), (4, None), "I4: compaction must keep the tombstone");
    }
    judge.check(system).await;
}

/// T09, I3, I4: records that were in the producer's queue at the freeze are not sent after it.
#[tokio::test(flavor = "multi_thread")]
async fn a_leader_frozen_before_its_records_are_sent_is_fenced() {
    a_leader_frozen_at("relay.after_enqueue", &mut System::start_only(&[USER]).await).await;
}

/// T09, I3, I4: records that Kafka had acknowledged at the freeze are not committed after it.
#[tokio::test(flavor = "multi_thread")]
async fn a_leader_frozen_before_its_commit_is_fenced() {
    a_leader_frozen_at("relay.after_ack", &mut System::start_only(&[USER]).await).await;
}

/// T09, I3: Kafka takes long to acknowledge a round. The leader uses the session of its lock
/// meanwhile, so that Postgres, which closes idle sessions, does not take it for a frozen process.
#[tokio::test(flavor = "multi_thread")]
async fn a_leader_keeps_its_session_while_it_waits_for_kafka() {
    let mut system = System::empty().await;
    let end_of_stall = system.processes.file("end-of-stall");
    let stall = ("FAULT_AT", "relay.after_ack:1:stall");
    system.processes.spawn_with(USER, &[stall, ("FAULT_UNTIL", end_of_stall.to_str().unwrap())]);
    system.processes.until_ready(&[USER]).await;
    system.users.register().await;
    system.processes.until_logged(USER, "fault point reached").await;
    let db = system.stores.database(USER).await;
    let used = "select count(*) from pg_stat_activity join pg_locks using (pid)
                where locktype = 'advisory' and query = 'select 1' and datname = current_database()";
    eventually_eq("sessions of the leader that were used while it waits", 1, async || {
        sqlx::query_scalar::<_, i64>(used).fetch_one(&db).await.unwrap()
    })
    .await;
    std::fs::write(end_of_stall, "").unwrap();
    system.stores.until_outbox_empty(USER).await;
}
