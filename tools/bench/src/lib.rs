//! The benchmark. Each job measures a part of Waybill and, in the same run and in turn with it, the
//! limit: what a bare client reaches that does the same work on the same components. So the ratio
//! of the two can be compared between machines, which a rate cannot.
//!
//! The services are release programs on a real Kafka, Postgres, Redis and SMTP sink. After each job
//! everything that it wrote is read back and checked.

#![allow(
    clippy::disallowed_methods,
    reason = "the rules on clocks, ids and environment protect the services; a developer's tool reads all three"
)]

mod bed;
mod checks;
mod disk;
mod http;
mod jobs;
mod kafka;
mod meter;
mod report;
mod rows;
mod slices;
mod statements;
pub mod usage;

use std::path::{Path, PathBuf};

use anyhow::Result;

use bed::Bed;
pub use jobs::Job;
pub use report::{Bar, Machine, Report, Spread, bars};

/// How much is measured.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Size {
    /// For figures to be published.
    Full,
    /// One slice each, a tenth of the size.
    Quick,
    /// Just enough to check that every effect is exact. The times say nothing.
    Smoke,
}

impl Size {
    /// How many of the things that a job handles, if a full run handles `full`.
    fn of(self, full: u64) -> u64 {
        match self {
            Self::Full => full,
            Self::Quick => full / 10,
            Self::Smoke => full / 200,
        }
    }

    /// The number of slices of each side.
    fn slices(self) -> usize {
        match self {
            Self::Full => 5,
            Self::Quick | Self::Smoke => 1,
        }
    }
}

/// The programs that the benchmark starts.
#[derive(Clone, Copy, Debug)]
pub struct Programs<'a> {
    /// The folder with the services.
    pub services: &'a Path,
    /// The program of the benchmark itself, which also contains a limit.
    pub bench: &'a Path,
}

/// Runs these jobs one after another, and calls `done` with the report of each.
///
/// # Errors
/// A component does not start, or something that a job wrote is lost, doubled or out of order.
pub async fn run(
    jobs: &[Job],
    size: Size,
    programs: Programs<'_>,
    mut done: impl FnMut(&Report),
) -> Result<Vec<Report>> {
    let bed = Bed::start(programs, size).await?;
    let mut reports = vec![];
    for job in jobs {
        let report = jobs::run(*job, &bed).await?;
        done(&report);
        reports.push(report);
    }
    bed.stop().await;
    Ok(reports)
}

/// Runs the program that the job `read` is compared with, until it is killed.
///
/// # Errors
/// It cannot listen on the port.
pub async fn serve_profiles(port: u16, valkey: String, prefix: String) -> Result<()> {
    jobs::serve_profiles(port, valkey, prefix).await
}

/// Writes target/bench/results.json and, after a full run of all jobs, docs/performance.md.
///
/// # Errors
/// A file cannot be written.
pub fn write(machine: &Machine, size: Size, reports: &[Report], all: bool) -> Result<()> {
    report::write(machine, size, reports, all)
}

/// The folder of `results.json`.
pub fn results_folder() -> PathBuf {
    testbed::paths::root().join("target/bench")
}
