//! The local stack's promise to a developer's machine: what `kill -9` of xtask leaves running is ended by the next run, and only
//! that.

use std::collections::BTreeSet;
use std::fs;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use sqlx::{Connection, PgConnection};
use testbed::{paths, testing};
use tests::{eventually_eq, within};

/// A run of xtask. For what it builds it calls the cargo that `cargo` stands in for: the programs are there already.
fn xtask(command: &str, cargo: &str) -> Command {
    let mut run = Command::new(paths::root().join("target/debug/xtask"));
    run.arg(command).env("CARGO", cargo).stdout(Stdio::piped()).stderr(Stdio::piped());
    run
}

/// Number and name of the processes whose parent is one of `parents`.
fn children(parents: &BTreeSet<u32>) -> Vec<(u32, String)> {
    let processes = fs::read_dir("/proc").unwrap().filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok());
    let child = |pid: u32| {
        let (name, parent) = identity(pid)?;
        parents.contains(&parent).then_some((pid, name))
    };
    processes.filter_map(child).collect()
}

/// Name and parent of a process; `None` when it is gone, or dead and only not yet collected.
fn identity(pid: u32) -> Option<(String, u32)> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    let (start, fields) = stat.rsplit_once(") ")?;
    let mut fields = fields.split(' ');
    let alive = fields.next() != Some("Z");
    let parent = fields.next()?.parse().ok()?;
    alive.then(|| (start.split_once('(').unwrap_or_default().1.to_owned(), parent))
}

/// Children, and children of children: a Postgres has many.
fn descendants(of: u32) -> BTreeSet<u32> {
    let mut all = BTreeSet::from([of]);
    loop {
        let more: BTreeSet<u32> = children(&all).into_iter().map(|(pid, _)| pid).chain(all.iter().copied()).collect();
        if more == all {
            all.remove(&of);
            return all;
        }
        all = more;
    }
}

/// When the shared Postgres, which another run of xtask has started, began.
async fn shared_postgres_began() -> String {
    let mut connection = PgConnection::connect(&testing::stack().postgres).await.unwrap();
    sqlx::query_scalar("select pg_postmaster_start_time()::text").fetch_one(&mut connection).await.unwrap()
}

/// A process that no run of xtask has started; it ends with the test, also with one that fails.
struct Stranger(Child);

impl Stranger {
    fn start() -> Self {
        // Without our output: whoever reads that waits for its last writer.
        let mut sleep = Command::new("sleep");
        sleep.arg("600").stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
        Self(sleep.spawn().unwrap())
    }
}

impl Drop for Stranger {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Longer than the stack's own limits, so that it is the one to say what did not start.
const STACK_DEADLINE: Duration = Duration::from_secs(240);

/// A demo whose brokers and services are all up.
async fn demo() -> Child {
    let run = xtask("demo", "true").spawn().unwrap();
    let parents = BTreeSet::from([run.id()]);
    within(STACK_DEADLINE, "the demo has its children", async || {
        let names: BTreeSet<String> = children(&parents).into_iter().map(|(_, name)| name).collect();
        let wanted = ["java", "postgres", "user", "email", "analytics", "cache"];
        wanted.iter().all(|name| names.contains(*name)).then_some(())
    })
    .await;
    run
}

/// The next run, whichever it is, ends what a killed run has left and removes its data. The stack of a
/// run that lives (the one that this test runs on) and a stranger's process stay as they are.
#[tokio::test(flavor = "multi_thread")]
async fn what_a_killed_run_left_behind_is_ended_by_the_next_and_nothing_else() {
    let mut stranger = Stranger::start();
    let began = shared_postgres_began().await;
    let mut run = demo().await;
    let scratch = paths::data().unwrap().join("scratch");
    let prefix = format!("{}-", run.id());
    let own = |name: &str| name.starts_with(&prefix);
    let data = || fs::read_dir(&scratch).unwrap().any(|entry| entry.unwrap().file_name().to_str().is_some_and(own));
    let left = descendants(run.id());
    assert!(data(), "the demo keeps its data there");
    run.kill().unwrap();
    run.wait().unwrap();
    let alive = || left.iter().filter_map(|pid| identity(*pid)).map(|(name, _)| name).collect::<Vec<_>>();
    assert!(alive().len() >= 7, "a kill -9 leaves the children running: {:?}", alive());

    // It ends in failure at its first step, since its cargo is `false`; but cleaning comes before the first step.
    let next = xtask("check", "false").output().unwrap();
    let said = String::from_utf8_lossy(&next.stdout) + String::from_utf8_lossy(&next.stderr);
    assert!(said.contains("processes that an earlier run had left behind"), "{said}");
    // A Postgres that is killed takes its own children with it in a moment.
    eventually_eq("nothing is left running", Vec::<String>::new(), async || alive()).await;
    assert!(!data(), "left on disk");
    assert_eq!(shared_postgres_began().await, began, "the Postgres of a living run is another one now");
    assert!(stranger.0.try_wait().unwrap().is_none(), "a stranger's process was ended");
}
