//! docs/performance.md and its charts, from the results of a full run.

use std::fmt::Write;
use std::fs;
use std::path::PathBuf;

use anyhow::{Context, Result};
use testbed::paths::root;

use super::chart::{Bar, bars};
use super::outcome::{Bound, COLUMNS, Goal, Machine, Pairs, Report, medians};
use crate::meter::Slice;
use crate::usage::Cpu;

/// Everything that does not depend on the results.
const METHOD: &str = include_str!("method.md");
const RATIOS: &str = "ratios.svg";
const CPU: &str = "cpu.svg";

/// Writes the page and returns its path.
pub fn write(machine: &Machine, reports: &[Report]) -> Result<PathBuf> {
    let docs = root().join("docs");
    let charts = docs.join("performance");
    fs::create_dir_all(&charts)?;
    let files = [
        (docs.join("performance.md"), page(machine, reports)?),
        (charts.join(RATIOS), bars("Our rate divided by the limit's", "", &ratios(reports))),
        (charts.join(CPU), bars("CPU seconds per 100,000, of all programs together", " s", &cpu(reports))),
    ];
    for (path, text) in &files {
        fs::write(path, text).with_context(|| format!("cannot write {}", path.display()))?;
    }
    Ok(docs.join("performance.md"))
}

fn page(machine: &Machine, reports: &[Report]) -> Result<String> {
    let mut page = String::new();
    let (intro, method) = METHOD.split_once("<!-- results -->\n").context("method.md has no mark for the results")?;
    page.push_str(intro);
    writeln!(
        page,
        "Measured on {} cores ({}), load {:.2} before the run.\n",
        machine.cores, machine.processor, machine.load
    )?;
    writeln!(page, "| job | what | measured | goal | |\n|---|---|---|---|---|")?;
    for report in reports {
        for goal in &report.goals {
            let (value, bound) = texts(goal);
            let verdict = if goal.is_met() { "ok" } else { "short" };
            writeln!(page, "| [{0}](#{0}) | {1} | {value} | {bound} | {verdict} |", report.job, goal.what)?;
        }
    }
    writeln!(page, "\n![The ratio of each job, with its range and its goal](performance/{RATIOS})\n")?;
    writeln!(page, "![The CPU time of each job, ours and the limit](performance/{CPU})\n")?;
    page.push_str(method);
    for report in reports {
        section(&mut page, report)?;
    }
    Ok(page)
}

/// The value of a goal and its bound, with units.
fn texts(goal: &Goal) -> (String, String) {
    let unit = if goal.unit.is_empty() { String::new() } else { format!(" {}", goal.unit) };
    let bound = match goal.bound {
        Bound::AtLeast(bound) => format!("at least {bound}{unit}"),
        Bound::AtMost(bound) => format!("at most {bound}{unit}"),
    };
    (format!("{:.2}{unit}", goal.value), bound)
}

fn section(page: &mut String, report: &Report) -> Result<()> {
    writeln!(page, "\n### {}\n", report.job)?;
    let ours = &report.ours;
    match &report.slices {
        None => writeln!(page, "{}.\n", capitalised(ours))?,
        Some(Pairs { ours: our_slices, limit, ratio }) => {
            writeln!(page, "Ours: {ours}. Limit: {}. The unit is {}.\n", report.limit, report.unit)?;
            writeln!(page, "| | {} |\n|---|{}", COLUMNS.join(" | "), "---:|".repeat(COLUMNS.len()))?;
            writeln!(page, "| ours | {} |", medians(our_slices).join(" | "))?;
            writeln!(page, "| limit | {} |\n", medians(limit).join(" | "))?;
            writeln!(page, "Ratio: {:.2}, from {:.2} to {:.2}.\n", ratio.median, ratio.least, ratio.most)?;
        }
    }
    if !report.figures.is_empty() {
        for figure in &report.figures {
            writeln!(page, "- {figure}")?;
        }
        writeln!(page)?;
    }
    if let Some(disk) = &report.disk {
        writeln!(page, "fdatasync during the job: median {:.2} ms, p99 {:.2} ms.\n", disk.median, disk.p99)?;
    }
    writeln!(page, "{}", report.limited_by)?;
    Ok(())
}

fn capitalised(text: &str) -> String {
    let mut letters = text.chars();
    letters.next().map(|first| first.to_uppercase().chain(letters).collect()).unwrap_or_default()
}

fn ratios(reports: &[Report]) -> Vec<Bar> {
    let measured = reports.iter().filter_map(|report| Some((report, report.slices.as_ref()?)));
    let bars = measured.map(|(report, pairs)| {
        let goal = report.goals.iter().find_map(|goal| match goal.bound {
            Bound::AtLeast(bound) if goal.what == "ratio" => Some(bound),
            _ => None,
        });
        let range = Some((pairs.ratio.least, pairs.ratio.most));
        Bar { name: report.job.clone(), value: pairs.ratio.median, range, goal }
    });
    bars.collect()
}

fn cpu(reports: &[Report]) -> Vec<Bar> {
    let total = |slices: &[Slice]| {
        let Cpu { service, postgres, kafka, redis, load, others: _ } =
            slices.iter().fold(Cpu::default(), |sum, slice| sum.plus(slice.cpu));
        let amount: u64 = slices.iter().map(|slice| slice.amount).sum();
        (service + postgres + kafka + redis + load) * 100_000.0 / amount as f64
    };
    let measured = reports.iter().filter_map(|report| Some((report, report.slices.as_ref()?)));
    let bars = measured.flat_map(|(report, pairs)| {
        [("", &pairs.ours), (", limit", &pairs.limit)].map(|(side, slices)| Bar {
            name: format!("{}{side}", report.job),
            value: total(slices),
            range: None,
            goal: None,
        })
    });
    bars.collect()
}
