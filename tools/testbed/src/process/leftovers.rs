//! Removes the processes and data that a run leaves when it is killed with `kill -9`, and nothing
//! else.
//!
//! A process is identified by its pid and start time, so a reused pid never matches. Every run (a
//! process of ours that has children) keeps a file named by its own identity, with one line per
//! child. A child is recorded before it executes its program (see `process::command`). The file and
//! the run's scratch folder are used only after the run itself has ended, so any number of runs may
//! be active at the same time.

use std::fs::{self, File};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use nix::sys::signal::{Signal, killpg};
use nix::unistd::Pid;

use crate::paths;

/// How long a process may take to end after SIGTERM. A frozen process never does.
const TERM_LIMIT: Duration = Duration::from_secs(5);
/// How long a process may take to disappear after SIGKILL.
const KILL_LIMIT: Duration = Duration::from_secs(10);

/// Ends the children of runs that have ended, and removes their scratch folders. Returns the number
/// of processes that it ended.
pub fn clean_leftovers() -> Result<usize> {
    let data = paths::data()?;
    let mut ended = 0;
    // A child that was ended (a test) can have been a run itself, so repeat until nothing is found.
    loop {
        let round = clean_round(&data.join("runs"), &data.join("scratch"))?;
        if round == 0 {
            return Ok(ended);
        }
        ended += round;
    }
}

/// Removes this run's own record. To be called at the end of `main`, when no child is left.
pub fn forget_run() {
    if let (Ok(runs), Ok(run)) = (folder("runs"), this_run()) {
        let _ = fs::remove_file(runs.join(run));
    }
}

/// A folder for the data of one run. It is removed on drop, or by the next run.
pub struct Scratch {
    folder: PathBuf,
}

impl Scratch {
    pub fn create(name: &str) -> Result<Self> {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let number = COUNT.fetch_add(1, Ordering::Relaxed);
        let folder = folder("scratch")?.join(this_run()?).join(format!("{number}-{name}"));
        fs::create_dir_all(&folder).with_context(|| format!("cannot create {}", folder.display()))?;
        Ok(Self { folder })
    }

    pub fn path(&self) -> &Path {
        &self.folder
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.folder);
        // Removes the run's folder with its last scratch folder. It fails while there are others.
        if let Some(run) = self.folder.parent() {
            let _ = fs::remove_dir(run);
        }
    }
}

/// Adds a child to this run's record.
pub(super) fn record(child: u32) -> Result<()> {
    let name = identity(child).context("a child ended before it was recorded")?;
    let path = folder("runs")?.join(this_run()?);
    let mut file = File::options().create(true).append(true).open(&path)?;
    // A single write, because several threads append to this file.
    file.write_all(format!("{name}\n").as_bytes()).with_context(|| format!("cannot write {}", path.display()))
}

/// Pid and start time of a process, as a valid file name. `None` if there is no such process or it
/// is a zombie.
pub(super) fn identity(pid: u32) -> Option<String> {
    let start = if cfg!(target_os = "linux") { start_time_from_proc(pid) } else { start_time_from_ps(pid) }?;
    Some(format!("{pid}-{start}"))
}

fn this_run() -> Result<String> {
    identity(std::process::id()).context("cannot read the start time of this process")
}

fn folder(name: &str) -> Result<PathBuf> {
    let folder = paths::data()?.join(name);
    fs::create_dir_all(&folder).with_context(|| format!("cannot create {}", folder.display()))?;
    Ok(folder)
}

/// Clock ticks from boot to the start of the process, and the id of the boot.
fn start_time_from_proc(pid: u32) -> Option<String> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // The second field, the program's name in parentheses, may itself contain blanks and
    // parentheses.
    let fields: Vec<&str> = stat.rsplit_once(')')?.1.split_whitespace().collect();
    let state = fields.first()?;
    let threads = fields.get(17)?;
    let ticks = fields.get(19)?;
    let boot = fs::read_to_string("/proc/sys/kernel/random/boot_id").ok()?;
    // The first thread of a killed process is a zombie while the others are still ending. Until all
    // have ended, the ports of the process are not free.
    let has_ended = matches!(*state, "Z" | "X") && matches!(*threads, "0" | "1");
    (!has_ended).then(|| format!("{ticks}-{}", boot.trim()))
}

fn start_time_from_ps(pid: u32) -> Option<String> {
    let output = std::process::Command::new("ps")
        .args(["-o", "state=", "-o", "lstart=", "-p", &pid.to_string()])
        .output()
        .ok()?;
    let line = String::from_utf8(output.stdout).ok()?;
    let (state, start) = line.trim().split_once(' ')?;
    (!state.starts_with('Z')).then(|| start.trim().replace(|c: char| !c.is_ascii_alphanumeric(), "-"))
}

fn is_alive(name: &str) -> bool {
    pid_of(name).and_then(identity).as_deref() == Some(name)
}

