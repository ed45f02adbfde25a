//! The services' processes: started, killed, frozen, looked at.

use std::path::PathBuf;
use std::sync::atomic::Ordering;

use testbed::process::{Logs, Process};
use testbed::services::{Instance, RunningService};
use testbed::testing;
use uuid::Uuid;

use super::{Part, System};

impl System {
    /// Starts a service, without waiting, with further settings such as `FAULT_AT`. One that runs is killed first.
    pub fn spawn(&mut self, part: Part, settings: &[(&str, &str)]) {
        self.bury(part);
        let further = settings.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned()));
        let environment: Vec<_> = self.environment.iter().cloned().chain(further).collect();
        let running = self.ports[&part].spawn(&testing::stack().programs, &environment, &self.logs).unwrap();
        self.services.insert(part, running);
        *self.starts.entry(part).or_default() += 1;
        self.stopped.remove(&part);
        self.expected_to_end.remove(&part);
        if settings.iter().any(|(name, _)| *name == "FAULT_AT") {
            self.expected_to_end.insert(part);
        }
    }

    /// Starts all four services and waits until they are ready.
    pub async fn start_all(&mut self) {
        for part in Part::ALL {
            self.spawn(part, &[]);
        }
        self.ready(&Part::ALL).await;
    }

    /// Starts a service and waits until it is ready.
    pub async fn restart(&mut self, part: Part, settings: &[(&str, &str)]) {
        self.spawn(part, settings);
        self.ready(&[part]).await;
    }

    pub async fn ready(&mut self, parts: &[Part]) {
        for part in parts {
            self.running(*part).until_ready().await.unwrap();
        }
    }

    /// Runs a subcommand of the service to its end, for example `redrive`; what it printed.
    pub async fn run(&self, part: Part, arguments: &[&str]) -> anyhow::Result<String> {
        let program = testing::stack().programs.join(part.service().name);
        let mut command = tokio::process::Command::new(program);
        command.args(arguments).envs(self.environment.iter().cloned()).kill_on_drop(true);
        let output = tokio::time::timeout(crate::DEADLINE, command.output()).await??;
        let printed = String::from_utf8_lossy(&output.stdout).into_owned();
        anyhow::ensure!(output.status.success(), "{printed}{}", String::from_utf8_lossy(&output.stderr));
        Ok(printed)
    }

    /// Starts a subcommand of the service, with further settings; to be killed, frozen or waited for. It prints to
    /// [`System::printed`].
    pub fn spawn_subcommand(&self, part: Part, name: &str, arguments: &[&str], settings: &[(&str, &str)]) -> Process {
        let mut command = testbed::process::command(testing::stack().programs.join(part.service().name));
        command.arg(name).args(arguments).envs(self.environment.iter().cloned()).envs(settings.iter().copied());
        Process::spawn(name, command, &self.logs).unwrap()
    }

    /// What all runs of a subcommand have printed.
    pub fn printed(&self, name: &str) -> String {
        std::fs::read_to_string(self.logs.file(name)).unwrap_or_default()
    }

    /// SIGKILL; the service is gone when this returns.
    pub fn kill(&mut self, part: Part) {
        self.stopped.insert(part);
        self.running(part).process.kill();
    }

    /// SIGSTOP.
    pub fn freeze(&mut self, part: Part) {
        self.running(part).process.freeze();
    }

    /// SIGCONT.
    pub fn thaw(&mut self, part: Part) {
        self.running(part).process.thaw();
    }

    /// SIGUSR1: what its breaker has paused goes on.
    pub fn resume(&mut self, part: Part) {
        self.running(part).process.signal_user1();
    }

    /// SIGTERM, and waits for the end.
    pub async fn stop(&mut self, part: Part) {
        self.stopped.insert(part);
        self.running(part).stop().await;
    }

    /// Waits until the process has ended by itself or by a fault point; what it printed is complete then.
    pub async fn until_ended(&mut self, part: Part) {
        let ended = tokio::time::timeout(crate::DEADLINE, self.running(part).process.wait()).await;
        ended.unwrap_or_else(|_| panic!("{part:?} did not end within {:?}", crate::DEADLINE));
    }

    /// Whether the process has ended, by itself or by a fault point.
    pub fn has_ended(&mut self, part: Part) -> bool {
        self.running(part).process.ended().is_some()
    }

    /// Whether the process is stopped, by [`System::freeze`] or by a fault point. Linux only.
    pub fn is_frozen(&mut self, part: Part) -> bool {
        is_frozen(&self.running(part).process)
    }

    pub fn pid(&mut self, part: Part) -> u32 {
        self.running(part).process.pid()
    }

    /// What the service has logged so far, over all its starts.
    pub fn log_of(&self, part: Part) -> String {
        std::fs::read_to_string(self.logs.file(part.service().name)).unwrap_or_default()
    }

    /// A further copy of a service, beside the first, on ports of its own.
    pub fn spawn_another(&self, part: Part, settings: &[(&str, &str)]) -> RunningService {
        self.copies.store(true, Ordering::Relaxed);
        let logs = Logs::to_files(&format!("tests/{}-{}", self.prefix, Uuid::now_v7().simple())).unwrap();
        let further = settings.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned()));
        let environment: Vec<_> = self.environment.iter().cloned().chain(further).collect();
        self.copies_logs.lock().unwrap().push(logs.clone());
        Instance::on_free_ports(part.service()).spawn(&testing::stack().programs, &environment, &logs).unwrap()
    }

    /// What all processes have logged and printed, copies and subcommands too: the file's name and its text.
    pub fn all_logs(&self) -> Vec<(String, String)> {
        let copies = self.copies_logs.lock().unwrap();
        let folders = copies.iter().chain([&self.logs]).map(Logs::folder);
        let files = folders.flat_map(|folder| std::fs::read_dir(folder).unwrap()).map(|entry| entry.unwrap().path());
        let logs = files.filter(|file| file.extension().is_some_and(|extension| extension == "log"));
        let read = |file: PathBuf| {
            let name = file.file_stem().unwrap().to_string_lossy().into_owned();
            (name, String::from_utf8_lossy(&std::fs::read(file).unwrap()).into_owned())
        };
        logs.map(read).collect()
    }

    /// A file beside the services' logs.
    pub fn evidence(&self, name: &str) -> PathBuf {
        self.logs.folder().join(name)
    }
}

/// Linux only.
pub fn is_frozen(process: &Process) -> bool {
    let stat = std::fs::read_to_string(format!("/proc/{}/stat", process.pid()));
    stat.is_ok_and(|stat| stat.rsplit(") ").next().is_some_and(|state| state.starts_with('T')))
}
