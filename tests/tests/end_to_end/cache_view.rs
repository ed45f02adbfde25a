//! The cache's view. It is refilled when Valkey loses it, it never returns an older version than
//! before, and it never returns an erased user.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use reqwest::StatusCode;
use testbed::redis::Redis;
use tests::record::Draft;
use tests::services::{
    ANALYTICS_EMAILS, ANALYTICS_USERS, CACHE_PROFILES, DEFAULT_CONSUMERS, EMAIL_EVENTS, EMAIL_RECIPIENTS,
    EMAIL_WELCOME, USER_EVENTS, USER_STATE,
};
use tests::system::Own;
use tests::users::{Users, address};
use tests::{System, eventually, eventually_eq};
use tokio::task::JoinHandle;
use topology::{CACHE, USER};
use uuid::Uuid;

const USERS: usize = 24;

/// T27, I8: FLUSHALL while users are registered and renamed, and again when the system is idle.
#[tokio::test(flavor = "multi_thread")]
async fn the_cache_refills_a_flushed_valkey_under_load_and_when_idle() {
    let (mut system, _valkey, users) = filled_cache().await;
    let clients = Clients::start(&system.users, &users);
    clients.until_progress().await;
    system.stores.flush_valkey().await;
    clients.until_progress().await;
    clients.stop().await;
    assert_view_equals_log(&system).await;

    // The restarted cache has no record to handle before the flush. So it reaches the fault point,
    // and stalls there, when it begins to refill the view.
    let end_of_stall = system.processes.file("seen-empty");
    let stall = [("FAULT_AT", "cache.before_script:1:stall"), ("FAULT_UNTIL", end_of_stall.to_str().unwrap())];
    system.processes.start_with(CACHE, &stall).await;
    eventually_eq("whether the view is complete", true, async || system.users.cached_version(users[0]).await.is_ok())
        .await;
    let reader = Reader::start(&system.users, &users);
    system.stores.flush_valkey().await;
    // No record is written to the topic from now on. The consumer can notice the flush only because
    // it compares its position every second.
    assert_eq!(system.users.cached_version(users[0]).await, Err(StatusCode::SERVICE_UNAVAILABLE));
    std::fs::write(end_of_stall, "").unwrap();
    assert_view_equals_log(&system).await;
    reader.stop().await;
}

/// T27, I8: The same with a Valkey that is killed and comes back empty, as it does after a failover
/// without persistence.
#[tokio::test(flavor = "multi_thread")]
async fn the_cache_refills_a_killed_valkey_under_load_and_when_idle() {
    let (system, mut valkey, users) = filled_cache().await;
    let clients = Clients::start(&system.users, &users);
    clients.until_progress().await;
    valkey.component.restart().await.unwrap();
    clients.until_progress().await;
    clients.stop().await;
    assert_view_equals_log(&system).await;

    let reader = Reader::start(&system.users, &users);
    valkey.component.process.kill();
    // A 404 would claim that the user does not exist.
    eventually_eq("the answer while Valkey is down", Err(StatusCode::SERVICE_UNAVAILABLE), async || {
        system.users.cached_version(users[0]).await
    })
    .await;
    valkey.component.restart().await.unwrap();
    assert_view_equals_log(&system).await;
    reader.stop().await;
}

/// T05, I5 I7 I8: Every record is published again at a new offset, as by a relay that died between
/// its commit and its delete. The order differs from the first time.
#[tokio::test(flavor = "multi_thread")]
async fn records_that_are_published_twice_take_effect_once() {
    let system = System::start().await;
    let users = system.users.register_many(4).await;
    for id in &users {
        system.users.until_mailed(*id).await;
    }
    system.users.rename(users[0], "Countess").await.unwrap();
    system.users.erase(users[1]).await.unwrap();
    assert_every_effect_once(&system, &users).await;
    for topic in [USER_EVENTS, USER_STATE, EMAIL_EVENTS] {
        for record in system.kafka.read(topic).iter().rev() {
            system.kafka.write(topic, &record.to_draft()).await;
        }
    }
    assert_every_effect_once(&system, &users).await;
    for (group, copies) in [(EMAIL_WELCOME, 4.0), (ANALYTICS_USERS, 6.0), (ANALYTICS_EMAILS, 4.0)] {
        let duplicates = system.processes.counted(group, "duplicate").await;
        assert!(duplicates >= copies, "{group} counted {duplicates} duplicates of {copies} copies");
    }
}

