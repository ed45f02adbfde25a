//! Runs the scenarios: the load and the fault of each.

use anyhow::{Context, Result};
use bench::usage::{Snapshot, resident_memory};
use nix::sys::signal::{self, Signal};
use nix::unistd::Pid;
use testbed::say::say;
use testbed::smtp_sink::{Fault, Stage};
use tests::load::Answers;
use tokio::time::{Instant, sleep, sleep_until};

use crate::load::{self, Registration};
use crate::outcome::{Components, Cost, During, Facts, Outcome};
use crate::plan::{BURST, HEAVY, LIGHT, Plan, SLOW_MS, USUAL_MS};
use crate::scenario::Scenario;
use crate::subject::{Side, Subject};
use crate::tally::{settle, until_all_have_effects};

/// The scenarios without a fault, on one start of a side. Nothing is in front of the components.
pub async fn measure(side: Side, plan: &Plan, slowest: f64) -> Result<Vec<Outcome>> {
    let mut outcomes = vec![];
    let measured = Scenario::MEASURED.into_iter().filter(|scenario| plan.has(*scenario) && scenario.is_for(side));
    let measured: Vec<Scenario> = measured.collect();
    if measured.is_empty() {
        return Ok(outcomes);
    }
    let mut subject = Subject::start(side, false).await;
    for scenario in measured {
        announce(scenario, side, plan);
        let parts = match scenario {
            Scenario::Heavy => vec![(HEAVY * slowest, plan.healthy)],
            Scenario::Burst => {
                let light = LIGHT * slowest;
                vec![(light, plan.before), (BURST * light, plan.burst()), (light, plan.after)]
            }
            _ => vec![(LIGHT * slowest, plan.healthy)],
        };
        let pids = subject.pids();
        let retried = subject.retried().await;
        let before = Usage::take(&pids)?;
        let requests = load::start(subject.target(), &parts, plan.repeat);
        let mut facts = Facts::default();
        if scenario == Scenario::Burst {
            facts.fault = Some(burst(plan).await);
        }
        let requests = requests.await?;
        let ended = Instant::now();
        until_all_have_effects(&subject, plan.quiet).await;
        // Before every profile is read once.
        facts.cost = Some(Usage::take(&pids)?.cost_since(&before, &pids, requests.len())?);
        facts.retried = subject.retried().await - retried;
        let (tally, settled) = settle(&subject, &requests, plan.quiet).await;
        facts.settled = settled.map(|_| ended.elapsed());
        outcomes.push(Outcome::of(scenario, side, &requests, &tally, &facts));
    }
    Ok(outcomes)
}

/// Waits until the burst is over.
async fn burst(plan: &Plan) -> During {
    sleep(plan.before + plan.burst()).await;
    let begin = plan.before.as_secs_f64();
    During { begin, end: begin + plan.burst().as_secs_f64(), ended_at: load::now() }
}

/// The scenarios with a fault, on one start of a side, and the violations that the checker of the
/// fault tests finds afterwards.
pub async fn faults(side: Side, plan: &Plan, slowest: f64) -> Result<(Vec<Outcome>, Vec<String>)> {
    let mut subject = Subject::start(side, true).await;
    let mut outcomes = vec![];
    let mut answers = Answers::default();
    let faults = Scenario::ALL.into_iter().filter(|scenario| !Scenario::MEASURED.contains(scenario));
    for scenario in faults.filter(|scenario| plan.has(*scenario) && scenario.is_for(side)) {
        announce(scenario, side, plan);
        let retried = subject.retried().await;
        let (requests, mut facts) = fault(scenario, &mut subject, plan, plan.fault_rate(slowest)).await?;
        // Producers and consumers connect again first. Until then no effect is added.
        let quiet = if scenario == Scenario::KafkaDown { 4 * plan.quiet } else { plan.quiet };
        let (tally, _) = settle(&subject, &requests, quiet).await;
        // A process that was killed has forgotten its own.
        facts.retried = (subject.retried().await - retried).max(0.0);
        outcomes.push(Outcome::of(scenario, side, &requests, &tally, &facts));
        answers.operations.extend(requests.into_iter().flat_map(|request| request.operations));
    }
    Ok((outcomes, subject.violations(&answers).await?))
}

