//! Child processes that do not outlive us.
//!
//! Each child leads a process group of its own. A Ctrl-C on the terminal therefore reaches only us,
//! and we end the children in the right order. Dropping a `Process` kills its group, even when a
//! panic unwinds. If we are killed with `kill -9`, the next run ends our children, see `leftovers`.

mod leftovers;
mod logs;

use std::io::{PipeReader, Write};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::thread::JoinHandle;
use std::time::Duration;

use anyhow::{Context, Error, Result, anyhow, bail};
use futures::future::select_all;
use nix::sys::signal::{Signal, killpg};
use nix::unistd::Pid;
use tokio::time::{Instant, sleep, timeout};

pub use leftovers::{Scratch, clean_leftovers, forget_run};
pub use logs::Logs;

/// How often a child is checked while we wait for it.
const POLL: Duration = Duration::from_millis(20);
/// How long to wait, after a child has ended, until its last lines are in its log.
const LOG_LIMIT: Duration = Duration::from_secs(1);
/// How many lines of a log an error message quotes.
const QUOTED_LINES: usize = 15;

/// The child waits for one line on stdin before it executes the program. By then it is on record,
/// see `leftovers`. If we die first, stdin is closed and the child exits.
const GATE: &str = r#"read -r go && exec "$0" "$@" </dev/null"#;

/// A command that `Process::spawn` accepts. Arguments, environment and user are added as to any
/// other.
pub fn command(program: impl AsRef<Path>) -> Command {
    let mut command = Command::new("/bin/sh");
    command.args(["-c", GATE]).arg(program.as_ref());
    command
}

pub struct Process {
    name: String,
    child: Child,
    ended: Option<ExitStatus>,
    logs: Logs,
    copier: Option<JoinHandle<()>>,
}

impl Process {
    /// Starts a command made by [`command`]. Its output goes to `<logs>/<name>.log`.
    pub fn spawn(name: &str, mut command: Command, logs: &Logs) -> Result<Self> {
        let (reader, writer) = std::io::pipe()?;
        command.stdout(writer.try_clone()?).stderr(writer);
        let mut process = Self::spawn_on_terminal(name, command, logs)?;
        process.copier = Some(copy(logs, name, reader)?);
        Ok(process)
    }

    /// As [`Process::spawn`], for a program that writes to the terminal itself, such as cargo.
    pub fn spawn_on_terminal(name: &str, mut command: Command, logs: &Logs) -> Result<Self> {
        let mut child =
            command.stdin(Stdio::piped()).process_group(0).spawn().with_context(|| format!("cannot start {name}"))?;
        let mut gate = child.stdin.take().expect("stdin is piped");
        leftovers::record(child.id())?;
        gate.write_all(b"go\n").with_context(|| format!("cannot start {name}"))?;
        Ok(Self { name: name.to_owned(), child, ended: None, logs: logs.clone(), copier: None })
    }

    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// The exit status, if the process has ended.
    pub fn ended(&mut self) -> Option<ExitStatus> {
        if self.ended.is_none() {
            self.ended = self.child.try_wait().expect("our own child can be waited for");
        }
        self.ended
    }

    /// Waits until the process has ended. Dropping the future does not affect the process.
    pub async fn wait(&mut self) -> ExitStatus {
        let status = loop {
            match self.ended() {
                Some(status) => break status,
                None => sleep(POLL).await,
            }
        };
        let deadline = Instant::now() + LOG_LIMIT;
        while self.copier.as_ref().is_some_and(|copier| !copier.is_finished()) && Instant::now() < deadline {
            sleep(POLL).await;
        }
        status
    }

    /// Polls `is_ready` until it returns true. Fails when the process ends first, or after `limit`.
    pub async fn until_ready(&mut self, limit: Duration, is_ready: impl AsyncFn() -> bool) -> Result<()> {
        let deadline = Instant::now() + limit;
        loop {
            if let Some(status) = self.ended() {
                self.wait().await;
                bail!("{} ended before it was ready ({status}){}", self.name, self.last_lines());
            }
            if is_ready().await {
                return Ok(());
            }
            if Instant::now() > deadline {
                bail!("{} was not ready within {limit:?}{}", self.name, self.last_lines());
            }
            sleep(POLL).await;
        }
    }

    /// Sends the signal to the process, not to its group. Does nothing if the process has ended.
    pub fn signal(&mut self, signal: Signal) {
        if self.ended().is_none() {
            // The child is not reaped yet, so its pid cannot have been reused.
            let _ = nix::sys::signal::kill(self.group(), signal);
        }
    }

    /// Sends SIGSTOP: the process keeps its connections open and answers nothing.
    pub fn freeze(&mut self) {
        self.signal(Signal::SIGSTOP);
    }

    /// Sends SIGTERM.
    pub fn signal_terminate(&mut self) {
        self.signal(Signal::SIGTERM);
    }

    /// Sends SIGUSR1, whose meaning depends on the program.
    pub fn signal_user1(&mut self) {
        self.signal(Signal::SIGUSR1);
    }

    /// Sends SIGHUP: most servers read their settings again.
    pub fn signal_reload(&mut self) {
        self.signal(Signal::SIGHUP);
    }

    /// Sends SIGCONT, which ends a `freeze`.
    pub fn thaw(&mut self) {
        self.signal(Signal::SIGCONT);
    }

    /// Sends the signal, and kills the process if it has not ended after `limit`. A frozen process
    /// handles the signal when it continues, so it is thawed.
    pub async fn stop(&mut self, signal: Signal, limit: Duration) -> ExitStatus {
        self.signal(signal);
        self.thaw();
        if let Ok(status) = timeout(limit, self.wait()).await {
            return status;
        }
        self.kill()
    }

