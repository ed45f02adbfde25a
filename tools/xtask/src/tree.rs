//! A copy of this source tree in which a patch is applied.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, ensure};
use testbed::paths;
use testbed::process::{self, Logs, Process};

/// Makes the copy equal to this source tree, except for `target/`. Writes only files that differ,
/// because cargo compiles what has a newer modification time.
pub async fn copy(tree: &Path, logs: &Logs) -> Result<()> {
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

/// Applies a patch to the copy.
pub async fn apply(patch: &Path, tree: &Path, logs: &Logs) -> Result<()> {
    let mut git = process::command("git");
    // Otherwise git finds the repository around the copy and skips files that are ignored there.
    git.env("GIT_CEILING_DIRECTORIES", tree.parent().context("the copy is below target/")?);
    git.args(["apply", "--whitespace=nowarn"]).arg(patch).current_dir(tree);
    output("git", git, logs).await.map(drop).with_context(|| {
        format!("{} no longer applies: rewrite the same change against the current code", patch.display())
    })
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
