//! `cargo xtask seeded`: tests that cannot fail prove nothing. Each patch in `tests/seeded` puts one mistake into a copy of this
//! tree, a mistake of the kind that looks right; the tests that its head names have to notice it.
//!
//! ```text
//! Bug: the inbox is not asked
//! Promise: I7
//! Tests: --test end_to_end -- relay::
//! --- a/shared/src/messaging/inbox.rs
//! ```

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Instant;

use anyhow::{Context, Result, bail, ensure};
use testbed::paths;
use testbed::process::{self, Logs, Process};
use testbed::say::say;
use testbed::services::cargo_in;

struct Patch {
    name: String,
    file: PathBuf,
    bug: String,
    promise: String,
    tests: Vec<String>,
}

/// All bugs, or those of these names. Fails when one is not noticed, does not apply or does not compile.
pub async fn run(names: &[String]) -> Result<ExitCode> {
    let logs = Logs::fresh("seeded", false)?;
    let patches = patches(names)?;
    // Kept, so that each bug compiles only what it touches.
    let tree = paths::root().join("target/seeded");
    let mut unnoticed = 0;
    for patch in &patches {
        let begin = Instant::now();
        copy(&tree, &logs).await?;
        apply(patch, &tree, &logs).await?;
        let noticed = test(patch, &tree, &logs).await?;
        unnoticed += usize::from(noticed.is_empty());
        let by = if noticed.is_empty() { "NOBODY NOTICED".to_owned() } else { noticed.join(", ") };
        let (name, bug, promise) = (&patch.name, &patch.bug, &patch.promise);
        say(format_args!("{promise:<4} {name}: {bug}\n     {} s: {by}", begin.elapsed().as_secs()));
    }
    say(format_args!(
        "{} bugs, {} noticed; the output of their tests: {}",
        patches.len(),
        patches.len() - unnoticed,
        logs.folder().display()
    ));
    Ok(if unnoticed == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

fn patches(names: &[String]) -> Result<Vec<Patch>> {
    let folder = paths::root().join("tests/seeded");
    let mut patches = vec![];
    for entry in fs::read_dir(&folder)? {
        let file = entry?.path();
        let name = file.file_stem().unwrap_or_default().to_string_lossy().into_owned();
        if file.extension().is_some_and(|extension| extension == "patch") && (names.is_empty() || names.contains(&name))
        {
            patches.push(read(name, file)?);
        }
    }
    patches.sort_by(|one, other| one.name.cmp(&other.name));
    for name in names {
        ensure!(patches.iter().any(|patch| patch.name == *name), "there is no tests/seeded/{name}.patch");
    }
    Ok(patches)
}

fn read(name: String, file: PathBuf) -> Result<Patch> {
    let text = fs::read_to_string(&file)?;
    let field = |field: &str| {
        let line = text.lines().find_map(|line| line.strip_prefix(field)?.strip_prefix(": "));
        line.map(str::to_owned).with_context(|| format!("{} has no line `{field}: …`", file.display()))
    };
    let tests = field("Tests")?.split(' ').map(str::to_owned).collect();
    Ok(Patch { bug: field("Bug")?, promise: field("Promise")?, tests, name, file })
}

/// Makes the copy equal to this tree, but for `target/`, and writes only what differs: cargo compiles what is newer.
async fn copy(tree: &Path, logs: &Logs) -> Result<()> {
    let mut git = process::command("git");
    git.args(["ls-files", "--cached", "--others", "--exclude-standard"]).current_dir(paths::root());
    let listing = output("git", git, logs).await?;
    fs::create_dir_all(tree)?;
    let mut present = BTreeSet::new();
    for name in listing.lines() {
        let (from, to) = (paths::root().join(name), tree.join(name));
        // A file that was deleted is still listed until that is committed.
        let Ok(content) = fs::read(&from) else { continue };
        present.insert(to.clone());
        if fs::read(&to).ok().as_ref() != Some(&content) {
            fs::create_dir_all(to.parent().context("a file lies in a folder")?)?;
            fs::write(&to, content)?;
        }
    }
    remove_others(tree, &present, &tree.join("target"))
}

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
    // Else git finds the repository around the copy, and skips files that are ignored there.
    git.env("GIT_CEILING_DIRECTORIES", tree.parent().context("the copy lies in target/")?);
    git.args(["apply", "--whitespace=nowarn"]).arg(&patch.file).current_dir(tree);
    output("git", git, logs).await.map(drop).with_context(|| {
        format!("{} does not apply any more: make the same mistake in today's code", patch.file.display())
    })
}

/// The tests that failed.
async fn test(patch: &Patch, tree: &Path, logs: &Logs) -> Result<Vec<String>> {
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

async fn output(name: &str, command: std::process::Command, logs: &Logs) -> Result<String> {
    let before = fs::read_to_string(logs.file(name)).unwrap_or_default().len();
    let mut process = Process::spawn(name, command, logs)?;
    let status = process.wait().await;
    ensure!(status.success(), "{name} fails{}", process.last_lines());
    Ok(fs::read_to_string(logs.file(name))?.split_off(before))
}
