//! The jobs. Each has a file, which says what both sides do.

mod console;
mod consume;
mod drain;
mod idle;
mod intents;
mod latency;
mod read;
mod register;
mod relay;
mod send;
mod view;

use anyhow::Result;
use clap::ValueEnum;

use crate::bed::Bed;
use crate::report::Report;

pub use read::serve_profiles;

/// What can be measured.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Job {
    /// The relay publishes a backlog of the outbox.
    Relay,
    /// When a consumer has the event of a request, on an idle system.
    Latency,
    /// The analytics service handles a backlog of events.
    Consume,
    /// The user service answers to registrations.
    Register,
    /// The email service stores what it has to send.
    Intents,
    /// The cache takes over states.
    View,
    /// The email service sends mails.
    Send,
    /// The cache answers to reads.
    Read,
    /// The relay publishes backlogs of two sizes.
    Drain,
    /// What the services need while nothing happens.
    Idle,
    /// What the console needs, and what it costs the services.
    Console,
}

impl Job {
    pub const ALL: [Self; 11] = [
        Self::Relay,
        Self::Latency,
        Self::Consume,
        Self::Register,
        Self::Intents,
        Self::View,
        Self::Send,
        Self::Read,
        Self::Drain,
        Self::Idle,
        Self::Console,
    ];
}

pub async fn run(job: Job, bed: &Bed) -> Result<Report> {
    bed.disk.take();
    let report = match job {
        Job::Relay => relay::run(bed).await?,
        Job::Latency => latency::run(bed).await?,
        Job::Consume => consume::run(bed).await?,
        Job::Register => register::run(bed).await?,
        Job::Intents => intents::run(bed).await?,
        Job::View => view::run(bed).await?,
        Job::Send => send::run(bed).await?,
        Job::Read => read::run(bed).await?,
        Job::Drain => drain::run(bed).await?,
        Job::Idle => idle::run(bed).await?,
        Job::Console => console::run(bed).await?,
    };
    Ok(report.with_disk(&bed.disk.take()))
}
