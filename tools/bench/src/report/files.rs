//! The files that hold the results.

use std::fs;

use anyhow::{Context, Result};
use serde::Serialize;
use testbed::say::say;

use super::outcome::{Machine, Report};
use super::page;
use crate::{Size, results_folder};

#[derive(Serialize)]
struct Results<'a> {
    machine: &'a Machine,
    quick: bool,
    reports: &'a [Report],
}

/// Writes results.json, and docs/performance.md after a full run of all jobs.
pub fn write(machine: &Machine, size: Size, reports: &[Report], all: bool) -> Result<()> {
    let folder = results_folder();
    fs::create_dir_all(&folder)?;
    let path = folder.join("results.json");
    let results = Results { machine, quick: size != Size::Full, reports };
    fs::write(&path, serde_json::to_vec_pretty(&results)?)
        .with_context(|| format!("cannot write {}", path.display()))?;
    say(format_args!("\nWrote {}", path.display()));
    if size == Size::Full && all {
        say(format_args!("Wrote {}", page::write(machine, reports)?.display()));
    }
    Ok(())
}
