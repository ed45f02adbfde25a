//! `cargo xtask seeded`: a test that cannot fail proves nothing. Each patch in `tests/seeded`
//! applies one plausible bug to a copy of this source tree. At least one of the tests that the
//! patch names must then fail.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};
use std::time::Instant;

use anyhow::{Context, Result, bail, ensure};
use testbed::paths;
use testbed::process::{self, Logs, Process};
use testbed::say::say;
use testbed::services::cargo_in;

use crate::patches::{Patch, patches};

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
        apply(patch, &tree, &logs).await?;
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

/// Makes the copy equal to this source tree, except for `target/`. Writes only files that differ,
/// because cargo compiles what has a newer modification time.
async fn copy(tree: &Path, logs: &Logs) -> Result<()> {
    let mut git = process::command("git");
    git.args(["ls-files", "--cached", "--others", "--exclude-standard"]).current_dir(paths::root());
    let listing = output("git", git, logs).await?;
    fs::create_dir_all(tree)?;
    let mut present = BTreeSet::new();
    for name in listing.lines() {
        // A deleted file is still listed until its deletion is committed.
        let Ok(content) = fs::read(paths::root().join(name)) else { continue };
        let copy = tree.join(name);
        if fs::read(&copy).ok().as_ref() != Some(&content) {
            fs::create_dir_all(copy.parent().context("a file has a parent folder")?)?;
            fs::write(&copy, content)?;
        }
        present.insert(copy);
    }
    remove_others(tree, &present, &tree.join("target"))
}

/// Removes the files that are not in `present`, except below the folder `kept`.
fn remove_others(folder: &Path, present: &BTreeSet<PathBuf>, kept: &Path) -> Result<()> {
    for entry in fs::read_dir(folder)? {
        let path = entry?.path();
        if path.is_dir() && path != kept {
            remove_others(&path, present, kept)?;
        } else if path.is_file() && !present.contains(&path) {
            fs::remove_file(&path)?;
        }
    }
    Ok(())
}

async fn apply(patch: &Patch, tree: &Path, logs: &Logs) -> Result<()> {
    let mut git = process::command("git");
    // Otherwise git finds the repository around the copy and skips files that are ignored there.
    git.env("GIT_CEILING_DIRECTORIES", tree.parent().context("the copy is below target/")?);
    git.args(["apply", "--whitespace=nowarn"]).arg(&patch.file).current_dir(tree);
    output("git", git, logs).await.map(drop).with_context(|| {
        format!("{} no longer applies: rewrite the same bug against the current code", patch.file.display())
    })
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

/// Runs a command to its end and returns what it printed.
async fn output(name: &str, command: Command, logs: &Logs) -> Result<String> {
    // The log may already hold the output of earlier commands of the same name.
    let logged_before = fs::read_to_string(logs.file(name)).unwrap_or_default().len();
    let mut process = Process::spawn(name, command, logs)?;
    let status = process.wait().await;
    ensure!(status.success(), "{name} fails{}", process.last_lines());
    Ok(fs::read_to_string(logs.file(name))?.split_off(logged_before))
}
