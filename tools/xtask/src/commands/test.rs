//! `cargo xtask test`: runs the tests on one Kafka, Postgres and Redis that all of them share. A
//! test that breaks a component starts its own.

use std::process::ExitCode;

use anyhow::Result;
use testbed::fetch::fetch;
use testbed::postgres::Durability;
use testbed::process::{Logs, Process, Scratch};
use testbed::say::say;
use testbed::services::{self, cargo};
use testbed::stack::{Access, Ports};
use testbed::system::start_stack;
use testbed::testing;

/// The test runner's setting for the number of tests of a binary that run at once.
const THREADS: &str = "RUST_TEST_THREADS";

pub async fn run(arguments: &[String]) -> Result<ExitCode> {
    run_with(arguments, &[], None).await
}

/// Runs the tests with further variables in their environment. With `cargo_logs`, the output of
/// cargo is also written there, to `cargo.log`.
pub async fn run_with(
    arguments: &[String],
    settings: &[(&str, String)],
    cargo_logs: Option<&Logs>,
) -> Result<ExitCode> {
    let logs = Logs::to_files("test")?;
    let fetched = fetch().await?;
    let programs = services::build_with_fault_points(&logs).await?;
    let scratch = Scratch::create("test")?;
    let mut stack =
        start_stack(&fetched, scratch.path(), Ports::free(), Durability::Process, Access::Open, &logs).await?;

    let mut command = cargo();
    command.arg("test");
    // Packages chosen by the caller may not have the features of the others.
    if !arguments.iter().any(|argument| argument.starts_with("-p") || argument.starts_with("--package")) {
        // The features of the programs, so that cargo does not compile everything a second time.
        command.args(["--workspace", "--features", &services::fault_points()]);
    }
    command.args(arguments);
    command.env(testing::KAFKA, stack.kafka.address());
    command.env(testing::POSTGRES, stack.postgres.url());
    command.env(testing::VALKEY, stack.redis.url());
    command.env(testing::PROGRAMS, &programs);
    if std::env::var_os(THREADS).is_none() {
        command.env(THREADS, threads().to_string());
    }
    command.envs(settings.iter().map(|(name, value)| (name, value)));
    say("Compiling and running the tests. The logs of their processes are in target/local/logs/tests.");
    let mut cargo = match cargo_logs {
        Some(cargo_logs) => Process::spawn("cargo", command, cargo_logs)?,
        None => Process::spawn_on_terminal("cargo", command, &logs)?,
    };
    let status = tokio::select! {
        status = cargo.wait() => status,
        // Without it every further test would fail, and their messages would hide the cause.
        error = stack.until_one_ends() => return Err(error.context("the tests were stopped: a component that they share ended")),
    };
    Ok(if status.success() { ExitCode::SUCCESS } else { exit_code(status.code()) })
}

/// One more than there are cores. Tests spend more time waiting than computing: for a session to
/// time out, or for a frozen process to be replaced.
fn threads() -> usize {
    std::thread::available_parallelism().map_or(2, usize::from) + 1
}

fn exit_code(code: Option<i32>) -> ExitCode {
    code.and_then(|code| u8::try_from(code).ok()).map_or(ExitCode::FAILURE, ExitCode::from)
}
