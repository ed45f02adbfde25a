//! `cargo xtask mistakes`: writes `docs/mistakes.md`, the known bugs as lessons, from the patches
//! in `tests/seeded`.

use std::fmt::Write;
use std::fs;
use std::process::ExitCode;

use anyhow::{Context, Result};
use testbed::paths;
use testbed::say::say;

use crate::patches::{Patch, patches};

const PAGE: &str = "docs/mistakes.md";

const HEAD: &str = "# Mistakes

Written by `cargo xtask mistakes` from the patches in [`tests/seeded`](../tests/seeded). Do not edit.

Each section shows code that looks right and is wrong, what happens with it, and the tests that notice. In a diff, the
lines with `-` are the code of Waybill, and the lines with `+` are the mistake. `cargo xtask seeded` applies each patch to
a copy of the code and reports which tests fail. In parentheses is what the mistake breaks: an
[invariant](guarantees.md#invariants) (I…), or what holds in a [fault](guarantees.md#faults) (T…).
";

pub fn run() -> Result<ExitCode> {
    let file = paths::root().join(PAGE);
    fs::write(&file, page()?).with_context(|| format!("cannot write {}", file.display()))?;
    say(format_args!("{PAGE} is written"));
    Ok(ExitCode::SUCCESS)
}

fn page() -> Result<String> {
    let mut page = HEAD.to_owned();
    let patches = patches(&[])?;
    for patch in &patches {
        writeln!(page, "\n- [{}](#{})", sentence(&patch.bug), patch.name)?;
    }
    let mut page = page.replace("\n\n- [", "\n- [").replacen("\n- [", "\n\n- [", 1);
    for patch in &patches {
        section(&mut page, patch)?;
    }
    Ok(page)
}

fn section(page: &mut String, patch: &Patch) -> Result<()> {
    let Patch { name, bug, lesson, promise, tests, diff, .. } = patch;
    writeln!(page, "\n## {name}\n\n{} ({promise}). {lesson}\n", sentence(bug))?;
    writeln!(page, "```diff\n{}\n```\n", without_file_names(diff).trim_end())?;
    writeln!(page, "Noticed by `cargo xtask test -- {}`. The code is in {}.", tests.join(" "), links(diff))?;
    Ok(())
}

/// The changed lines, and the names of their functions.
fn without_file_names(diff: &str) -> String {
    let lines = diff.lines().filter(|line| !line.starts_with("--- ") && !line.starts_with("+++ "));
    let lines = lines.map(|line| match line.rsplit_once("@@") {
        Some((_, function)) if line.starts_with("@@") => format!("@@{function}"),
        _ => line.to_owned(),
    });
    lines.collect::<Vec<_>>().join("\n")
}

/// Links to the changed files.
fn links(diff: &str) -> String {
    let files = diff.lines().filter_map(|line| line.strip_prefix("--- a/"));
    let links: Vec<String> = files.map(|file| format!("[`{file}`](../{file})")).collect();
    links.join(", ")
}

fn sentence(text: &str) -> String {
    let mut letters = text.chars();
    let first = letters.next().map(|first| first.to_uppercase().to_string()).unwrap_or_default();
    format!("{first}{}", letters.as_str())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_page_of_mistakes_is_written_from_the_current_patches() {
        let written = fs::read_to_string(paths::root().join(PAGE)).unwrap();
        assert!(written == page().unwrap(), "{PAGE} differs from tests/seeded: run `cargo xtask mistakes`");
    }
}
