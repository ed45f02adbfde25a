//! The local stack on a developer's machine. The demo runs to its end, and no process or data
//! outlives a run of xtask: a run that is killed with `kill -9` leaves children, which the next run
//! ends, and only those.

use std::collections::BTreeSet;
use std::fs;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use sqlx::{Connection, PgConnection};
use testbed::services::SERVICES;
use testbed::{paths, testing};
use tests::{eventually_eq, within};

/// How long the demo may take to start everything. It is longer than the stack's own limits, so
/// that the stack is the one to report what did not start.
const START_DEADLINE: Duration = Duration::from_secs(240);

/// A command of xtask. It compiles nothing, because it calls the program `cargo` (`true` or
/// `false`) instead of the real cargo. The services are already built.
fn xtask(command: &str, cargo: &str) -> Command {
    let mut run = Command::new(paths::root().join("target/debug/xtask"));
    run.arg(command).env("CARGO", cargo).stdout(Stdio::piped()).stderr(Stdio::piped());
    run
}

/// Starts the demo and waits until all its components and services run.
async fn start_demo() -> Child {
    let run = xtask("demo", "true").spawn().unwrap();
    let parents = BTreeSet::from([run.id()]);
    let expected: Vec<&str> = ["java", "postgres"].into_iter().chain(SERVICES.map(|service| service.name)).collect();
    within(START_DEADLINE, "the demo has started all its processes", async || {
        let names: BTreeSet<String> = children(&parents).into_iter().filter_map(|pid| Some(stat(pid)?.name)).collect();
        expected.iter().all(|name| names.contains(*name)).then_some(())
    })
    .await;
    run
}

/// Whether a run has a folder of temporary data.
fn has_data(run: u32) -> bool {
    let scratch = paths::data().unwrap().join("scratch");
    let prefix = format!("{run}-");
    fs::read_dir(scratch).unwrap().any(|entry| entry.unwrap().file_name().to_str().unwrap().starts_with(&prefix))
}

/// Some fields of `/proc/<pid>/stat`.
struct Stat {
    name: String,
    parent: u32,
    /// Start time. It distinguishes the process from a later one with the same pid.
    start: u64,
}

/// `None` if there is no such process or it is a zombie.
fn stat(pid: u32) -> Option<Stat> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // The name is in parentheses and may itself contain blanks and parentheses.
    let (start, fields) = stat.rsplit_once(") ")?;
    let (_, name) = start.split_once('(')?;
    let fields: Vec<&str> = fields.split(' ').collect();
    let is_zombie = fields[0] == "Z";
    (!is_zombie).then_some(Stat {
        name: name.to_owned(),
        parent: fields[1].parse().ok()?,
        start: fields[19].parse().ok()?,
    })
}

/// The processes whose parent is one of `parents`.
fn children(parents: &BTreeSet<u32>) -> Vec<u32> {
    let pids = fs::read_dir("/proc").unwrap().filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok());
    pids.filter(|pid| stat(*pid).is_some_and(|stat| parents.contains(&stat.parent))).collect()
}

/// Pid and start time of all children of a process, of their children, and so on. Postgres has
/// many.
pub fn descendants(of: u32) -> Vec<(u32, u64)> {
    let mut family = BTreeSet::from([of]);
    loop {
        let before = family.len();
        family.extend(children(&family));
        if family.len() == before {
            break;
        }
    }
    family.remove(&of);
    family.into_iter().filter_map(|pid| Some((pid, stat(pid)?.start))).collect()
}

/// The names of those processes that still run.
pub fn still_running(processes: &[(u32, u64)]) -> Vec<String> {
    let same = |(pid, start): &(u32, u64)| stat(*pid).filter(|stat| stat.start == *start);
    processes.iter().filter_map(same).map(|stat| stat.name).collect()
}

/// When the shared Postgres was started. Another run of xtask has started it, which is still
/// active.
async fn start_of_shared_postgres() -> String {
    let mut connection = PgConnection::connect(&testing::stack().postgres).await.unwrap();
    sqlx::query_scalar("select pg_postmaster_start_time()::text").fetch_one(&mut connection).await.unwrap()
}

