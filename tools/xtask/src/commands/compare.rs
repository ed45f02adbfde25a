//! `cargo xtask compare`: builds Waybill and its synchronous version as release programs, starts
//! the components that both use, and runs the comparison. It is a crate of its own, because it
//! needs the Kafka client.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::{Result, ensure};
use testbed::fetch::fetch;
use testbed::paths;
use testbed::postgres::Durability;
use testbed::process::{Logs, Process, Scratch};
use testbed::services::{self, SYNCHRONOUS, cargo, cargo_in};
use testbed::stack::{Access, Ports};
use testbed::system::start_stack;
use testbed::testing;

use crate::tree;

/// In which the comparison gets the pids of Postgres, Kafka and Redis.
const COMPONENTS: &str = "WAYBILL_COMPARE_COMPONENTS";
/// In which it gets the folder with the programs that have the fourth receiver.
const ADDED: &str = "WAYBILL_COMPARE_ADDED";
/// Each adds the fourth receiver to one side.
const PATCHES: [&str; 2] = ["tests/compare/waybill-search.patch", "tests/compare/synchronous-search.patch"];
/// The service that the first of them adds.
const SEARCH: &str = "search";

pub async fn run(quick: bool) -> Result<ExitCode> {
    let logs = Logs::to_files("compare")?;
    let fetched = fetch().await?;
    // First, because both versions of the synchronous program have the same file in the target
    // folder.
    let added = build_added(&logs).await?;
    let programs = services::build_release_with_synchronous(&logs).await?;
    // Compiled before the components run, which would only wait.
    let mut build = cargo();
    build.args(["build", "--release", "-p", "compare"]);
    let status = Process::spawn_on_terminal("compare-build", build, &logs)?.wait().await;
    ensure!(status.success(), "the comparison does not compile: see cargo's messages above");
    let scratch = Scratch::create("compare")?;
    // Postgres stores each commit on the disk, and Kafka compiles with both compilers, as in
    // production.
    let mut stack = start_stack(&fetched, scratch.path(), Ports::free(), Durability::Disk, Access::Open, &logs).await?;
    stack.kafka.restart_with_both_compilers().await?;
    let components = [&stack.postgres.process, &stack.kafka.process, &stack.redis.process].map(Process::pid);
    let mut command = cargo();
    command.args(["run", "--release", "-p", "compare", "--"]);
    if quick {
        command.arg("--quick");
    }
    command.env(testing::KAFKA, stack.kafka.address());
    command.env(testing::POSTGRES, stack.postgres.url());
    command.env(testing::VALKEY, stack.redis.url());
    command.env(testing::PROGRAMS, &programs);
    command.env(ADDED, &added);
    command.env(COMPONENTS, components.map(|pid| pid.to_string()).join(","));
    let status = Process::spawn_on_terminal("compare", command, &logs)?.wait().await;
    ensure!(status.success(), "the comparison failed: see its messages above");
    Ok(ExitCode::SUCCESS)
}

/// Writes the page from the results of the last full run.
pub async fn write_page_again() -> Result<ExitCode> {
    let logs = Logs::to_files("compare")?;
    let mut command = cargo();
    command.args(["run", "--release", "-p", "compare", "--", "--page"]);
    let status = Process::spawn_on_terminal("compare", command, &logs)?.wait().await;
    ensure!(status.success(), "the page was not written: see the messages above");
    Ok(ExitCode::SUCCESS)
}

/// Builds the programs with the fourth receiver in a copy of the tree, and returns the folder with
/// them.
async fn build_added(logs: &Logs) -> Result<PathBuf> {
    let target = paths::root().join("target");
    let copy = target.join("compare/tree");
    tree::copy(&copy, logs).await?;
    for patch in PATCHES {
        tree::apply(&paths::root().join(patch), &copy, logs).await?;
    }
    let mut build = cargo_in(&copy);
    // The same target folder, so that the dependencies are compiled once.
    build.args(["build", "--release", "-p", SYNCHRONOUS, "-p", SEARCH, "--target-dir"]).arg(&target);
    let status = Process::spawn_on_terminal("compare-added", build, logs)?.wait().await;
    ensure!(status.success(), "the patches in tests/compare do not compile: see cargo's messages above");
    let added = target.join("compare/added");
    fs::create_dir_all(&added)?;
    for program in [SYNCHRONOUS, SEARCH] {
        replace(&target.join("release").join(program), &added.join(program))?;
    }
    Ok(added)
}

/// Copies a program. The file of a running one cannot be written, so the old file is removed first.
fn replace(from: &Path, to: &Path) -> Result<()> {
    if to.exists() {
        fs::remove_file(to)?;
    }
    fs::copy(from, to)?;
    Ok(())
}
