//! A soak: clients register, change and erase users while random faults are injected, one after
//! another. Then the checker checks the run. The faults and the requests follow from the seed. The
//! scheduling does not, so a seed repeats the faults but not the interleaving.

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
/// The longest pause between a recovery and the next fault.
const PAUSE: Duration = Duration::from_secs(2);

/// The Kafka of a soak.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Cluster {
    OneBroker,
    /// Each partition has one replica, so the loss of a broker leaves partitions without a leader.
    ThreeBrokers,
}

/// The result of a soak.
pub struct Summary {
    seed: u64,
    lasted: Duration,
    accepted: usize,
    unanswered: usize,
    faults: BTreeMap<String, usize>,
    /// Copies of records and mails, in the topics and at the consumers.
    duplicates: u64,
    /// Rows, profiles and mails.
    effects: usize,
    /// Time from the end of each fault until a new registration had all its effects.
    recoveries: Vec<(Duration, Fault)>,
    pub violations: Vec<Violation>,
    /// The file with the whole history. The logs are next to it.
    evidence: String,
}

/// Runs a soak on its own components.
///
/// # Panics
/// The system cannot be started.
pub async fn run(lasting: Duration, seed: u64, cluster: Cluster) -> Summary {
    let mut system = match cluster {
        Cluster::OneBroker => System::empty_on_own_components().await,
        Cluster::ThreeBrokers => {
            let mut system = System::empty_on_three_brokers().await;
            system.processes.set("KAFKA_REPLICATION_FACTOR", "1");
            system
        }
    };
    // A sender may be killed while it sends a mail. Its lease must end before the run is checked.
    system.processes.set("LEASE_MS", "15000");
    system.seed = seed;
    system.processes.start_all().await;
    let judge = system.judge().await;
    let load = system.load(CLIENTS);
    let redelivered = Redelivered::watch(&system);
    let begin = Instant::now();
    let mut random = Rng::with_seed(seed);
    let mut faults = BTreeMap::new();
    let mut recoveries = vec![];
    let mut violations = vec![];
    while begin.elapsed() < lasting {
        tokio::time::sleep(PAUSE.mul_f64(random.f64())).await;
        let fault = Fault::any(&mut random, cluster);
        *faults.entry(name(fault)).or_insert(0) += 1;
        say(format_args!("{:>5.1} s  {fault}", begin.elapsed().as_secs_f64()));
        // A panic means that a wait reached its deadline, or that a client got an unexpected
        // answer.
        let recovery = async {
            fault.inject(&mut system).await;
            let healed = Instant::now();
            recovered(&mut system).await.then(|| healed.elapsed())
        };
        match AssertUnwindSafe(recovery).catch_unwind().await {
            Ok(Some(time)) => recoveries.push((time, fault)),
            _ => {
                let evidence = format!("no recovery from {fault} within {DEADLINE:?}");
                violations.push(Violation { invariant: "I12", evidence });
            }
        }
    }
    let answers = load.end().await;
    let lasted = begin.elapsed();
    let redelivered = redelivered.end().await;
    let (history, found) = judge.violations(&mut system, &answers).await;
    violations.extend(found);
    let evidence = system.processes.file("history.txt");
    std::fs::write(&evidence, format!("{history:#?}")).unwrap();
    Summary {
        seed,
        lasted,
        accepted: answers.accepted().len(),
        unanswered: answers.operations.iter().filter(|operation| operation.outcome == Outcome::Unknown).count(),
        faults,
        duplicates: redelivered + copied(&history),
        effects: effects(&history),
        recoveries,
        violations,
        evidence: evidence.display().to_string(),
    }
}

/// Waits until all services are ready and a new registration has all its effects. `false` if that
/// takes longer than [`DEADLINE`].
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
    let email = history.email.as_ref().unwrap();
    let analytics = history.analytics.as_ref().unwrap();
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
            let median = median.as_secs_f64();
            let worst = worst.as_secs_f64();
            writeln!(f, "recovery                  median {median:.1} s, worst {worst:.1} s after {fault}")?;
        }
        writeln!(f, "evidence                  {}", self.evidence)?;
        for violation in &self.violations {
            writeln!(f, "{violation}")?;
        }
        write!(f, "violations: {}", self.violations.len())
    }
}
