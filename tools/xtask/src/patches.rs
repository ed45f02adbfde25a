//! The known bugs in `tests/seeded`: each is a patch with four lines at its head.
//!
//! ```text
//! Bug: the inbox is not consulted, so a repeated event is applied twice
//! Lesson: Why the code looks right, and what happens with it.
//! Promise: I7
//! Tests: --test end_to_end -- relay::
//!
//! --- a/shared/src/messaging/inbox.rs
//! ```

use std::fs;
use std::path::PathBuf;

use anyhow::{Context, Result, ensure};
use testbed::paths;

pub struct Patch {
    pub name: String,
    pub file: PathBuf,
    pub bug: String,
    pub lesson: String,
    /// The invariants of `docs/guarantees.md` that it breaks, for example `I7`.
    pub promise: String,
    /// Arguments for `cargo test`.
    pub tests: Vec<String>,
    /// The change, as a unified diff.
    pub diff: String,
}

/// The patches of these names, or all if none is given, in the order of their names.
pub fn patches(names: &[String]) -> Result<Vec<Patch>> {
    let folder = paths::root().join("tests/seeded");
    let mut patches = vec![];
    for entry in fs::read_dir(&folder)? {
        let file = entry?.path();
        let name = file.file_stem().unwrap_or_default().to_string_lossy().into_owned();
        let is_patch = file.extension().is_some_and(|extension| extension == "patch");
        if is_patch && (names.is_empty() || names.contains(&name)) {
            patches.push(read(name, file)?);
        }
    }
    patches.sort_by(|one, other| one.name.cmp(&other.name));
    for name in names {
        ensure!(patches.iter().any(|patch| patch.name == *name), "tests/seeded/{name}.patch does not exist");
    }
    Ok(patches)
}

fn read(name: String, file: PathBuf) -> Result<Patch> {
    let text = fs::read_to_string(&file)?;
    let (head, diff) = text.split_once("\n---").with_context(|| format!("{} has no diff", file.display()))?;
    let field = |field: &str| {
        let line = head.lines().find_map(|line| line.strip_prefix(field)?.strip_prefix(": "));
        line.map(str::to_owned).with_context(|| format!("{} has no line `{field}: …`", file.display()))
    };
    let tests = field("Tests")?.split(' ').map(str::to_owned).collect();
    Ok(Patch {
        bug: field("Bug")?,
        lesson: field("Lesson")?,
        promise: field("Promise")?,
        tests,
        diff: format!("---{diff}"),
        name,
        file,
    })
}
