//! What a side can take: registrations per second until all their effects exist.

use std::time::Instant;

use anyhow::Result;
use testbed::say::say;

use crate::load::saturate;
use crate::plan::Plan;
use crate::scenario::Scenario;
use crate::subject::{Side, Subject};
use crate::tally::until_all_have_effects;

/// As many clients as there are requests in progress on a busy server.
const CLIENTS: usize = 32;

/// The capacity of each side. Nothing if the plan already says what the slower side can take.
pub async fn measure(plan: &Plan) -> Result<Vec<(Side, f64)>> {
    let mut rates = vec![];
    if plan.slowest.is_some() {
        return Ok(rates);
    }
    for side in plan.sides.iter().filter(|side| Scenario::Heavy.is_for(**side)) {
        let subject = Subject::start(*side, false).await;
        let target = subject.target();
        // The first requests open connections.
        saturate(&target, CLIENTS, plan.capacity / 4).await;
        until_all_have_effects(&subject, plan.quiet).await;
        let begin = Instant::now();
        let answered = saturate(&target, CLIENTS, plan.capacity).await;
        until_all_have_effects(&subject, plan.quiet).await;
        let rate = answered as f64 / begin.elapsed().as_secs_f64();
        say(format_args!("{:<11} takes {rate:>6.0} registrations per second with all their effects", side.name()));
        rates.push((*side, rate));
    }
    Ok(rates)
}
