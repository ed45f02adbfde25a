//! What a full run showed, as a page: for each fault and invariant of `docs/guarantees.md` the tests that claim it in their
//! doc comments (`T04, I3: …`), and how each ended.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write;
use std::fs;
use std::path::Path;

use anyhow::{Context, Result};
use testbed::paths;

/// By id, such as `T04`: the names of the tests, without their modules.
type Claims = BTreeMap<String, BTreeSet<String>>;

/// Writes `docs/last-run.md`. `printed` is what the test runners said, `soak` the summary of a soak.
pub fn write(printed: &str, soak: &str) -> Result<()> {
    let results = results(printed);
    let guarantees = fs::read_to_string(paths::root().join("docs/guarantees.md"))?;
    let claims = claims()?;
    let mut page = String::from("# The last full run\n\nWritten by `cargo xtask test --full`, not by hand.\n");
    let cores = std::thread::available_parallelism().map_or(0, usize::from);
    let passed = results.values().filter(|ended| **ended == "ok").count();
    writeln!(page, "\n{} tests, {passed} passed, on {cores} cores.\n", results.len())?;
    writeln!(page, "| | tests | |\n|---|---|---|")?;
    for id in ids(&guarantees) {
        let tests = claims.get(&id).into_iter().flatten();
        let (names, ends): (Vec<_>, BTreeSet<_>) =
            tests.map(|test| (format!("`{test}`"), *results.get(test).unwrap_or(&"did not run"))).unzip();
        let ends: Vec<&str> = ends.into_iter().collect();
        writeln!(page, "| {id} | {} | {} |", names.join("<br>"), ends.join(", "))?;
    }
    writeln!(page, "\nA soak in the same run:\n\n```text\n{}\n```", without_places(soak))?;
    let file = paths::root().join("docs/last-run.md");
    fs::write(&file, page).with_context(|| format!("cannot write {}", file.display()))
}

/// The first cells of the rows of the page's tables: `| T04 | …`.
fn ids(guarantees: &str) -> Vec<String> {
    let rows = guarantees.lines().filter_map(|line| line.strip_prefix("| ")?.split(' ').next());
    rows.filter(|cell| is_id(cell)).map(str::to_owned).collect()
}

fn is_id(text: &str) -> bool {
    let number = text.strip_prefix(['T', 'I']).unwrap_or_default();
    !number.is_empty() && number.len() <= 2 && number.bytes().all(|byte| byte.is_ascii_digit())
}

/// From `test module::name ... ok`. What a test prints itself may stand before the end of its line.
fn results(printed: &str) -> BTreeMap<String, &str> {
    let mut results = BTreeMap::new();
    for line in printed.lines() {
        let Some((name, end)) = line.strip_prefix("test ").and_then(|line| line.split_once(" ... ")) else { continue };
        let name = name.rsplit("::").next().unwrap_or(name);
        results.insert(name.to_owned(), end);
    }
    results
}

fn claims() -> Result<Claims> {
    let mut claims = Claims::new();
    for folder in ["tests", "shared", "services"] {
        read_folder(&paths::root().join(folder), &mut claims)?;
    }
    Ok(claims)
}

fn read_folder(folder: &Path, claims: &mut Claims) -> Result<()> {
    for entry in fs::read_dir(folder)? {
        let path = entry?.path();
        if path.is_dir() {
            read_folder(&path, claims)?;
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            read_file(&fs::read_to_string(&path)?, claims);
        }
    }
    Ok(())
}

/// A test is a function with an attribute that ends in `test`; the comment stands above that.
fn read_file(text: &str, claims: &mut Claims) {
    let (mut comment, mut is_test) = (String::new(), false);
    for line in text.lines().map(str::trim) {
        if let Some(doc) = line.strip_prefix("///").or_else(|| line.strip_prefix("//!")) {
            comment.push_str(doc);
        } else if line.starts_with("#[") {
            is_test |= line.starts_with("#[test]") || line.starts_with("#[tokio::test");
        } else {
            let name = line.trim_start_matches("async ").strip_prefix("fn ").and_then(|rest| rest.split('(').next());
            if let (Some(name), true) = (name, is_test) {
                for id in comment.split(|c: char| !c.is_ascii_alphanumeric()).filter(|word| is_id(word)) {
                    claims.entry(id.to_owned()).or_default().insert(name.to_owned());
                }
            }
            (comment, is_test) = (String::new(), false);
        }
    }
}

/// The page belongs to the tree, and holds no path of a machine.
fn without_places(soak: &str) -> String {
    let lines = soak.lines().filter(|line| !line.starts_with("evidence"));
    lines.collect::<Vec<_>>().join("\n").trim().to_owned()
}
