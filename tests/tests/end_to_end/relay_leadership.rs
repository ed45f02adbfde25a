//! One relay leads per outbox. Another takes over when the leader dies, and a frozen leader is fenced.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use reqwest::StatusCode;
use tests::http::{send, send_with_retries};
use tests::processes::ServiceProcess;
use tests::services::{USER_EVENTS, USER_STATE};
use tests::users::Users;
use tests::{System, eventually};
use tokio::task::JoinSet;
use topology::USER;
use uuid::Uuid;

/// The pace of the writers: it leaves the two cores of a small machine to those who are tested.
const PAUSE: Duration = Duration::from_millis(10);

/// T07, I3 I4: of three relays one publishes. It is killed under load, and its successor too: each time one of those that are left
/// takes over, at once, since Postgres frees a dead session's lock. Nothing is lost, and no key's order changes.
#[tokio::test(flavor = "multi_thread")]
async fn of_several_relays_one_leads_and_another_takes_over_when_it_dies() {
    let mut system = System::start_only(&[USER]).await;
    let judge = system.judge().await;
    let mut copies: Vec<ServiceProcess> = (0..3).map(|_| system.processes.spawn_another(USER)).collect();
    for copy in &mut copies {
        copy.until_ready().await;
    }
    let users = system.users.register_many(4).await;
    system.stores.until_outbox_empty(USER).await;
    system.processes.stop(USER).await;

    let writers = Writers::begin(&system, &copies, &users);
    while let Some(leader) = the_one_that_publishes(&copies).await {
        copies.remove(leader).kill();
        if copies.len() == 1 {
            break;
        }
    }
    the_one_that_publishes(&copies).await;
    writers.end().await;
    judge.check(&mut system).await;
    assert!(system.stores.outbox_record(USER).await.len() > 20, "there was something to publish");
}

/// Waits until somebody publishes, and watches for a while that nobody else does.
async fn the_one_that_publishes(copies: &[ServiceProcess]) -> Option<usize> {
    let published = async || {
        let mut rounds = vec![];
        for copy in copies {
            rounds.push(rounds_of(copy).await);
        }
        rounds
    };
    let before = published().await;
    let leader = eventually("a relay leads", async || {
        let now = published().await;
        (0..copies.len()).find(|copy| now[*copy] >= before[*copy] + 5.0)
    })
    .await;
    let others = async || {
        let mut rounds = published().await;
        rounds.remove(leader);
        rounds
    };
    let at_rest = others().await;
    assert!(
        at_rest.iter().all(|rounds| *rounds == 0.0),
        "only leaders have ever published, and they are dead: {at_rest:?}"
    );
    Some(leader)
}

async fn rounds_of(copy: &ServiceProcess) -> f64 {
    copy.admin().metric("relay_rounds_total", &["outcome=\"published\""]).await.unwrap_or(0.0)
}

/// They rename users, through every copy in turn. What a dead one does not answer is of no interest.
struct Writers {
    tasks: JoinSet<()>,
    over: Arc<AtomicBool>,
}

impl Writers {
    fn begin(system: &System, copies: &[ServiceProcess], users: &[Uuid]) -> Self {
        let clients: Vec<Users> = copies.iter().map(|copy| system.users.at(copy)).collect();
        let mut writers = Self { tasks: JoinSet::new(), over: Arc::default() };
        for &id in users {
            let clients = clients.clone();
            let over = writers.over.clone();
            writers.tasks.spawn(async move {
                for (turn, client) in clients.iter().cycle().enumerate() {
                    if over.load(Ordering::Relaxed) {
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
        self.over.store(true, Ordering::Relaxed);
        while let Some(writer) = self.tasks.join_next().await {
            writer.unwrap();
        }
    }
}

/// T09: the leader is frozen inside the round that publishes version 2, at `point`. A second process publishes newer versions,
/// the last of which erases the user. Then the first wakes up with its round still in hand.
async fn a_leader_frozen_at(point: &str) {
    let mut system = System::start_only(&[USER]).await;
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
    // Postgres ends the frozen session, and with it the lock, after 15 s.
    system.stores.until_outbox_empty(USER).await;

    system.processes.thaw(USER);
    assert_eq!(renaming.await.unwrap().unwrap().version(), 2);
    system.processes.until_logged(USER, "the relay starts over").await;
    judge.check(&mut system).await;
    assert_eq!(system.kafka.read_key(USER_EVENTS, id).len(), 4, "each version once: nothing of the round came late");

    system.kafka.force_compaction().await;
    let left = eventually("the topic is compacted", async || {
        system.kafka.roll_states().await;
        let records = system.kafka.read_key(USER_STATE, id);
        (records.len() <= 1).then_some(records)
    });
    for record in left.await {
        assert_eq!((record.version(), record.value), (4, None), "I4: the tombstone is what stays");
    }
    judge.check(&mut system).await;
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
