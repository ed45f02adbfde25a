//! What a run leaves behind when it is killed with -9, and how the next run removes that and nothing else.
//!
//! A process is named by its number and the moment it began, so a number that the system has given to somebody else since never
//! matches. Every run (a process of ours that has children) keeps a file under its own name, one line per child; a child
//! is on record before it becomes the program it is to run (see `process::command`). The file, and the run's scratch
//! folder, are acted upon only when the run itself is gone: any number of runs may go on side by side.

use std::fs::{self, File};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use nix::sys::signal::{Signal, killpg};
use nix::unistd::Pid;

use crate::paths;

/// How long one that is asked to end may take; a frozen one never does.
const TERM_LIMIT: Duration = Duration::from_secs(5);
/// How long a killed process may take to disappear.
const KILL_LIMIT: Duration = Duration::from_secs(10);

/// Ends the children, and removes the scratch folders, of runs that are gone. Returns how many processes were ended.
pub fn clean_leftovers() -> Result<usize> {
    let data = paths::data()?;
    let mut ended = 0;
    // A killed child (a test) can have been a run itself, so look again until a round finds nothing.
    loop {
        let round = clean_round(&data.join("runs"), &data.join("scratch"))?;
        if round == 0 {
            return Ok(ended);
        }
        ended += round;
    }
}

/// Removes this run's own record; for the end of `main`, when no child is left.
pub fn forget_run() {
    if let (Ok(runs), Ok(run)) = (folder("runs"), this_run()) {
        let _ = fs::remove_file(runs.join(run));
    }
}

/// A folder for the data of one run, removed on drop, or by the next run.
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
        // The run's folder goes with its last scratch folder: this fails while there are others.
        if let Some(run) = self.folder.parent() {
            let _ = fs::remove_dir(run);
        }
    }
}

/// Puts a child on this run's record.
pub(super) fn record(child: u32) -> Result<()> {
    let name = identity(child).context("a child ended before it was recorded")?;
    let path = folder("runs")?.join(this_run()?);
    let mut file = File::options().create(true).append(true).open(&path)?;
    // One write: several threads append to this file.
    file.write_all(format!("{name}\n").as_bytes()).with_context(|| format!("cannot write {}", path.display()))
}

/// The number and the beginning of a process, fit for a file's name; `None` when there is no such process or it is a zombie.
pub(super) fn identity(pid: u32) -> Option<String> {
    let began = if cfg!(target_os = "linux") { began_by_proc(pid) } else { began_by_ps(pid) }?;
    Some(format!("{pid}-{began}"))
}

fn this_run() -> Result<String> {
    identity(std::process::id()).context("cannot read when this process began")
}

fn folder(name: &str) -> Result<PathBuf> {
    let folder = paths::data()?.join(name);
    fs::create_dir_all(&folder).with_context(|| format!("cannot create {}", folder.display()))?;
    Ok(folder)
}

/// Clock ticks since the boot, and the boot.
fn began_by_proc(pid: u32) -> Option<String> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // The second field, the program's name in brackets, may itself hold blanks and brackets.
    let fields: Vec<&str> = stat.rsplit_once(')')?.1.split_whitespace().collect();
    let (state, threads, ticks) = (fields.first()?, fields.get(17)?, fields.get(19)?);
    let boot = fs::read_to_string("/proc/sys/kernel/random/boot_id").ok()?;
    // While other threads of a killed process still end, the first is a zombie already and the ports are not free yet.
    let is_over = matches!(*state, "Z" | "X") && matches!(*threads, "0" | "1");
    (!is_over).then(|| format!("{ticks}-{}", boot.trim()))
}

fn began_by_ps(pid: u32) -> Option<String> {
    let output = std::process::Command::new("ps")
        .args(["-o", "state=", "-o", "lstart=", "-p", &pid.to_string()])
        .output()
        .ok()?;
    let line = String::from_utf8(output.stdout).ok()?;
    let (state, began) = line.trim().split_once(' ')?;
    (!state.starts_with('Z')).then(|| began.trim().replace(|c: char| !c.is_ascii_alphanumeric(), "-"))
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
        // Somebody else may be cleaning at the same moment.
        let children = fs::read_to_string(&record).unwrap_or_default();
        // The last one started first: services before their brokers.
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

/// Politely at first: Postgres then takes away its lock file, and Kafka closes its logs. The child leads its group, so what it
/// started goes with it.
fn end(child: &str) -> Result<()> {
    let pid = pid_of(child).context("a record of a child without a number")?;
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
    bail!("process {pid}, left by an earlier run, does not end")
}

#[cfg(test)]
mod tests {
    use std::os::unix::process::CommandExt;
    use std::process::{Child, Command};

    use super::*;

    fn sleeper() -> Child {
        Command::new("sleep").arg("60").process_group(0).spawn().unwrap()
    }

    /// The name of a process that was there and is no more.
    fn gone() -> String {
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
    fn children_and_data_of_a_dead_run_are_removed() {
        let folders = Folders::create();
        let (mut child, run) = (sleeper(), gone());
        fs::write(folders.runs().join(&run), format!("{}\n", identity(child.id()).unwrap())).unwrap();
        fs::create_dir_all(folders.scratch().join(&run).join("kafka")).unwrap();
        assert_eq!(folders.clean(), 1);
        assert!(child.try_wait().unwrap().is_some());
        assert_eq!(names_in(&folders.runs()).count() + names_in(&folders.scratch()).count(), 0);
    }

    #[test]
    fn a_living_run_keeps_its_children_and_data() {
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
    fn a_number_that_was_given_to_somebody_else_is_left_alone() {
        let folders = Folders::create();
        let mut stranger = sleeper();
        let (_, began) = identity(stranger.id())
            .map(|name| name.split_once('-').map(|(a, b)| (a.to_owned(), b.to_owned())).unwrap())
            .unwrap();
        fs::write(folders.runs().join(gone()), format!("{}-1{began}\n", stranger.id())).unwrap();
        assert_eq!(folders.clean(), 0);
        assert!(stranger.try_wait().unwrap().is_none());
        stranger.kill().unwrap();
        stranger.wait().unwrap();
    }

    #[test]
    fn the_line_of_a_record_that_was_cut_off_is_ignored() {
        let folders = Folders::create();
        fs::write(folders.runs().join(gone()), "12").unwrap();
        assert_eq!(folders.clean(), 0);
    }
}
