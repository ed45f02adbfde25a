//! Subcommands of the services, such as `analytics redrive`.

use testbed::process::Process;
use testbed::testing;
use topology::Service;

use super::{Processes, service_process};
use crate::waiting::DEADLINE;

impl Processes {
    /// Runs a subcommand to its end and returns its output. Fails with the output if the exit
    /// status is not 0.
    pub async fn run(&self, service: Service, arguments: &[&str]) -> anyhow::Result<String> {
        self.run_with(service, arguments, &[]).await
    }

    /// As [`Processes::run`], with further variables.
    pub async fn run_with(
        &self,
        service: Service,
        arguments: &[&str],
        settings: &[(&str, &str)],
    ) -> anyhow::Result<String> {
        let program = testing::stack().programs.join(service.name);
        let mut command = tokio::process::Command::new(program);
        command.args(arguments).env("ADMIN_ADDR", self.admin_address(service)).kill_on_drop(true);
        command.envs(self.environment_of(service, settings));
        let output = tokio::time::timeout(DEADLINE, command.output()).await??;
        let printed = String::from_utf8_lossy(&output.stdout).into_owned();
        anyhow::ensure!(output.status.success(), "{printed}{}", String::from_utf8_lossy(&output.stderr));
        Ok(printed)
    }

    /// Starts a subcommand with further variables, to be killed, frozen or waited for.
    /// [`Processes::printed`] returns its output.
    pub fn spawn_subcommand(
        &self,
        service: Service,
        name: &str,
        arguments: &[&str],
        settings: &[(&str, &str)],
    ) -> Process {
        let mut command = service_process::command(service);
        command.arg(name).args(arguments).env("ADMIN_ADDR", self.admin_address(service));
        command.envs(self.environment_of(service, settings));
        Process::spawn(name, command, &self.logs).unwrap()
    }

    /// Where the subcommands find the running service.
    fn admin_address(&self, service: Service) -> String {
        self.admin(service).url("").replace("http://", "")
    }
}
