//! The jobs. Each has a file, which says what both sides do.

mod consume;
mod drain;
mod relay;

use anyhow::Result;
use clap::ValueEnum;

use crate::bed::Bed;
use crate::report::Report;

/// What can be measured.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Job {
    /// The relay publishes a backlog of the outbox.
    Relay,
    /// The analytics service handles a backlog of events.
    Consume,
    /// Backlogs of two sizes.
    Drain,
}

impl Job {
    pub const ALL: [Self; 3] = [Self::Relay, Self::Consume, Self::Drain];
}

pub async fn run(job: Job, bed: &Bed) -> Result<Report> {
    bed.disk.take();
    let report = match job {
        Job::Relay => relay::run(bed).await?,
        Job::Consume => consume::run(bed).await?,
        Job::Drain => drain::run(bed).await?,
    };
    Ok(report.with_disk(&bed.disk.take()))
}

pub async fn serve_profiles(_port: u16, _valkey: String, _prefix: String) -> Result<()> {
    Ok(())
}
