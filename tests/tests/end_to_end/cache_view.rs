//! The cache's view: rebuilt when Valkey loses it, never older than it was, and never the home of somebody who was erased.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use reqwest::StatusCode;
use testbed::redis::Redis;
use tests::record::Draft;
use tests::services::{
    ANALYTICS_EMAILS, ANALYTICS_USERS, CACHE_PROFILES, EMAIL_EVENTS, EMAIL_RECIPIENTS, EMAIL_WELCOME, USER_EVENTS,
    USER_STATE,
};
use tests::system::Own;
use tests::users::{Users, address};
use tests::{System, eventually, eventually_eq};
use tokio::task::JoinHandle;
use topology::{CACHE, USER};
use uuid::Uuid;

const USERS: usize = 24;

/// T27, I8: FLUSHALL while users are registered and changed, and again when all is quiet.
#[tokio::test(flavor = "multi_thread")]
async fn a_flushed_valkey_is_filled_again_under_load_and_when_quiet() {
    let (mut system, _valkey, users) = filled().await;
    let run = Run::begin(&system.users, &users);
    run.progress().await;
    system.stores.flush_valkey().await;
    run.progress().await;
    run.end().await;
    the_view_is_the_log(&system).await;

    // It has nothing to handle before the flush, and stalls when it begins to fill the view again.
    let until = system.processes.file("seen-empty");
    let stall = [("FAULT_AT", "cache.before_script:1:stall"), ("FAULT_UNTIL", until.to_str().unwrap())];
    system.processes.start_with(CACHE, &stall).await;
    eventually_eq("complete", true, async || system.users.cached_version(users[0]).await.is_ok()).await;
    let reader = Reader::begin(&system.users, &users);
    system.stores.flush_valkey().await;
    // Nothing is written to the topic any more, so only the consumer's own question can notice.
    assert_eq!(system.users.cached_version(users[0]).await, Err(StatusCode::SERVICE_UNAVAILABLE));
    std::fs::write(until, "").unwrap();
    the_view_is_the_log(&system).await;
    reader.end().await;
}

/// T27, I8: the same with a Valkey that is killed and comes back empty, as it does after a failover without persistence.
#[tokio::test(flavor = "multi_thread")]
async fn a_killed_valkey_is_filled_again_under_load_and_when_quiet() {
    let (system, mut valkey, users) = filled().await;
    let run = Run::begin(&system.users, &users);
    run.progress().await;
    valkey.component.restart().await.unwrap();
    run.progress().await;
    run.end().await;
    the_view_is_the_log(&system).await;

    let reader = Reader::begin(&system.users, &users);
    valkey.component.process.kill();
    eventually_eq("absent is not said by a store that is away", Err(StatusCode::SERVICE_UNAVAILABLE), async || {
        system.users.cached_version(users[0]).await
    })
    .await;
    valkey.component.restart().await.unwrap();
    the_view_is_the_log(&system).await;
    reader.end().await;
}

/// T05, I5 I7 I8: what a relay that died between its commit and its delete does: every record comes again, at a new offset and in
/// another order than the first time.
#[tokio::test(flavor = "multi_thread")]
async fn records_that_come_again_change_nothing() {
    let system = System::start().await;
    let users = system.users.register_many(4).await;
    for id in &users {
        system.users.until_mailed(*id).await;
    }
    system.users.rename(users[0], "Countess").await.unwrap();
    system.users.erase(users[1]).await.unwrap();
    each_thing_is_there_once(&system, &users).await;
    for topic in [USER_EVENTS, USER_STATE, EMAIL_EVENTS] {
        for record in system.kafka.read(topic).iter().rev() {
            system.kafka.write(topic, &record.to_draft()).await;
        }
    }
    each_thing_is_there_once(&system, &users).await;
    for (group, again) in [(EMAIL_WELCOME, 4.0), (ANALYTICS_USERS, 6.0), (ANALYTICS_EMAILS, 4.0)] {
        let duplicates = system.processes.counted(group, "duplicate").await;
        assert!(duplicates >= again, "{group}: {duplicates} duplicates");
    }
}

