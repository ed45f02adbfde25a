//! `drain`: whether the relay is as fast with a large backlog as with a small one.

use anyhow::Result;

use super::relay::Relay;
use crate::bed::Bed;
use crate::report::{Bound, Figure, Report};

/// Rows of the two backlogs.
const SMALL: u64 = 100_000;
const LARGE: u64 = 1_000_000;
/// The rate with the large backlog, relative to the rate with the small one.
const GOAL: f64 = 0.9;

/// For readers of docs/performance.md.
const LIMITED_BY: &str = "\
What limits it: the same as the job `relay`. Deleted rows leave dead entries in the index until Postgres has vacuumed it. With
a backlog, a round's read begins after those of earlier rounds.";

pub async fn run(bed: &Bed) -> Result<Report> {
    let lab = bed.lab("drain").await?;
    let mut relay = Relay::start(&lab).await?;
    let mut rates = [vec![], vec![]];
    // In turn, and few of the large ones: each takes a minute.
    for _ in 0..bed.size().slices().min(2) {
        for (rows, rates) in [SMALL, LARGE].into_iter().zip(&mut rates) {
            rates.push(relay.publish(bed.size().of(rows)).await?.rate());
        }
    }
    relay.check().await?;
    let [small, large] = [("100,000", &rates[0]), ("1,000,000", &rates[1])]
        .map(|(rows, rates)| Figure::new(&format!("rate with {rows} rows waiting"), "rows/s", rates.iter().copied()));
    let ratio = large.spread.median / small.spread.median;
    let report = Report::of_figures("drain", "the relay publishes backlogs of two sizes", vec![small, large]);
    Ok(report
        .with_goal("rate with the large backlog, relative to the small one", ratio, "", Bound::AtLeast(GOAL))
        .limited_by(LIMITED_BY))
}
