//! Writes the results of a full run as a page. For each fault and invariant of `docs/guarantees.md`
//! the page lists the tests that name it in their doc comment (`T04, I3: …`), and their results.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write;
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use testbed::paths;

/// For each id, such as `T04`, the names of the tests that name it, without their modules.
type TestsById = BTreeMap<String, BTreeSet<String>>;

/// Writes `docs/last-run.md` and returns its path. `output` is what the test runners printed,
/// `soak` the summary of the soak.
pub fn write(output: &str, soak: &str) -> Result<PathBuf> {
    let results = results(output);
    let guarantees = fs::read_to_string(paths::root().join("docs/guarantees.md"))?;
    let tests_by_id = tests_by_id()?;
    let mut page = String::from("# The last full run\n\nWritten by `cargo xtask test --full`. Do not edit.\n");
    let cores = std::thread::available_parallelism().map_or(0, usize::from);
    let passed = results.values().filter(|result| **result == "ok").count();
    writeln!(page, "\n{} tests, {passed} passed, on {cores} cores.\n", results.len())?;
    writeln!(page, "| id | tests | result |\n|---|---|---|")?;
    for id in ids(&guarantees) {
        let tests = tests_by_id.get(&id).into_iter().flatten();
        let (names, results): (Vec<_>, BTreeSet<_>) =
            tests.map(|test| (format!("`{test}`"), *results.get(test).unwrap_or(&"did not run"))).unzip();
        let results: Vec<&str> = results.into_iter().collect();
        writeln!(page, "| {id} | {} | {} |", names.join("<br>"), results.join(", "))?;
    }
    writeln!(page, "\nThe soak of the same run:\n\n```text\n{}\n```", without_paths(soak))?;
    let file = paths::root().join("docs/last-run.md");
    fs::write(&file, page).with_context(|| format!("cannot write {}", file.display()))?;
    Ok(file)
}

/// The ids in the first cells of the tables on the page `guarantees`: `| T04 | …`.
fn ids(guarantees: &str) -> Vec<String> {
    let rows = guarantees.lines().filter_map(|line| line.strip_prefix("| ")?.split(' ').next());
    rows.filter(|cell| is_id(cell)).map(str::to_owned).collect()
}

fn is_id(text: &str) -> bool {
    let number = text.strip_prefix(['T', 'I']).unwrap_or_default();
    !number.is_empty() && number.len() <= 2 && number.bytes().all(|byte| byte.is_ascii_digit())
}

/// The result of each test, from lines such as `test module::name ... ok`. The result is the end of
/// the line, because the test's own output may precede it.
fn results(output: &str) -> BTreeMap<String, &str> {
    let mut results = BTreeMap::new();
    for line in output.lines() {
        if let Some((name, result)) = line.strip_prefix("test ").and_then(|line| line.split_once(" ... ")) {
            let name = name.rsplit("::").next().unwrap_or(name);
            results.insert(name.to_owned(), result);
        }
    }
    results
}

fn tests_by_id() -> Result<TestsById> {
    let mut tests = TestsById::new();
    for folder in ["tests", "shared", "services"] {
        read_folder(&paths::root().join(folder), &mut tests)?;
    }
    Ok(tests)
}

fn read_folder(folder: &Path, tests: &mut TestsById) -> Result<()> {
    for entry in fs::read_dir(folder)? {
        let path = entry?.path();
        if path.is_dir() {
            read_folder(&path, tests)?;
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            read_file(&fs::read_to_string(&path)?, tests);
        }
    }
    Ok(())
}

/// Finds the test functions of a file, by their attribute, and the ids in the doc comments above
/// them.
fn read_file(text: &str, tests: &mut TestsById) {
    let mut comment = String::new();
    let mut is_test = false;
    for line in text.lines().map(str::trim) {
        if let Some(doc) = line.strip_prefix("///").or_else(|| line.strip_prefix("//!")) {
            comment.push_str(doc);
        } else if line.starts_with("#[") {
            is_test |= line.starts_with("#[test]") || line.starts_with("#[tokio::test");
        } else {
            let name = line.trim_start_matches("async ").strip_prefix("fn ").and_then(|rest| rest.split('(').next());
            if let (Some(name), true) = (name, is_test) {
                for id in comment.split(|c: char| !c.is_ascii_alphanumeric()).filter(|word| is_id(word)) {
                    tests.entry(id.to_owned()).or_default().insert(name.to_owned());
                }
            }
            comment.clear();
            is_test = false;
        }
    }
}

/// Removes the line with the path of the evidence: the page is committed, and paths differ by
/// machine.
fn without_paths(soak: &str) -> String {
    let lines = soak.lines().filter(|line| !line.starts_with("evidence"));
    lines.collect::<Vec<_>>().join("\n").trim().to_owned()
}