/// A process that xtask did not start. It is killed at the end of the test, even when the test
/// fails.
struct UnrelatedProcess(Child);

impl UnrelatedProcess {
    fn start() -> Self {
        let mut sleep = Command::new("sleep");
        // It must not inherit our output: a reader of that waits until the last writer has closed
        // it.
        sleep.arg("600").stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
        Self(sleep.spawn().unwrap())
    }
}

impl Drop for UnrelatedProcess {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// What the demo prints, in this order.
const DEMO_LINES: [&str; 25] = [
    "This demo starts all of Waybill",
    "Starting Kafka, Postgres, Redis and an SMTP sink",
    "Starting the services",
    "Ada Lovelace registers",
    "user       POST /users answers 201",
    "cache      GET /profiles/{id}?min_version=1 returns the profile",
    "email      the SMTP server has accepted the mail",
    "analytics  GET /funnel counts the user",
    "Grace Hopper registers",
    "user       POST /users answers 201",
    "cache      GET /profiles/{id}?min_version=1 returns the profile",
    "email      the SMTP server has accepted the mail",
    "analytics  GET /funnel counts the user",
    "Alan Turing registers",
    "user       POST /users answers 201",
    "cache      GET /profiles/{id}?min_version=1 returns the profile",
    "email      the SMTP server has accepted the mail",
    "analytics  GET /funnel counts the user",
    "Ada Lovelace changes her name",
    "user       PATCH /users/{id} answers 200",
    "cache      GET /profiles/{id}?min_version=2 waits for the change and returns it",
    "Grace Hopper is erased",
    "user       DELETE /users/{id} answers 204",
    "cache      GET /profiles/{id} answers 404",
    "Everything is stopped.",
];

#[tokio::test(flavor = "multi_thread")]
async fn the_demo_prints_every_step_and_leaves_nothing_running() {
    let run = start_demo().await;
    let pid = run.id();
    let processes = descendants(pid);
    let output = run.wait_with_output().unwrap();
    let printed = String::from_utf8(output.stdout).unwrap();
    let errors = String::from_utf8(output.stderr).unwrap();
    assert!(output.status.success(), "the demo ends with {}: {printed}{errors}", output.status);
    let mut rest = printed.as_str();
    for line in DEMO_LINES {
        let (_, after) =
            rest.split_once(line).unwrap_or_else(|| panic!("{line:?} is missing or too early in:\n{printed}"));
        rest = after;
    }
    assert!(processes.len() >= 7, "the demo runs Kafka, Postgres, Redis and four services: {processes:?}");
    assert_eq!(still_running(&processes), Vec::<String>::new());
    assert!(!has_data(pid), "the demo's data is still on disk");
}

/// The next run of any command ends the processes of a killed run and removes its data. The stack
/// of an active run (the one that this test uses) and unrelated processes stay as they are.
#[tokio::test(flavor = "multi_thread")]
async fn the_next_run_ends_what_a_killed_run_has_left_and_nothing_else() {
    let mut unrelated = UnrelatedProcess::start();
    let shared_postgres = start_of_shared_postgres().await;
    let mut run = start_demo().await;
    let left = descendants(run.id());
    assert!(has_data(run.id()));
    run.kill().unwrap();
    run.wait().unwrap();
    let running = still_running(&left);
    assert!(running.len() >= 7, "a kill -9 of the run leaves its children running: {running:?}");

    // This run fails at its first step, because its cargo is `false`. It cleans up before that.
    let next = xtask("check", "false").output().unwrap();
    let printed = String::from_utf8_lossy(&next.stdout) + String::from_utf8_lossy(&next.stderr);
    assert!(printed.contains("processes that an earlier run had left running"), "{printed}");
    // The child processes of a killed Postgres end a moment later.
    eventually_eq("no process of the killed run is left", Vec::<String>::new(), async || still_running(&left)).await;
    assert!(!has_data(run.id()), "the data of the killed run is still on disk");
    assert_eq!(start_of_shared_postgres().await, shared_postgres, "the shared Postgres was restarted");
    assert!(unrelated.0.try_wait().unwrap().is_none(), "the unrelated process was ended");
}
