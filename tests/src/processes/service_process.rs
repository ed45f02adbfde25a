//! One process of a service. It is the only file that knows how the test bed starts a service.

use std::collections::BTreeMap;
use std::process::ExitStatus;

use testbed::process::{Logs, Process};
use testbed::services::{Instance, RunningService};
use testbed::testing;
use topology::{SERVICES, Service};

use super::admin::Admin;
use crate::waiting::{DEADLINE, eventually};

/// Where the services listen, by name. Each system has ports of its own.
#[derive(Clone)]
pub struct Addresses(BTreeMap<&'static str, Instance>);

impl Addresses {
    pub(super) fn on_free_ports() -> Self {
        Self(SERVICES.map(|service| (service.name, Instance::on_free_ports(service))).into())
    }

    /// The same, with this process instead of the first one of its service.
    pub(crate) fn with(&self, process: &ServiceProcess) -> Self {
        let mut addresses = self.clone();
        addresses.0.insert(process.service.name, process.running.instance);
        addresses
    }

    pub(crate) fn url(&self, service: Service) -> String {
        self.0[service.name].url()
    }

    pub(super) fn admin(&self, service: Service) -> Admin {
        Admin::new(self.0[service.name].admin_url())
    }

    /// The settings of the console that say where the services are.
    pub(super) fn for_console(&self) -> [(String, String); 2] {
        testbed::tools::addresses(self.0.values())
    }
}

/// A running process of a service. It is killed when it is dropped.
pub struct ServiceProcess {
    pub service: Service,
    running: RunningService,
}

impl ServiceProcess {
    pub(super) fn spawn(
        service: Service,
        addresses: &Addresses,
        environment: &[(String, String)],
        logs: &Logs,
    ) -> Self {
        let running = addresses.0[service.name].spawn(&testing::stack().programs, environment, logs).unwrap();
        Self { service, running }
    }

    pub fn admin(&self) -> Admin {
        Admin::new(self.running.instance.admin_url())
    }

    pub async fn until_ready(&mut self) {
        self.running.until_ready().await.unwrap();
    }

    /// SIGTERM, without waiting for the end.
    pub fn terminate(&mut self) {
        self.running.process.signal_terminate();
    }

    /// SIGTERM, and waits for the end.
    pub async fn stop(&mut self) {
        self.running.stop().await;
    }

    /// SIGKILL. The process has ended when this returns.
    pub fn kill(&mut self) {
        self.running.process.kill();
    }

    /// SIGSTOP.
    pub fn freeze(&mut self) {
        self.running.process.freeze();
    }

    /// SIGCONT.
    pub fn thaw(&mut self) {
        self.running.process.thaw();
    }

    /// SIGUSR1: consumers that the breaker has paused resume.
    pub fn resume_consumers(&mut self) {
        self.running.process.signal_user1();
    }

    /// Whether the process is stopped, by a signal or by a fault point. Linux only.
    pub fn is_frozen(&self) -> bool {
        is_frozen(&self.running.process)
    }

    pub async fn until_frozen(&self) {
        let what = format!("{} is frozen", self.service.name);
        eventually(&what, async || self.is_frozen().then_some(())).await;
    }

    /// The exit status, if the process has ended.
    pub fn exit_status(&mut self) -> Option<ExitStatus> {
        self.running.process.ended()
    }

    /// Waits until the process has ended by itself or by a fault point. Its log is complete then.
    pub async fn until_ended(&mut self) {
        let name = self.service.name;
        let ended = tokio::time::timeout(DEADLINE, self.running.process.wait()).await;
        ended.unwrap_or_else(|_| panic!("{name} did not end within {DEADLINE:?}"));
    }

    pub fn pid(&self) -> u32 {
        self.running.process.pid()
    }
}

/// The command of a service's program, for its subcommands.
pub(super) fn command(service: Service) -> std::process::Command {
    testbed::process::command(testing::stack().programs.join(service.name))
}

/// Whether a process is stopped, by a signal or by a fault point. Linux only.
pub fn is_frozen(process: &Process) -> bool {
    let stat = std::fs::read_to_string(format!("/proc/{}/stat", process.pid()));
    stat.is_ok_and(|stat| stat.rsplit(") ").next().is_some_and(|state| state.starts_with('T')))
}
