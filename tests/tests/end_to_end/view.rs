//! The cache's view: rebuilt when Valkey loses it, never older than it was, and never the home of somebody who was erased.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use reqwest::StatusCode;
use testbed::redis::Redis;
use tests::consume::Own;
use tests::log::Draft;
use tests::{Part, System, api, eventually, eventually_eq};
use tokio::task::JoinHandle;
use uuid::Uuid;

const USERS: usize = 24;

/// T27, I8: FLUSHALL while users are registered and changed, and again when all is quiet.
#[tokio::test(flavor = "multi_thread")]
async fn a_flushed_valkey_is_filled_again_under_load_and_when_quiet() {
    let (mut system, _valkey, users) = filled().await;
    let run = Run::begin(&system, &users);
    run.progress().await;
    flush(&system).await;
    run.progress().await;
    run.end().await;
    the_view_is_the_log(&system).await;

    // It has nothing to handle before the flush, and stalls when it begins to fill the view again.
    let until = system.evidence("seen-empty");
    let stall = [("FAULT_AT", "cache.before_script:1:stall"), ("FAULT_UNTIL", until.to_str().unwrap())];
    Arc::get_mut(&mut system).expect("the run is over").restart(Part::Cache, &stall).await;
    eventually_eq("complete", true, async || system.seen(users[0]).await.is_ok()).await;
    let reader = Reader::begin(&system, &users);
    flush(&system).await;
    // Nothing is written to the topic any more, so only the consumer's own question can notice.
    assert_eq!(system.seen(users[0]).await, Err(StatusCode::SERVICE_UNAVAILABLE));
    std::fs::write(until, "").unwrap();
    the_view_is_the_log(&system).await;
    reader.end().await;
}