/// T29, I8 I10: an update that comes after the tombstone, as from a copy or a frozen writer, does not raise the dead; nor does a
/// second tombstone that is older.
#[tokio::test(flavor = "multi_thread")]
async fn who_was_erased_stays_erased_when_an_older_state_comes_late() {
    let system = System::start().await;
    let id = system.users.register().await;
    system.users.rename(id, "Countess").await.unwrap();
    system.users.until_mailed(id).await;
    assert_eq!(system.users.erase(id).await.unwrap().status, StatusCode::NO_CONTENT);
    eventually_eq("the cache has forgotten", Err(StatusCode::NOT_FOUND), async || {
        system.users.cached_version(id).await
    })
    .await;
    eventually_eq("the email service too", Some((3, None)), async || system.stores.recipient(id).await).await;
    let states: Vec<_> =
        system.kafka.read(USER_STATE).into_iter().filter(|record| record.key_text() == id.to_string()).collect();
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
    // The fact of the deletion may have come before its tombstone, which is stale then as well.
    assert!(system.processes.counted(EMAIL_RECIPIENTS, "stale").await >= 4.0);
}

/// T28, I8 I10: a consumer frozen with a batch in hand, while another takes its partitions and writes newer versions. When it
/// wakes up it writes what it had: the view stands elsewhere by then, so nothing of it goes in, and nobody sees a version go back.
#[tokio::test(flavor = "multi_thread")]
async fn a_consumer_that_wakes_up_after_another_took_over_takes_no_version_back() {
    let (mut system, _valkey, users) = filled().await;
    system.processes.start_with(CACHE, &[("FAULT_AT", "cache.before_script:1:stop")]).await;
    system.users.rename(users[0], "Two").await.unwrap();
    system.processes.until_frozen(CACHE).await;
    let mut successor = system.processes.spawn_another(CACHE);
    successor.until_ready().await;
    let at_successor = system.users.at(&successor);
    let seen = async || at_successor.cached_version(users[0]).await.ok();
    system.users.rename(users[0], "Three").await.unwrap();
    eventually_eq("the successor is at version 3", Some(3), seen).await;

    system.processes.thaw(CACHE);
    let back = async || {
        assert_eq!(seen().await, Some(3), "the version has gone back");
        (system.kafka.members(CACHE_PROFILES).len() == 2).then_some(())
    };
    eventually("the first has given its batch up and joined again", back).await;
    system.users.rename(users[0], "Four").await.unwrap();
    eventually_eq("whoever has the partition goes on", Some(4), seen).await;
}

/// The user and the cache service on a Valkey of their own, with some users in it.
async fn filled() -> (System, Own<Redis>, Vec<Uuid>) {
    let mut system = System::empty().await;
    let valkey = system.own_valkey().await;
    system.processes.start(&[USER, CACHE]).await;
    let users = system.users.register_many(USERS).await;
    for id in &users {
        system.users.until_cached(*id, 1).await;
    }
    eventually_eq("complete", Ok(1), async || system.users.cached_version(users[0]).await).await;
    (system, valkey, users)
}

/// The view holds of every user the highest version in the log, or has erased them. It is asked of the service, which answers
/// only when the view is complete.
async fn the_view_is_the_log(system: &System) {
    let mut newest: BTreeMap<Uuid, (i64, bool)> = BTreeMap::new();
    let outbox = system.stores.database(USER).await;
    eventually_eq("rows of the outbox", 0_i64, async || {
        sqlx::query_scalar("select count(*) from outbox").fetch_one(&outbox).await.unwrap()
    })
    .await;
    for record in system.kafka.read(USER_STATE) {
        let key = record.key_text().parse().unwrap();
        let state = (record.version(), record.value.is_some());
        let known = newest.entry(key).or_insert(state);
        *known = state.max(*known);
    }
    for (id, (version, lives)) in newest {
        let expected = if lives { Ok(version) } else { Err(StatusCode::NOT_FOUND) };
        eventually_eq(&format!("{id} as in the log"), expected, async || system.users.cached_version(id).await).await;
    }
}