    /// Sends SIGKILL to the process and its group, and returns when the process has ended.
    pub fn kill(&mut self) -> ExitStatus {
        if self.ended().is_none() {
            let _ = killpg(self.group(), Signal::SIGKILL);
            self.ended = Some(self.child.wait().expect("our own child can be waited for"));
        }
        self.ended.expect("the process has ended")
    }

    /// The end of the log, for an error message.
    pub fn last_lines(&self) -> String {
        let path = self.logs.file(&self.name);
        let text = std::fs::read_to_string(&path).unwrap_or_default();
        let lines: Vec<&str> = text.lines().collect();
        let quoted = lines[lines.len().saturating_sub(QUOTED_LINES)..].join("\n    ");
        format!("; the end of {}:\n    {quoted}", path.display())
    }

    fn group(&self) -> Pid {
        Pid::from_raw(self.child.id().cast_signed())
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        self.kill();
    }
}

/// Waits until one of these processes has ended, and returns an error that names it and quotes the
/// end of its log.
///
/// # Panics
/// There is no process.
pub async fn until_one_ends(processes: impl IntoIterator<Item = &mut Process>) -> Error {
    let ends = processes.into_iter().map(|process| {
        Box::pin(async {
            let status = process.wait().await;
            anyhow!("{} ended ({status}){}", process.name, process.last_lines())
        })
    });
    select_all(ends).await.0
}

fn copy(logs: &Logs, name: &str, reader: PipeReader) -> Result<JoinHandle<()>> {
    let mut log = logs.open(name)?;
    let copier = std::thread::Builder::new().name(format!("log of {name}"));
    Ok(copier.spawn(move || log.copy(reader))?)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sh(script: &str) -> Command {
        let mut command = command("/bin/sh");
        command.args(["-c", script]);
        command
    }

    fn alive(pid: u32) -> bool {
        leftovers::identity(pid).is_some()
    }

    #[tokio::test]
    async fn output_goes_to_the_log_and_the_exit_status_is_returned() {
        let logs = Logs::to_files("testbed-tests/output").unwrap();
        let mut process = Process::spawn("printer", sh("echo out; echo err >&2; exit 3"), &logs).unwrap();
        assert_eq!(process.wait().await.code(), Some(3));
        assert_eq!(std::fs::read_to_string(logs.file("printer")).unwrap(), "out\nerr\n");
    }

    #[tokio::test]
    async fn a_process_that_ends_before_it_is_ready_has_its_log_quoted() {
        let logs = Logs::to_files("testbed-tests/early").unwrap();
        let mut process = Process::spawn("broken", sh("echo the reason; exit 1"), &logs).unwrap();
        let error = process.until_ready(Duration::from_secs(5), async || false).await.unwrap_err();
        assert!(error.to_string().contains("broken ended before it was ready"), "{error}");
        assert!(error.to_string().contains("the reason"), "{error}");
    }

    #[tokio::test]
    async fn a_process_that_ignores_sigterm_is_killed() {
        let logs = Logs::to_files("testbed-tests/stubborn").unwrap();
        let mut process =
            Process::spawn("stubborn", sh("trap '' TERM; echo up; sleep 60 & wait; sleep 60"), &logs).unwrap();
        let log = logs.file("stubborn");
        process.until_ready(Duration::from_secs(5), async || log.metadata().is_ok_and(|m| m.len() > 0)).await.unwrap();
        assert!(!process.stop(Signal::SIGTERM, Duration::from_millis(100)).await.success());
    }

    #[tokio::test]
    async fn a_frozen_process_that_is_stopped_ends_by_itself() {
        let logs = Logs::to_files("testbed-tests/frozen").unwrap();
        let mut process = Process::spawn("frozen", sh("trap 'exit 7' TERM; echo up; sleep 60 & wait"), &logs).unwrap();
        let log = logs.file("frozen");
        process.until_ready(Duration::from_secs(5), async || log.metadata().is_ok_and(|m| m.len() > 0)).await.unwrap();
        process.freeze();
        assert_eq!(process.stop(Signal::SIGTERM, Duration::from_secs(5)).await.code(), Some(7));
    }

    #[tokio::test]
    async fn of_several_processes_the_one_that_ended_is_named_with_its_log() {
        let logs = Logs::to_files("testbed-tests/several").unwrap();
        let scripts = [("lasting", "sleep 60"), ("ending", "echo No space left on device; exit 4")];
        let mut processes = scripts.map(|(name, script)| Process::spawn(name, sh(script), &logs).unwrap());
        let error = until_one_ends(&mut processes).await.to_string();
        assert!(error.starts_with("ending ended (exit status: 4)"), "{error}");
        assert!(error.ends_with("No space left on device"), "{error}");
    }

    #[test]
    fn dropping_a_process_kills_its_whole_group() {
        let logs = Logs::to_files("testbed-tests/group").unwrap();
        let process = Process::spawn("parent", sh("sleep 60 & echo $!; wait"), &logs).unwrap();
        let grandchild = loop {
            let text = std::fs::read_to_string(logs.file("parent")).unwrap_or_default();
            if let Some(Ok(pid)) = text.strip_suffix('\n').map(str::parse) {
                break pid;
            }
            std::thread::yield_now();
        };
        assert!(alive(grandchild));
        drop(process);
        let deadline = std::time::Instant::now() + Duration::from_secs(5);
        while alive(grandchild) {
            assert!(std::time::Instant::now() < deadline, "the grandchild is still alive");
            std::thread::yield_now();
        }
    }
}
