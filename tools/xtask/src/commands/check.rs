//! `cargo xtask check`: what can be said about the tree without running the system.

use std::process::ExitCode;

use anyhow::{Result, ensure};
use testbed::process::{Logs, Process};
use testbed::say::say;
use testbed::services::{self, cargo};

use super::prepare;

pub async fn run() -> Result<ExitCode> {
    let logs = Logs::fresh("check", false)?;
    let features = services::fault_points();
    run_cargo(&["fmt", "--all", "--check"], "run `cargo fmt`", &logs).await?;
    // With fault points there is more code to look at, none less.
    let clippy = ["clippy", "--workspace", "--all-targets", "--features", &features, "--", "-D", "warnings"];
    run_cargo(&clippy, "clippy's messages above say what to change", &logs).await?;
    run_cargo(
        &["test", "-p", "tests", "--test", "tidy"],
        "the test above names the rule of the tree that is broken",
        &logs,
    )
    .await?;
    prepare::run(true).await
}

async fn run_cargo(arguments: &[&str], remedy: &str, logs: &Logs) -> Result<()> {
    say(format_args!("cargo {}", arguments.join(" ")));
    let mut command = cargo();
    command.args(arguments);
    let status = Process::spawn_on_terminal("cargo", command, logs)?.wait().await;
    ensure!(status.success(), "`cargo {}` found something: {remedy}", arguments[0]);
    Ok(())
}
