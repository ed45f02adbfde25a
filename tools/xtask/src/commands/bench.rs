//! `cargo xtask bench`: builds the services and the benchmark as release programs, and runs it. The
//! benchmark is a crate of its own, because it needs the Kafka client.

use std::process::ExitCode;

use anyhow::{Result, ensure};
use testbed::fetch::fetch;
use testbed::process::{Logs, Process};
use testbed::services::{self, cargo};

/// The jobs are checked by the benchmark.
pub async fn run(jobs: &[String], quick: bool) -> Result<ExitCode> {
    let logs = Logs::to_files("bench-build")?;
    fetch().await?;
    let programs = services::build_release(&logs).await?;
    let mut command = cargo();
    command.args(["run", "--release", "-p", "bench", "--", "run", "--programs"]).arg(&programs);
    if quick {
        command.arg("--quick");
    }
    command.args(jobs);
    let status = Process::spawn_on_terminal("bench", command, &logs)?.wait().await;
    ensure!(status.success(), "the benchmark failed: see its messages above");
    Ok(ExitCode::SUCCESS)
}