/// Four users, each mailed once; the first is renamed, the second erased.
async fn each_thing_is_there_once(system: &System, users: &[Uuid]) {
    system.until_drained().await;
    system.users.until_counted(4, 4).await;
    assert_eq!(system.mail.all().len(), 4, "mails");
    the_view_is_the_log(system).await;
    assert_eq!(system.users.cached_version(users[0]).await, Ok(2));
    assert_eq!(system.users.cached_version(users[1]).await, Err(StatusCode::NOT_FOUND));
    for id in users {
        assert_eq!(system.users.deliveries(*id).await, ["sent"]);
    }
    let versions = [(0, 2, true), (1, 2, false), (2, 1, true)];
    for (user, version, lives) in versions {
        let (known, address) = system.stores.recipient(users[user]).await.unwrap();
        assert_eq!((known, address.is_some()), (version, lives), "the recipient of user {user}");
    }
}

/// Readers and writers until told to end.
struct Run {
    stop: Arc<AtomicBool>,
    writers: Vec<JoinHandle<i64>>,
    reader: Reader,
    clients: Users,
}

impl Run {
    /// Each user is renamed over and over, and new ones are registered.
    fn begin(clients: &Users, users: &[Uuid]) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let writers = users.chunks(USERS / 3).map(|users| {
            let clients = clients.clone();
            let users = users.to_vec();
            let stop = stop.clone();
            tokio::spawn(async move {
                let mut changes = 0;
                while !stop.load(Ordering::Relaxed) {
                    for id in &users {
                        let renamed = clients.rename(*id, &format!("Name {changes}")).await.unwrap();
                        // A machine that is busy enough answers 503 here: no change then, and no harm.
                        changes += i64::from(renamed.status == StatusCode::OK);
                    }
                    clients.post(&address(), None).await.unwrap();
                }
                changes
            })
        });
        let writers = writers.collect();
        Self { stop, writers, reader: Reader::begin(clients, users), clients: clients.clone() }
    }

    /// Waits until the writers have come on and the view with them: somebody registered now is seen.
    async fn progress(&self) {
        for _ in 0..3 {
            let id = self.clients.register().await;
            eventually("a new user is seen", async || self.clients.cached_version(id).await.ok()).await;
        }
    }

    async fn end(self) {
        self.stop.store(true, Ordering::Relaxed);
        for writer in self.writers {
            assert!(writer.await.unwrap() > 0);
        }
        self.reader.end().await;
    }
}

/// Reads profiles of users who exist, all the time, and judges each answer.
struct Reader {
    stop: Arc<AtomicBool>,
    task: JoinHandle<(u64, u64)>,
}

impl Reader {
    fn begin(clients: &Users, users: &[Uuid]) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let clients = clients.clone();
        let users = users.to_vec();
        let stopped = stop.clone();
        let task = tokio::spawn(async move {
            let mut seen = 0;
            let mut not_ready = 0;
            let mut versions = BTreeMap::new();
            while !stopped.load(Ordering::Relaxed) {
                for id in &users {
                    match clients.cached_version(*id).await {
                        Ok(version) => {
                            let before = versions.insert(*id, version).unwrap_or(0);
                            assert!(before <= version, "{id} went from {before} back to {version}");
                            seen += 1;
                        }
                        // From here on an older version would be no surprise to a caller, who was told to come back.
                        Err(StatusCode::SERVICE_UNAVAILABLE) => {
                            versions.remove(id);
                            not_ready += 1;
                        }
                        Err(status) => panic!("{id} exists, and the answer is {status}"),
                    }
                }
                // Leaves some of two cores to what is read.
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
            (seen, not_ready)
        });
        Self { stop, task }
    }

    /// # Panics
    /// An answer was wrong, or the view was never seen while it was incomplete: then this test has shown nothing.
    async fn end(self) {
        self.stop.store(true, Ordering::Relaxed);
        let (seen, not_ready) = self.task.await.unwrap();
        assert!(seen > 0 && not_ready > 0, "{seen} versions seen, {not_ready} times told to wait");
    }
}
