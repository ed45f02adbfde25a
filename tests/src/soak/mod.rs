//! A soak: clients register, change and erase while random faults strike, one after another; then the checker judges the run.
//! The faults and what the clients do follow from the seed. What the scheduler makes of them does not, so the same seed meets
//! the same faults, not the same interleaving.

mod counts;
mod faults;

use std::collections::BTreeMap;
use std::fmt;
use std::panic::AssertUnwindSafe;
use std::time::{Duration, Instant};

use fastrand::Rng;
use futures::FutureExt;
use sqlx::PgPool;
use testbed::say::say;
use topology::{ANALYTICS, SERVICES};

use crate::checker::{History, Outcome, Violation};
use crate::record::copies;
use crate::system::System;
use crate::waiting::{DEADLINE, eventually_eq};

use counts::Redelivered;
pub use faults::Fault;

const CLIENTS: u64 = 2;
/// How long the system is left in peace between a recovery and the next fault, at most.
const PEACE: Duration = Duration::from_secs(2);

/// What a soak found.
pub struct Summary {
    seed: u64,
    lasted: Duration,
    accepted: usize,
    unanswered: usize,
    faults: BTreeMap<String, usize>,
    /// Records and mails beyond the first copy, in the logs and at consumers.
    duplicates: u64,
    /// Rows, profiles and mails.
    effects: usize,
    /// From the end of each fault until a registration made then had reached everybody.
    recoveries: Vec<(Duration, Fault)>,
    pub violations: Vec<Violation>,
    /// Where the whole history and the logs are.
    evidence: String,
}

/// Runs a soak on components of its own.
///
/// # Panics
/// The system cannot be started, or a service does not come back.
pub async fn run(lasting: Duration, seed: u64) -> Summary {
    let mut system = System::empty_on_own_components().await;
    // A sender may die with a mail in hand: its lease must end before the run is judged.
    system.processes.set("LEASE_MS", "15000");
    system.seed = seed;
    system.processes.start_all().await;
    let judge = system.judge().await;
    let (load, redelivered) = (system.load(CLIENTS), Redelivered::watch(&system));
    let (begin, mut random) = (Instant::now(), Rng::with_seed(seed));
    let (mut faults, mut recoveries, mut violations) = (BTreeMap::new(), vec![], vec![]);
    while begin.elapsed() < lasting {
        tokio::time::sleep(PEACE.mul_f64(random.f64())).await;
        let fault = Fault::any(&mut random);
        *faults.entry(name(fault)).or_insert(0) += 1;
        say(format_args!("{:>5.1} s  {fault}", begin.elapsed().as_secs_f64()));
        // What panics in here waited in vain, for a process that does not come back or an answer that no client expects.
        let survived = async {
            fault.strike(&mut system).await;
            let healed = Instant::now();
            recovered(&mut system).await.then(|| healed.elapsed())
        };
        match AssertUnwindSafe(survived).catch_unwind().await {
            Ok(Some(time)) => recoveries.push((time, fault)),
            _ => {
                let evidence = format!("not recovered from {fault} within {DEADLINE:?}");
                violations.push(Violation { invariant: "I12", evidence });
            }
        }
    }
    let answered = load.end().await;
    let lasted = begin.elapsed();
    let redelivered = redelivered.end().await;
    let (history, found) = judge.violations(&mut system, &answered).await;
    violations.extend(found);
    let evidence = system.processes.file("history.txt");
    std::fs::write(&evidence, format!("{history:#?}")).unwrap();
    Summary {
        seed,
        lasted,
        accepted: answered.accepted().len(),
        unanswered: answered.operations.iter().filter(|operation| operation.outcome == Outcome::Unknown).count(),
        faults,
        duplicates: redelivered + copied(&history),
        effects: effects(&history),
        recoveries,
        violations,
        evidence: evidence.display().to_string(),
    }
}

/// Waits until all services are ready and somebody who registers now has reached everybody; `false`: not within [`DEADLINE`].
async fn recovered(system: &mut System) -> bool {
    let journey = async {
        system.processes.until_ready(&SERVICES).await;
        let user = system.users.register().await;
        system.users.until_cached(user, 1).await;
        system.users.until_mailed(user).await;
        let db: PgPool = system.stores.database(ANALYTICS).await;
        let counted =
            "select count(*) from funnel where user_id = $1 and registered_at is not null and mailed_at is not null";
        eventually_eq("the user is in the funnel", 1_i64, async || {
            sqlx::query_scalar(counted).bind(user).fetch_one(&db).await.unwrap()
        })
        .await;
    };
    tokio::time::timeout(DEADLINE, journey).await.is_ok()
}

fn name(fault: Fault) -> String {
    fault.to_string().chars().take_while(|c| c.is_alphanumeric()).collect()
}

fn copied(history: &History) -> u64 {
    let email = history.email.as_ref().unwrap();
    let records = copies(&history.facts) + copies(&history.states) + copies(&email.facts);
    let sent = email.deliveries.iter().filter(|delivery| delivery.states.last().is_some_and(|state| state == "sent"));
    (records + email.mails.len().saturating_sub(sent.count())) as u64
}

fn effects(history: &History) -> usize {
    let (email, analytics) = (history.email.as_ref().unwrap(), history.analytics.as_ref().unwrap());
    let facts: usize = analytics.inbox.values().map(|events| events.len()).sum();
    facts + email.mails.len() + email.recipients.len() + history.cache.as_ref().unwrap().len()
}

impl fmt::Display for Summary {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "\nseed                      {}, {} s", self.seed, self.lasted.as_secs())?;
        writeln!(f, "registrations accepted    {}", self.accepted)?;
        writeln!(f, "requests without answer   {}", self.unanswered)?;
        let kinds: Vec<String> = self.faults.iter().map(|(name, count)| format!("{name} {count}")).collect();
        writeln!(f, "faults injected           {} ({})", self.faults.values().sum::<usize>(), kinds.join(", "))?;
        writeln!(f, "duplicates delivered      {}", self.duplicates)?;
        writeln!(f, "effects                   {}", self.effects)?;
        let mut times = self.recoveries.clone();
        times.sort_by_key(|(time, _)| *time);
        if let (Some((median, _)), Some((worst, fault))) = (times.get(times.len() / 2), times.last()) {
            let (median, worst) = (median.as_secs_f64(), worst.as_secs_f64());
            writeln!(f, "recovery                  median {median:.1} s, worst {worst:.1} s after {fault}")?;
        }
        writeln!(f, "evidence                  {}", self.evidence)?;
        for violation in &self.violations {
            writeln!(f, "{violation}")?;
        }
        write!(f, "violations: {}", self.violations.len())
    }
}