/// Runs the load of a scenario, with its fault in the middle.
async fn fault(
    scenario: Scenario,
    subject: &mut Subject,
    plan: &Plan,
    rate: f64,
) -> Result<(Vec<Registration>, Facts)> {
    let lasting = match scenario {
        Scenario::SlowMail => plan.healthy,
        Scenario::Killed => plan.between_kills * plan.kills,
        _ => plan.fault,
    };
    let requests = load::start(subject.target(), &[(rate, plan.before + lasting + plan.after)], plan.repeat);
    let start = Instant::now();
    sleep_until(start + plan.before).await;
    let end = start + plan.before + lasting;
    match scenario {
        Scenario::SlowMail => {
            subject.mail().fail(Fault::Slow { ms: SLOW_MS, stage: Stage::Rcpt });
            sleep_until(end).await;
        }
        Scenario::MailDown => {
            subject.mail().fail(Fault::Reject { stage: Stage::Mail, code: 421 });
            sleep_until(end).await;
        }
        Scenario::AnalyticsDown | Scenario::StoreDown => {
            let proxies = subject.proxies.as_ref().expect("the side was started breakable");
            let proxy = if scenario == Scenario::StoreDown { &proxies.store } else { &proxies.analytics };
            proxy.cut();
            sleep_until(end).await;
            proxy.heal();
        }
        Scenario::KafkaDown => {
            let [_, kafka, _] = component_pids().context("only `cargo xtask compare` can stop Kafka")?;
            let kafka = Frozen::new(kafka)?;
            sleep_until(end).await;
            drop(kafka);
        }
        _ => kill(subject, plan, start + plan.before).await,
    }
    subject.mail().recover();
    let fault = During { begin: plan.before.as_secs_f64(), end: start.elapsed().as_secs_f64(), ended_at: load::now() };
    let requests = requests.await?;
    Ok((requests, Facts { fault: Some(fault), ..Facts::default() }))
}

/// Kills the registering process at even intervals, and starts it again at once.
async fn kill(subject: &mut Subject, plan: &Plan, begin: Instant) {
    subject.mail().fail(Fault::Slow { ms: USUAL_MS, stage: Stage::Rcpt });
    for number in 1..=plan.kills {
        sleep_until(begin + plan.between_kills * number - plan.between_kills / 2).await;
        subject.kill_registering();
        subject.start_registering().await;
    }
    sleep(plan.between_kills / 2).await;
}

/// A process that is stopped until this is dropped: it keeps its connections and answers nothing.
struct Frozen(Pid);

impl Frozen {
    fn new(pid: u32) -> Result<Self> {
        let pid = Pid::from_raw(pid.try_into()?);
        signal::kill(pid, Signal::SIGSTOP)?;
        Ok(Self(pid))
    }
}

impl Drop for Frozen {
    fn drop(&mut self) {
        let _ = signal::kill(self.0, Signal::SIGCONT);
    }
}

fn announce(scenario: Scenario, side: Side, plan: &Plan) {
    say(format_args!("{:<11} {} …", side.name(), plan.title(scenario)));
}

/// CPU times at one moment.
struct Usage {
    services: f64,
    /// Of Postgres, Kafka and Redis.
    components: Option<[f64; 3]>,
}

impl Usage {
    fn take(pids: &[u32]) -> Result<Self> {
        let snapshot = Snapshot::take()?;
        let services = pids.iter().map(|pid| snapshot.of_tree(*pid)).sum();
        Ok(Self { services, components: component_pids().map(|pids| pids.map(|pid| snapshot.of_tree(pid))) })
    }

    fn cost_since(&self, before: &Self, pids: &[u32], registrations: usize) -> Result<Cost> {
        let per_registration = |seconds: f64| seconds * 1000.0 / registrations.max(1) as f64;
        let memory = pids.iter().map(|pid| resident_memory(*pid)).collect::<Result<Vec<f64>>>()?;
        let mut components = None;
        if let (Some(now), Some(before), Some([_, kafka, _])) = (self.components, before.components, component_pids()) {
            components = Some(Components {
                postgres: per_registration(now[0] - before[0]),
                kafka: per_registration(now[1] - before[1]),
                redis: per_registration(now[2] - before[2]),
                kafka_memory: resident_memory(kafka)?,
            });
        }
        Ok(Cost {
            services: per_registration(self.services - before.services),
            components,
            memory: memory.into_iter().sum(),
            processes: pids.len(),
        })
    }
}

/// The pids of Postgres, Kafka and Redis, if `cargo xtask compare` has started them.
fn component_pids() -> Option<[u32; 3]> {
    let pids = std::env::var("WAYBILL_COMPARE_COMPONENTS").ok()?;
    let pids: Vec<u32> = pids.split(',').filter_map(|pid| pid.parse().ok()).collect();
    pids.try_into().ok()
}
