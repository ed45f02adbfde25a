//! The console can be deleted: its folder, its entry in the topology, and its stanza in the compose
//! file. Everything else builds and works as before. This is a test program of its own, so that no
//! other test waits while it compiles.

#![allow(
    clippy::disallowed_methods,
    clippy::unwrap_used,
    clippy::indexing_slicing,
    reason = "a panic is how a test fails"
)]

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::Command;

use serde_json::{Value, json};
use testbed::paths;
use testbed::process::{Logs, Process};
use testbed::services::cargo_in;
use testbed::testing::prefix;
use tests::eventually;
use tests::up::Up;

/// The program `xtask` of the copy. Under its own name it would replace that of this tree, which
/// other tests run.
const PROGRAM: &str = "xtask-without-console";
const FOLDER: &str = "tools/console/";
const ENTRY: &str = "pub const CONSOLE: Option<Tool> = ";

#[tokio::test(flavor = "multi_thread")]
async fn the_rest_builds_and_works_without_the_console() {
    let tree = paths::root().join("target/without-console");
    write(&tree, &without_console(sources()));
    // The dependencies and the programs of the services are those of this tree.
    let target = paths::root().join("target");
    if !tree.join("target").is_symlink() {
        symlink(&target, tree.join("target")).unwrap();
    }
    let mut build = cargo_in(&tree);
    build.args(["build", "--offline", "-p", "xtask", "--bin", PROGRAM, "--target-dir"]).arg(&target);
    let logs = Logs::to_files(&format!("tests/without-console-{}", prefix())).unwrap();
    let mut build = Process::spawn("cargo", build, &logs).unwrap();
    assert!(build.wait().await.success(), "{}", build.last_lines());

    let up = Up::start_program(&target.join("debug").join(PROGRAM)).await;
    assert!(!up.printed().contains("See it at"), "{}", up.printed());
    let client = reqwest::Client::new();
    let user = json!({ "email": "ada@example.com", "display_name": "Ada Lovelace" });
    let request = client.post(format!("{}/users", up.address("user"))).header("idempotency-key", "first");
    let answer: Value = request.json(&user).send().await.unwrap().error_for_status().unwrap().json().await.unwrap();
    let profile = format!("{}/profiles/{}", up.address("cache"), answer["id"].as_str().unwrap());
    eventually("the cache has the user", async || {
        client.get(&profile).send().await.unwrap().error_for_status().ok().map(drop)
    })
    .await;
    eventually("the user gets a mail", async || {
        let mails = client.get(up.address("mails")).send().await.unwrap().text().await.unwrap();
        mails.contains("ada@example.com").then_some(())
    })
    .await;
    assert!(up.interrupt().success());
}

/// The files of this tree.
fn sources() -> BTreeMap<PathBuf, String> {
    let mut git = Command::new("git");
    git.args(["ls-files", "--cached", "--others", "--exclude-standard"]).current_dir(paths::root());
    let listing = git.output().unwrap();
    assert!(listing.status.success(), "{}", String::from_utf8_lossy(&listing.stderr));
    let listing = String::from_utf8(listing.stdout).unwrap();
    let content = |name: &str| Some((PathBuf::from(name), fs::read_to_string(paths::root().join(name)).ok()?));
    // Pictures are not text, and no build reads them.
    listing.lines().filter_map(content).collect()
}

/// What a developer does to delete the console, and a program of another name.
fn without_console(mut files: BTreeMap<PathBuf, String>) -> BTreeMap<PathBuf, String> {
    files.retain(|path, _| !path.starts_with(FOLDER));
    change(&mut files, "tools/topology/src/lib.rs", |text| {
        let (before, rest) = text.split_once(ENTRY).expect("the topology has an entry for the console");
        let (_, after) = rest.split_once(";\n").unwrap();
        format!("{before}{ENTRY}None;\n{after}")
    });
    change(&mut files, "docker-compose.yml", |text| {
        let (before, rest) = text.split_once("\n  console:\n").expect("docker-compose.yml has the console");
        let (_, after) = rest.split_once("\n\n").unwrap();
        format!("{before}\n\n{after}")
    });
    let compose = &files[Path::new("docker-compose.yml")];
    let knows = |line: &&str| line.contains("console") && !line.trim_start().starts_with('#');
    let others: Vec<&str> = compose.lines().filter(knows).filter(|line| !line.contains("OTEL_EXPORTER")).collect();
    assert_eq!(others, Vec::<&str>::new(), "another stanza needs the console");
    change(&mut files, "tools/xtask/Cargo.toml", |text| {
        format!("{text}\n[[bin]]\nname = \"{PROGRAM}\"\npath = \"src/main.rs\"\n")
    });
    files
}

fn change(files: &mut BTreeMap<PathBuf, String>, path: &str, change: impl Fn(&str) -> String) {
    let text = files.get_mut(Path::new(path)).unwrap_or_else(|| panic!("no {path}"));
    *text = change(text);
}

/// Makes a folder equal to these files. Cargo compiles what has a newer modification time, so equal
/// files are not written.
fn write(tree: &Path, files: &BTreeMap<PathBuf, String>) {
    for (path, text) in files {
        let path = tree.join(path);
        if fs::read_to_string(&path).ok().as_ref() != Some(text) {
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, text).unwrap();
        }
    }
    remove_others(tree, tree, files);
}

/// Removes what earlier runs have left. The link to the target folder is kept.
fn remove_others(tree: &Path, folder: &Path, files: &BTreeMap<PathBuf, String>) {
    for entry in fs::read_dir(folder).unwrap() {
        let entry = entry.unwrap();
        let path = entry.path();
        let kind = entry.file_type().unwrap();
        if kind.is_dir() {
            remove_others(tree, &path, files);
        } else if kind.is_file() && !files.contains_key(path.strip_prefix(tree).unwrap()) {
            fs::remove_file(path).unwrap();
        }
    }
}