/// T27, I8: the same with a Valkey that is killed and comes back empty, as it does after a failover without persistence.
#[tokio::test(flavor = "multi_thread")]
async fn a_killed_valkey_is_filled_again_under_load_and_when_quiet() {
    let (system, mut valkey, users) = filled().await;
    let run = Run::begin(&system, &users);
    run.progress().await;
    valkey.component.restart().await.unwrap();
    run.progress().await;
    run.end().await;
    the_view_is_the_log(&system).await;

    let reader = Reader::begin(&system, &users);
    valkey.component.process.kill();
    eventually_eq("absent is not said by a store that is away", Err(StatusCode::SERVICE_UNAVAILABLE), async || {
        system.seen(users[0]).await
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
    let users = registered(&system, 4).await;
    for id in &users {
        system.until_mailed(*id).await;
    }
    system.rename(users[0], "Countess").await.unwrap();
    system.erase(users[1]).await.unwrap();
    each_thing_is_there_once(&system, &users).await;
    for topic in ["user.events.v1", "user.state.v1", "email.events.v1"] {
        for record in system.read(topic).iter().rev() {
            system.write(topic, &record.again()).await;
        }
    }
    each_thing_is_there_once(&system, &users).await;
    for (group, again) in [("email.welcome", 4.0), ("analytics.users", 6.0), ("analytics.emails", 4.0)] {
        let duplicates = system.counted(group, "duplicate").await;
        assert!(duplicates >= again, "{group}: {duplicates} duplicates");
    }
}

/// T29, I8 I10: an update that comes after the tombstone, as from a copy or a frozen writer, does not raise the dead; nor does a
/// second tombstone that is older.
#[tokio::test(flavor = "multi_thread")]
async fn who_was_erased_stays_erased_when_an_older_state_comes_late() {
    let system = System::start().await;
    let id = system.register().await;
    system.rename(id, "Countess").await.unwrap();
    system.until_mailed(id).await;
    assert_eq!(system.erase(id).await.unwrap().status, StatusCode::NO_CONTENT);
    eventually_eq("the cache has forgotten", Err(StatusCode::NOT_FOUND), async || system.seen(id).await).await;
    eventually_eq("the email service too", Some((3, None)), async || system.recipient(id).await).await;
    let states: Vec<_> =
        system.read("user.state.v1").into_iter().filter(|record| record.key_text() == id.to_string()).collect();
    let [registered, renamed, erased] = &states[..] else { panic!("not three states: {states:?}") };
    for late in
        [registered.again(), renamed.again(), erased.again(), Draft::user_state(id, 2, None).on(erased.partition)]
    {
        system.write("user.state.v1", &late).await;
    }
    system.until_drained().await;
    assert_eq!(system.seen(id).await, Err(StatusCode::NOT_FOUND));
    assert_eq!(system.recipient(id).await, Some((3, None)));
    assert_eq!(system.counted("cache.profiles", "stale").await, 3.0);
    assert_eq!(system.counted("cache.profiles", "duplicate").await, 1.0);
    // The fact of the deletion may have come before its tombstone, which is stale then as well.
    assert!(system.counted("email.recipients", "stale").await >= 4.0);
}

/// T28, I8 I10: a consumer frozen with a batch in hand, while another takes its partitions and writes newer versions. When it
/// wakes up it writes what it had: the view stands elsewhere by then, so nothing of it goes in, and nobody sees a version go back.
#[tokio::test(flavor = "multi_thread")]
async fn a_consumer_that_wakes_up_after_another_took_over_takes_no_version_back() {
    let (mut system, _valkey, users) = filled().await;
    let mine = Arc::get_mut(&mut system).unwrap();
    mine.restart(Part::Cache, &[("FAULT_AT", "cache.before_script:1:stop")]).await;
    mine.rename(users[0], "Two").await.unwrap();
    eventually("it is frozen", async || mine.is_frozen(Part::Cache).then_some(())).await;
    let mut successor = mine.spawn_another(Part::Cache, &[]);
    successor.until_ready().await.unwrap();
    let seen = async || {
        let url = format!("{}/profiles/{}", successor.instance.url(), users[0]);
        let answer = api::send(reqwest::Client::new().get(url)).await.unwrap();
        (answer.status == StatusCode::OK).then(|| answer.version())
    };
    mine.rename(users[0], "Three").await.unwrap();
    eventually_eq("the successor is at version 3", Some(3), seen).await;

    mine.thaw(Part::Cache);
    let back = async || {
        assert_eq!(seen().await, Some(3), "the version has gone back");
        (mine.members("cache.profiles").len() == 2).then_some(())
    };
    eventually("the first has given its batch up and joined again", back).await;
    mine.rename(users[0], "Four").await.unwrap();
    eventually_eq("whoever has the partition goes on", Some(4), seen).await;
}

/// The user and the cache service on a Valkey of their own, with some users in it.
async fn filled() -> (Arc<System>, Own<Redis>, Vec<Uuid>) {
    let mut system = System::empty().await;
    let valkey = system.own_valkey().await;
    for part in [Part::User, Part::Cache] {
        system.spawn(part, &[]);
    }
    system.ready(&[Part::User, Part::Cache]).await;
    let users = registered(&system, USERS).await;
    for id in &users {
        system.until_cached(*id, 1).await;
    }
    eventually_eq("complete", Ok(1), async || system.seen(users[0]).await).await;
    (Arc::new(system), valkey, users)
}

async fn registered(system: &System, users: usize) -> Vec<Uuid> {
    let mut registered = vec![];
    for _ in 0..users {
        registered.push(system.register().await);
    }
    registered
}

async fn flush(system: &System) {
    let () = redis::cmd("FLUSHALL").query_async(&mut system.valkey().await).await.unwrap();
}

/// The view holds of every user the highest version in the log, or has erased them. It is asked of the service, which answers
/// only when the view is complete.
async fn the_view_is_the_log(system: &System) {
    let mut newest: BTreeMap<Uuid, (i64, bool)> = BTreeMap::new();
    let outbox = system.database(Part::User).await;
    eventually_eq("rows of the outbox", 0_i64, async || {
        sqlx::query_scalar("select count(*) from outbox").fetch_one(&outbox).await.unwrap()
    })
    .await;
    for record in system.read("user.state.v1") {
        let (key, state) = (record.key_text().parse().unwrap(), (record.version(), record.value.is_some()));
        let known = newest.entry(key).or_insert(state);
        *known = state.max(*known);
    }
    for (id, (version, lives)) in newest {
        let expected = if lives { Ok(version) } else { Err(StatusCode::NOT_FOUND) };
        eventually_eq(&format!("{id} as in the log"), expected, async || system.seen(id).await).await;
    }
}

/// Four users, each mailed once; the first is renamed, the second erased.
async fn each_thing_is_there_once(system: &System, users: &[Uuid]) {
    system.until_drained().await;
    system.until_counted(4, 4).await;
    assert_eq!(system.sink.mails().len(), 4, "mails");
    the_view_is_the_log(system).await;
    assert_eq!(system.seen(users[0]).await, Ok(2));
    assert_eq!(system.seen(users[1]).await, Err(StatusCode::NOT_FOUND));
    for id in users {
        assert_eq!(system.deliveries(*id).await, ["sent"]);
    }
    let versions = [(0, 2, true), (1, 2, false), (2, 1, true)];
    for (user, version, lives) in versions {
        let (known, address) = system.recipient(users[user]).await.unwrap();
        assert_eq!((known, address.is_some()), (version, lives), "the recipient of user {user}");
    }
}

/// Readers and writers until told to end.
struct Run {
    stop: Arc<AtomicBool>,
    writers: Vec<JoinHandle<i64>>,
    reader: Reader,
    system: Arc<System>,
}

impl Run {
    /// Each user is renamed over and over, and new ones are registered.
    fn begin(system: &Arc<System>, users: &[Uuid]) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let writers = users.chunks(USERS / 3).map(|users| {
            let (system, users, stop) = (system.clone(), users.to_vec(), stop.clone());
            tokio::spawn(async move {
                let mut changes = 0;
                while !stop.load(Ordering::Relaxed) {
                    for id in &users {
                        let renamed = system.rename(*id, &format!("Name {changes}")).await.unwrap();
                        // A machine that is busy enough answers 503 here: no change then, and no harm.
                        changes += i64::from(renamed.status == StatusCode::OK);
                    }
                    system.post_user(&api::address(), None).await.unwrap();
                }
                changes
            })
        });
        let writers = writers.collect();
        Self { stop, writers, reader: Reader::begin(system, users), system: system.clone() }
    }

    /// Waits until the writers have come on and the view with them: somebody registered now is seen.
    async fn progress(&self) {
        for _ in 0..3 {
            let id = self.system.register().await;
            eventually("a new user is seen", async || self.system.seen(id).await.ok()).await;
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
    fn begin(system: &Arc<System>, users: &[Uuid]) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let (system, users, stopped) = (system.clone(), users.to_vec(), stop.clone());
        let task = tokio::spawn(async move {
            let (mut seen, mut not_ready) = (0, 0);
            let mut versions = BTreeMap::new();
            while !stopped.load(Ordering::Relaxed) {
                for id in &users {
                    match system.seen(*id).await {
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