/// T29, I8 I10: An update arrives after the tombstone, as a copy or from a writer that was frozen.
/// It does not restore the erased user. A second, older tombstone does not either.
#[tokio::test(flavor = "multi_thread")]
async fn an_erased_user_stays_erased_when_an_older_state_arrives_late() {
    let system = System::start().await;
    let id = system.users.register().await;
    system.users.rename(id, "Countess").await.unwrap();
    system.users.until_mailed(id).await;
    assert_eq!(system.users.erase(id).await.unwrap().status, StatusCode::NO_CONTENT);
    eventually_eq("the answer of the cache", Err(StatusCode::NOT_FOUND), async || {
        system.users.cached_version(id).await
    })
    .await;
    eventually_eq("the recipient", Some((3, None)), async || system.stores.recipient(id).await).await;
    let states = system.kafka.read_key(USER_STATE, id);
    let [registered, renamed, erased] = &states[..] else { panic!("not three states: {states:?}") };
    for late in [
        registered.to_draft(),
        renamed.to_draft(),
        erased.to_draft(),
        Draft::user_state(id, 2, None).on(erased.partition),
    ] {
        system.kafka.write(USER_STATE, &late).await;
    }
    system.until_drained().await;
    assert_eq!(system.users.cached_version(id).await, Err(StatusCode::NOT_FOUND));
    assert_eq!(system.stores.recipient(id).await, Some((3, None)));
    assert_eq!(system.processes.counted(CACHE_PROFILES, "stale").await, 3.0);
    assert_eq!(system.processes.counted(CACHE_PROFILES, "duplicate").await, 1.0);
    // At least: the fact `user.deleted` may have arrived before the tombstone. Then the first
    // tombstone is stale too.
    assert!(system.processes.counted(EMAIL_RECIPIENTS, "stale").await >= 4.0);
}

/// T28, I8 I10: A consumer is frozen with a polled batch, while another takes over its partitions
/// and writes newer versions. The first consumer resumes and writes its batch. The view has another
/// position by then, so it accepts no record of the batch, and no reader sees an older version.
#[tokio::test(flavor = "multi_thread")]
async fn a_consumer_that_resumes_after_a_takeover_restores_no_older_version() {
    let (mut system, _valkey, users) = filled_cache().await;
    system.processes.set_all(&DEFAULT_CONSUMERS);
    system.processes.start_with(CACHE, &[("FAULT_AT", "cache.before_script:1:stop")]).await;
    system.users.rename(users[0], "Two").await.unwrap();
    system.processes.until_frozen(CACHE).await;
    let mut successor = system.processes.spawn_another(CACHE);
    successor.until_ready().await;
    let at_successor = system.users.at(&successor);
    let version = async || at_successor.cached_version(users[0]).await.ok();
    system.users.rename(users[0], "Three").await.unwrap();
    eventually_eq("the version at the successor", Some(3), version).await;

    system.processes.thaw(CACHE);
    eventually("the first consumer has dropped its batch and joined the group again", async || {
        assert_eq!(version().await, Some(3), "the version changed");
        (system.kafka.members(CACHE_PROFILES).len() == 2).then_some(())
    })
    .await;
    system.users.rename(users[0], "Four").await.unwrap();
    eventually_eq("the version after a change that either consumer handles", Some(4), version).await;
}

/// The user service and the cache service on a Valkey of their own, and users that the cache has.
async fn filled_cache() -> (System, Own<Redis>, Vec<Uuid>) {
    let mut system = System::empty().await;
    let valkey = system.own_valkey().await;
    system.processes.start(&[USER, CACHE]).await;
    let users = system.users.register_many(USERS).await;
    for id in &users {
        system.users.until_cached(*id, 1).await;
    }
    eventually_eq("the version in a complete view", Ok(1), async || system.users.cached_version(users[0]).await).await;
    (system, valkey, users)
}

/// Checks that the cache returns the highest version of each user in the log, and no erased user.
/// The service answers such requests only while its view is complete.
async fn assert_view_equals_log(system: &System) {
    system.stores.until_outbox_empty(USER).await;
    let mut newest: BTreeMap<Uuid, (i64, bool)> = BTreeMap::new();
    for record in system.kafka.read(USER_STATE) {
        let user = record.key_text().parse().unwrap();
        let state = (record.version(), record.value.is_some());
        let known = newest.entry(user).or_insert(state);
        *known = state.max(*known);
    }
    for (id, (version, exists)) in newest {
        let expected = if exists { Ok(version) } else { Err(StatusCode::NOT_FOUND) };
        let what = format!("the cache's version of {id}");
        eventually_eq(&what, expected, async || system.users.cached_version(id).await).await;
    }
}

