//! `cargo xtask test`: every test, on one Kafka, Postgres and Redis that all of them share. Tests that break a component start
//! their own.

use std::process::ExitCode;

use anyhow::Result;
use testbed::fetch::fetch;
use testbed::postgres::Durability;
use testbed::process::{Logs, Process, Scratch};
use testbed::services::{self, cargo};
use testbed::stack::Ports;
use testbed::system::start_stack;
use testbed::testing;

/// How many tests of a binary run at once, as the test runner reads it.
const THREADS: &str = "RUST_TEST_THREADS";

pub async fn run(arguments: &[String]) -> Result<ExitCode> {
    run_with(arguments, &[], None).await
}

/// With further variables in the tests' environment; what cargo prints is kept in `cargo.log` if a folder for it is given.
pub async fn run_with(arguments: &[String], settings: &[(&str, String)], kept: Option<&Logs>) -> Result<ExitCode> {
    let logs = Logs::fresh("test", false)?;
    let fetched = fetch().await?;
    let programs = services::build_with_fault_points(&logs).await?;
    let scratch = Scratch::create("test")?;
    let stack = start_stack(&fetched, scratch.path(), Ports::free(), Durability::Process, &logs).await?;

    let mut command = cargo();
    command.arg("test");
    // Packages chosen by the caller may lack the features of the others.
    if !arguments.iter().any(|argument| argument.starts_with("-p") || argument.starts_with("--package")) {
        // The same features as the programs, or everything is compiled twice.
        command.args(["--workspace", "--features", &services::fault_points()]);
    }
    command.args(arguments);
    command.env(testing::KAFKA, stack.kafka.address());
    command.env(testing::POSTGRES, stack.postgres.url());
    command.env(testing::VALKEY, stack.redis.url());
    command.env(testing::BIN, &programs);
    if std::env::var_os(THREADS).is_none() {
        command.env(THREADS, at_once().to_string());
    }
    command.envs(settings.iter().map(|(name, value)| (name, value)));
    let mut cargo = match kept {
        Some(kept) => Process::spawn("cargo", command, kept)?,
        None => Process::spawn_on_terminal("cargo", command, &logs)?,
    };
    let status = cargo.wait().await;
    Ok(if status.success() { ExitCode::SUCCESS } else { exit_code(status.code()) })
}

/// Tests wait more than they compute: for a session to end, for a frozen process to be given up. So one more than there are cores.
fn at_once() -> usize {
    std::thread::available_parallelism().map_or(2, usize::from) + 1
}

fn exit_code(code: Option<i32>) -> ExitCode {
    code.and_then(|code| u8::try_from(code).ok()).map_or(ExitCode::FAILURE, ExitCode::from)
}
