//! `cargo xtask check`: everything that can be checked without running the system.

use std::process::ExitCode;

use anyhow::{Result, ensure};
use testbed::paths;
use testbed::process::{Logs, Process};
use testbed::say::say;
use testbed::services::{self, cargo};

use super::prepare::{self, Mode};

pub async fn run() -> Result<ExitCode> {
    let logs = Logs::to_files("check")?;
    let features = services::fault_points();
    run_cargo(&["fmt", "--all", "--check"], "run `cargo fmt`", &logs).await?;
    // With the feature fault-points clippy sees all code that it sees without the feature, and
    // more.
    let clippy = ["clippy", "--workspace", "--all-targets", "--features", &features, "--", "-D", "warnings"];
    run_cargo(&clippy, "fix what clippy reports above", &logs).await?;
    let tidy = ["test", "-p", "tests", "--test", "tidy"];
    run_cargo(&tidy, "the failed test above names the rule of the source tree that is violated", &logs).await?;
    check_dependencies(&logs).await?;
    prepare::run(Mode::Check).await
}

/// Licences, duplicate versions and known vulnerabilities of dependencies, as deny.toml allows
/// them. cargo-deny is not part of the toolchain, so a developer may not have it.
async fn check_dependencies(logs: &Logs) -> Result<()> {
    if paths::on_path(&["cargo-deny"]).is_none() {
        say("cargo deny check: skipped, because cargo-deny is not on the PATH (`cargo install --locked cargo-deny`)");
        return Ok(());
    }
    let arguments = ["deny", "check", "--hide-inclusion-graph"];
    let remedy = "fix what cargo-deny reports above, or allow it in deny.toml with a reason";
    run_cargo(&arguments, remedy, logs).await
}

async fn run_cargo(arguments: &[&str], remedy: &str, logs: &Logs) -> Result<()> {
    say(format_args!("cargo {}", arguments.join(" ")));
    let mut command = cargo();
    command.args(arguments);
    let status = Process::spawn_on_terminal("cargo", command, logs)?.wait().await;
    ensure!(status.success(), "`cargo {}` failed: {remedy}", arguments[0]);
    Ok(())
}
