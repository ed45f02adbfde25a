//! `cargo xtask seeded`: a test that cannot fail proves nothing. Each patch in `tests/seeded`
//! applies one plausible bug to a copy of this source tree. At least one of the tests that the
//! patch names must then fail.

use std::fs;
use std::path::Path;
use std::process::ExitCode;
use std::time::Instant;

use anyhow::{Result, bail};
use testbed::paths;
use testbed::process::{Logs, Process};
use testbed::say::say;
use testbed::services::cargo_in;

use crate::patches::{Patch, patches};
use crate::tree::{apply, copy};

/// Runs the patches of these names, or all if none is given. The exit code is a failure when no
/// test catches a bug. It is an error when a patch does not apply or does not compile.
pub async fn run(names: &[String]) -> Result<ExitCode> {
    let logs = Logs::to_files("seeded")?;
    let patches = patches(names)?;
    // The copy is kept between patches and runs, so that each patch compiles only what it changes.
    let tree = paths::root().join("target/seeded");
    let mut missed = 0;
    for (index, patch) in patches.iter().enumerate() {
        let Patch { name, bug, promise, .. } = patch;
        say(format_args!("{}/{} {promise:<4} {name}: {bug} (about 2 minutes) …", index + 1, patches.len()));
        let start = Instant::now();
        copy(&tree, &logs).await?;
        apply(&patch.file, &tree, &logs).await?;
        let failed = failed_tests(patch, &tree, &logs).await?;
        let result = if failed.is_empty() {
            missed += 1;
            "NOT CAUGHT".to_owned()
        } else {
            format!("caught by {}", failed.join(", "))
        };
        say(format_args!("  {result} ({} s)", start.elapsed().as_secs()));
    }
    let bugs = patches.len();
    let caught = bugs - missed;
    say(format_args!("{bugs} bugs, {caught} caught. The tests' output is in {}", logs.folder().display()));
    Ok(if missed == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// Runs the patch's tests in the copy and returns the names of those that failed.
async fn failed_tests(patch: &Patch, tree: &Path, logs: &Logs) -> Result<Vec<String>> {
    let mut command = cargo_in(tree);
    command.args(["xtask", "test", "--"]).args(&patch.tests);
    let mut process = Process::spawn(&patch.name, command, logs)?;
    let status = process.wait().await;
    let printed = fs::read_to_string(logs.file(&patch.name))?;
    let failed = printed.lines().filter_map(|line| line.strip_prefix("test ")?.strip_suffix(" ... FAILED"));
    let failed: Vec<String> = failed.map(str::to_owned).collect();
    if failed.is_empty() && (!status.success() || !printed.contains("test result: ok. ")) {
        bail!("the tests of {} did not run: see {}", patch.name, logs.file(&patch.name).display());
    }
    Ok(failed)
}