/// Checks the effects of four registrations with one mail each, one rename of the first user and
/// the erasure of the second.
async fn assert_every_effect_once(system: &System, users: &[Uuid]) {
    system.until_drained().await;
    system.users.until_counted(4, 4).await;
    assert_eq!(system.mail.all().len(), 4, "mails");
    assert_view_equals_log(system).await;
    assert_eq!(system.users.cached_version(users[0]).await, Ok(2));
    assert_eq!(system.users.cached_version(users[1]).await, Err(StatusCode::NOT_FOUND));
    for id in users {
        assert_eq!(system.users.deliveries(*id).await, ["sent"]);
    }
    for (user, version, has_address) in [(0, 2, true), (1, 2, false), (2, 1, true)] {
        let (known_version, address) = system.stores.recipient(users[user]).await.unwrap();
        assert_eq!(known_version, version, "the version of recipient {user}");
        assert_eq!(address.is_some(), has_address, "whether recipient {user} has an address");
    }
}

/// Clients that write and read until they are stopped.
struct Clients {
    stop: Arc<AtomicBool>,
    writers: Vec<JoinHandle<i64>>,
    reader: Reader,
    api: Users,
}

impl Clients {
    /// The writers rename the users repeatedly and register new ones.
    fn start(api: &Users, users: &[Uuid]) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let writers = users.chunks(USERS / 3).map(|users| {
            let api = api.clone();
            let users = users.to_vec();
            let stop = stop.clone();
            tokio::spawn(async move {
                let mut changes = 0;
                while !stop.load(Ordering::Relaxed) {
                    for id in &users {
                        let renamed = api.rename(*id, &format!("Name {changes}")).await.unwrap();
                        // On a busy machine the answer may be 503. It is allowed and not counted.
                        changes += i64::from(renamed.status == StatusCode::OK);
                    }
                    api.post(&address(), None).await.unwrap();
                }
                changes
            })
        });
        let writers = writers.collect();
        Self { stop, writers, reader: Reader::start(api, users), api: api.clone() }
    }

    /// Waits until the cache has returned three users that are registered from now on. So the
    /// writers and the view have progressed.
    async fn until_progress(&self) {
        for _ in 0..3 {
            let id = self.api.register().await;
            eventually("the cache has a new user", async || self.api.cached_version(id).await.ok()).await;
        }
    }

    async fn stop(self) {
        self.stop.store(true, Ordering::Relaxed);
        for writer in self.writers {
            assert!(writer.await.unwrap() > 0, "a writer has renamed no user");
        }
        self.reader.stop().await;
    }
}

/// A client that reads the profiles of existing users until it is stopped, and checks each answer.
struct Reader {
    stop: Arc<AtomicBool>,
    task: JoinHandle<Answers>,
}

/// How often the reader got which answer.
#[derive(Default)]
struct Answers {
    versions: u64,
    /// Status 503.
    unavailable: u64,
}

impl Reader {
    fn start(api: &Users, users: &[Uuid]) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let task = tokio::spawn(read_profiles(api.clone(), users.to_vec(), stop.clone()));
        Self { stop, task }
    }

    /// # Panics
    /// An answer was wrong, or the view was never incomplete, so that the test proves nothing.
    async fn stop(self) {
        self.stop.store(true, Ordering::Relaxed);
        let Answers { versions, unavailable } = self.task.await.unwrap();
        assert!(versions > 0, "the cache returned no profile");
        assert!(unavailable > 0, "no answer was 503, so the view was never incomplete");
    }
}

async fn read_profiles(api: Users, users: Vec<Uuid>, stop: Arc<AtomicBool>) -> Answers {
    let mut answers = Answers::default();
    let mut versions = BTreeMap::new();
    while !stop.load(Ordering::Relaxed) {
        for id in &users {
            match api.cached_version(*id).await {
                Ok(version) => {
                    let before = versions.insert(*id, version).unwrap_or(0);
                    assert!(before <= version, "the version of {id} decreased from {before} to {version}");
                    answers.versions += 1;
                }
                // A 503 asks the caller to retry, so versions before and after it are not compared.
                Err(StatusCode::SERVICE_UNAVAILABLE) => {
                    versions.remove(id);
                    answers.unavailable += 1;
                }
                Err(status) => panic!("the user {id} exists, but the answer is {status}"),
            }
        }
        // Leaves processor time to the services on a machine with two cores.
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    answers
}
