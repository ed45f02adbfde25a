//! The comparison of Waybill with its synchronous version (`tests/synchronous`). Both sides get the
//! same load and the same faults, on the same components, one after another.
//!
//! Reading order: `subject` (one side, running), `load` (the clients), `tally` (what their requests
//! have left), `runs` (the scenarios and their faults), `added` (the fourth receiver), `outcome`
//! (what is measured), `claims` (what the page says), `page`.

#![allow(
    clippy::disallowed_methods,
    clippy::unwrap_used,
    reason = "a developer's tool on top of the harness of the tests, in which a panic ends the run"
)]

mod added;
mod capacity;
mod claims;
mod lines;
mod load;
mod outcome;
mod page;
mod plan;
mod results;
mod runs;
mod scenario;
mod subject;
mod table;
mod tally;

use std::path::PathBuf;

use anyhow::{Context, Result};
use bench::Machine;
use testbed::paths::root;
use testbed::say::say;

pub use claims::{Claim, claims};
pub use outcome::Outcome;
pub use plan::{Plan, Size};
pub use results::Results;
pub use scenario::Scenario;
pub use subject::Side;

/// Runs the plan, and prints one table for each scenario.
///
/// # Errors
/// The machine does not run Linux.
///
/// # Panics
/// A side does not start.
pub async fn run(plan: Plan) -> Result<Results> {
    let machine = Machine::look()?;
    let capacity = capacity::measure(&plan).await?;
    let slowest = capacity.iter().map(|(_, rate)| *rate).fold(f64::INFINITY, f64::min);
    let slowest = plan.slowest.unwrap_or(slowest);
    let mut outcomes = vec![];
    let mut violations = vec![];
    for side in &plan.sides {
        outcomes.extend(runs::measure(*side, &plan, slowest).await?);
    }
    for (found, violated) in faults(&plan, slowest).await? {
        outcomes.extend(found);
        violations.extend(violated);
    }
    let mut added = vec![];
    for side in plan.sides.iter().filter(|side| [Side::Resilient, Side::Waybill].contains(side)) {
        added.extend(added::measure(*side, &plan, slowest).await?);
    }
    let lines = [lines::of_waybill(), lines::of_synchronous()];
    let results = Results { machine, plan, capacity, outcomes, added, violations, lines };
    table::print(&results);
    Ok(results)
}

/// The faults of the sides, one side after another, or at the same time if the plan says so.
async fn faults(plan: &Plan, slowest: f64) -> Result<Vec<(Vec<Outcome>, Vec<String>)>> {
    let runs = plan.sides.iter().map(|side| runs::faults(*side, plan, slowest));
    if plan.side_by_side {
        return futures::future::try_join_all(runs).await;
    }
    let mut results = vec![];
    for run in runs {
        results.push(run.await?);
    }
    Ok(results)
}

/// Writes target/compare/results.json. After a full run also writes docs/compared.md, unless a
/// claim of the page does not hold.
///
/// # Errors
/// A file cannot be written, or a claim does not hold.
pub fn write(results: &Results) -> Result<()> {
    let folder = results_folder();
    std::fs::create_dir_all(&folder)?;
    let path = folder.join("results.json");
    std::fs::write(&path, serde_json::to_vec_pretty(results)?)
        .with_context(|| format!("cannot write {}", path.display()))?;
    say(format_args!("\nWrote {}", path.display()));
    publish(results)
}

/// Writes docs/compared.md again from target/compare/results.json, after a change of its text.
///
/// # Errors
/// There are no results of a full run of this version, or a claim does not hold.
pub fn write_page_again() -> Result<()> {
    let path = results_folder().join("results.json");
    let missing = || format!("{}: run `cargo xtask compare` first", path.display());
    let results: Results =
        serde_json::from_slice(&std::fs::read(&path).with_context(missing)?).with_context(missing)?;
    anyhow::ensure!(results.plan.size == Size::Full, "{} is not of a full run", path.display());
    publish(&results)
}

/// Writes the page if the run was a full one and all claims hold.
fn publish(results: &Results) -> Result<()> {
    let broken: Vec<&str> =
        claims().iter().filter(|claim| (claim.holds)(results) == Some(false)).map(|claim| claim.text).collect();
    anyhow::ensure!(broken.is_empty(), "the page claims what this run does not show:\n{}", broken.join("\n"));
    if results.plan.size == Size::Full {
        say(format_args!("Wrote {}", page::write(results)?.display()));
    }
    Ok(())
}

fn results_folder() -> PathBuf {
    root().join("target/compare")
}