fn pid_of(name: &str) -> Option<u32> {
    name.split_once('-')?.0.parse().ok()
}

fn clean_round(runs: &Path, scratch: &Path) -> Result<usize> {
    let mut ended = 0;
    for run in names_in(runs).filter(|run| !is_alive(run)) {
        let record = runs.join(&run);
        // Another run may be cleaning at the same time and remove the record.
        let children = fs::read_to_string(&record).unwrap_or_default();
        // In reverse order of their start: services before brokers.
        for child in children.lines().rev().filter(|child| is_alive(child)) {
            end(child)?;
            ended += 1;
        }
        let _ = fs::remove_file(&record);
    }
    for run in names_in(scratch).filter(|run| !is_alive(run)) {
        let _ = fs::remove_dir_all(scratch.join(run));
    }
    Ok(ended)
}

fn names_in(folder: &Path) -> impl Iterator<Item = String> {
    let entries = fs::read_dir(folder).into_iter().flatten().flatten();
    entries.filter_map(|entry| entry.file_name().into_string().ok())
}

/// Ends a child and its process group. SIGTERM comes first, so that Postgres removes its lock file
/// and Kafka closes its logs.
fn end(child: &str) -> Result<()> {
    let pid = pid_of(child).context("the record of a child has no pid")?;
    for (signal, limit) in [(Signal::SIGTERM, TERM_LIMIT), (Signal::SIGKILL, KILL_LIMIT)] {
        let _ = killpg(Pid::from_raw(pid.cast_signed()), signal);
        let deadline = Instant::now() + limit;
        while is_alive(child) && Instant::now() < deadline {
            std::thread::sleep(Duration::from_millis(10));
        }
        if !is_alive(child) {
            return Ok(());
        }
    }
    bail!("process {pid}, left running by an earlier run, does not end even after SIGKILL")
}

#[cfg(test)]
mod tests {
    use std::os::unix::process::CommandExt;
    use std::process::{Child, Command};

    use super::*;

    fn sleeper() -> Child {
        Command::new("sleep").arg("60").process_group(0).spawn().unwrap()
    }

    /// The identity of a process that has ended.
    fn ended() -> String {
        let mut child = sleeper();
        let name = identity(child.id()).unwrap();
        child.kill().unwrap();
        child.wait().unwrap();
        name
    }

    struct Folders(Scratch);

    impl Folders {
        fn create() -> Self {
            let folders = Self(Scratch::create("leftovers").unwrap());
            fs::create_dir(folders.runs()).unwrap();
            fs::create_dir(folders.scratch()).unwrap();
            folders
        }
        fn runs(&self) -> PathBuf {
            self.0.path().join("runs")
        }
        fn scratch(&self) -> PathBuf {
            self.0.path().join("scratch")
        }
        fn clean(&self) -> usize {
            clean_round(&self.runs(), &self.scratch()).unwrap()
        }
    }

    #[test]
    fn the_children_and_data_of_a_run_that_has_ended_are_removed() {
        let folders = Folders::create();
        let mut child = sleeper();
        let run = ended();
        fs::write(folders.runs().join(&run), format!("{}\n", identity(child.id()).unwrap())).unwrap();
        fs::create_dir_all(folders.scratch().join(&run).join("kafka")).unwrap();
        assert_eq!(folders.clean(), 1);
        assert!(child.try_wait().unwrap().is_some());
        assert_eq!(names_in(&folders.runs()).count() + names_in(&folders.scratch()).count(), 0);
    }

    #[test]
    fn the_children_and_data_of_an_active_run_are_kept() {
        let folders = Folders::create();
        let mut child = sleeper();
        let run = this_run().unwrap();
        fs::write(folders.runs().join(&run), format!("{}\n", identity(child.id()).unwrap())).unwrap();
        fs::create_dir(folders.scratch().join(&run)).unwrap();
        assert_eq!(folders.clean(), 0);
        assert!(child.try_wait().unwrap().is_none());
        assert!(folders.runs().join(&run).exists() && folders.scratch().join(&run).exists());
        child.kill().unwrap();
        child.wait().unwrap();
    }

    #[test]
    fn a_process_that_reuses_a_recorded_pid_is_not_ended() {
        let folders = Folders::create();
        let mut unrelated = sleeper();
        let identity = identity(unrelated.id()).unwrap();
        let (pid, start) = identity.split_once('-').unwrap();
        let earlier_process = format!("{pid}-1{start}");
        fs::write(folders.runs().join(ended()), format!("{earlier_process}\n")).unwrap();
        assert_eq!(folders.clean(), 0);
        assert!(unrelated.try_wait().unwrap().is_none());
        unrelated.kill().unwrap();
        unrelated.wait().unwrap();
    }

    #[test]
    fn a_truncated_line_of_a_record_is_ignored() {
        let folders = Folders::create();
        fs::write(folders.runs().join(ended()), "12").unwrap();
        assert_eq!(folders.clean(), 0);
    }
}
