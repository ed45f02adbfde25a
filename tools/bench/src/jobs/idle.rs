//! `idle`: how long the services take to start, and what they need while nothing happens.

use std::time::{Duration, Instant};

use anyhow::Result;
use futures::future::try_join_all;
use testbed::services::{RunningService, SERVICES};
use tokio::time::sleep;

use crate::Size;
use crate::bed::Bed;
use crate::report::{Bound, Figure, Report};
use crate::usage::{Snapshot, allocated_memory, resident_memory};

/// Until the services have finished what follows their start.
const SETTLE: Duration = Duration::from_secs(10);
/// How long the CPU time is measured. The loops of the services repeat within two seconds.
const WINDOW: Duration = Duration::from_secs(30);
/// MB of each service.
const MEMORY_GOAL: f64 = 20.0;

/// For readers of docs/performance.md.
const LIMITED_BY: &str = "\
What limits it: two thirds of the memory of an idle service are pages of its program and of libraries. All replicas on a machine
share these pages, and the kernel may drop them, so a further replica needs only the memory \"without its program\". A service
has 25 MB of machine code, which includes OpenSSL, librdkafka and the export of traces. In an idle `email`, 11 MB of it were
resident, and 5 MB of constants.";

pub async fn run(bed: &Bed) -> Result<Report> {
    let lab = bed.lab("idle").await?;
    let start = Instant::now();
    let services = SERVICES.iter().map(|service| lab.spawn(*service, &[])).collect::<Result<Vec<RunningService>>>()?;
    let ready = try_join_all(services.into_iter().map(async |mut service| {
        service.until_ready().await?;
        anyhow::Ok((service, start.elapsed().as_secs_f64()))
    }))
    .await?;
    let (settle, window) = if bed.size() == Size::Full { (SETTLE, WINDOW) } else { (SETTLE / 5, WINDOW / 10) };
    sleep(settle).await;
    let before = Snapshot::take()?;
    sleep(window).await;
    let after = Snapshot::take()?;
    let mut figures = vec![];
    let mut most = 0.0_f64;
    for (service, seconds) in &ready {
        let name = service.instance.service.name;
        let pid = service.process.pid();
        let memory = resident_memory(pid)?;
        most = most.max(memory);
        let share = (after.of_tree(pid) - before.of_tree(pid)) / window.as_secs_f64() * 100.0;
        figures.push(Figure::new(&format!("{name}: start to ready, all four at once"), "s", [*seconds]));
        figures.push(Figure::new(&format!("{name}: memory"), "MB", [memory]));
        figures.push(Figure::new(&format!("{name}: memory, without its program"), "MB", [allocated_memory(pid)?]));
        figures.push(Figure::new(&format!("{name}: CPU"), "% of a core", [share]));
    }
    for (mut service, _) in ready {
        service.stop().await;
    }
    let report = Report::of_figures("idle", "all services, and nothing happens", figures);
    Ok(report.with_goal("most memory of a service", most, "MB", Bound::AtMost(MEMORY_GOAL)).limited_by(LIMITED_BY))
}
