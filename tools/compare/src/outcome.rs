//! What is measured of one side in one scenario.

use std::collections::BTreeSet;
use std::time::Duration;

use bench::Spread;
use serde::{Deserialize, Serialize};
use uuid::Uuid;

use crate::load::{Read, Registration};
use crate::scenario::Scenario;
use crate::subject::Side;
use crate::tally::Tally;

#[derive(Clone, Debug, Deserialize, Serialize)]
pub struct Outcome {
    pub scenario: Scenario,
    pub side: Side,
    /// Registrations that clients wanted.
    pub wanted: usize,
    /// Of these, how many got 201, at the first try or a later one.
    pub answered: usize,
    /// The same for those that were wanted during the fault.
    pub wanted_in_fault: usize,
    pub answered_in_fault: usize,
    /// Answers 201 that name a missing effect.
    pub told_missing: usize,
    /// Milliseconds from the intended start to the answer 201, of all requests and of those in the
    /// fault.
    pub answer: Spread,
    pub answer_in_fault: Spread,
    /// Users that exist afterwards.
    pub users: usize,
    pub without_mail: usize,
    pub without_count: usize,
    pub without_profile: usize,
    pub doubled_mails: usize,
    /// Users that lack an effect, by whether their client repeats requests or gives up.
    pub incomplete_of_repeating: usize,
    pub incomplete_of_giving_up: usize,
    /// Seconds from the end of the fault until the mail was sent to, and analytics had counted,
    /// every user that was wanted before. Without a fault: seconds from the end of the load until
    /// every effect existed. `None`: never.
    pub recovered: Option<f64>,
    pub retried: f64,
    /// Milliseconds from the answer until the effect. 0: before the answer.
    pub mail_window: Spread,
    pub count_window: Spread,
    pub profile_window: Spread,
    /// Readers, and how many of them got the profile at once.
    pub reads: Reads,
    pub reads_with_version: Reads,
    /// Only of healthy scenarios.
    pub cost: Option<Cost>,
}

#[derive(Clone, Copy, Debug, Default, Deserialize, Serialize)]
pub struct Reads {
    pub all: usize,
    pub found_at_once: usize,
    /// Got it within 5 s.
    pub found: usize,
}

/// What a healthy scenario costs.
#[derive(Clone, Copy, Debug, Deserialize, Serialize)]
pub struct Cost {
    /// Milliseconds of CPU per registration.
    pub services: f64,
    /// The components were not started by this run: `None`.
    pub components: Option<Components>,
    /// Resident memory of the services in MB.
    pub memory: f64,
    pub processes: usize,
}

impl Cost {
    /// Milliseconds of CPU per registration of the services and of the components that the side
    /// uses.
    pub fn total(&self, side: Side) -> f64 {
        let components = self.components.map_or(0.0, |components| {
            let kafka = if side == Side::Waybill { components.kafka } else { 0.0 };
            components.postgres + components.redis + kafka
        });
        self.services + components
    }
}

/// Of all components. While a synchronous variant is measured, Kafka is idle.
#[derive(Clone, Copy, Debug, Deserialize, Serialize)]
pub struct Components {
    pub postgres: f64,
    pub kafka: f64,
    pub redis: f64,
    /// Resident memory of Kafka in MB.
    pub kafka_memory: f64,
}

/// What a scenario has to say besides its requests.
#[derive(Clone, Debug, Default)]
pub struct Facts {
    pub fault: Option<During>,
    /// From the end of the load until every effect existed.
    pub settled: Option<Duration>,
    pub retried: f64,
    pub cost: Option<Cost>,
}

/// A fault, or a burst.
#[derive(Clone, Copy, Debug)]
pub struct During {
    /// Seconds from the start of the load.
    pub begin: f64,
    pub end: f64,
    /// Its end, in milliseconds since 1970.
    pub ended_at: u64,
}

impl Outcome {
    pub fn of(scenario: Scenario, side: Side, requests: &[Registration], tally: &Tally, facts: &Facts) -> Self {
        let in_fault = |request: &&Registration| {
            facts.fault.is_some_and(|fault| (fault.begin..fault.end).contains(&request.intended))
        };
        let answered = |requests: &[&Registration]| {
            let answers = requests.iter().filter_map(|request| request.answered);
            spread(answers.map(|seconds| seconds * 1000.0))
        };
        let all: Vec<&Registration> = requests.iter().collect();
        let faulty: Vec<&Registration> = requests.iter().filter(in_fault).collect();
        let incomplete = tally.incomplete();
        let lacking = |repeats: bool| {
            let theirs = requests.iter().filter(|request| request.repeats == repeats);
            theirs
                .filter_map(|request| tally.users.get(&request.email))
                .filter(|user| incomplete.contains(user))
                .count()
        };
        let reads: Vec<Read> = requests.iter().filter_map(|request| request.read).collect();
        Self {
            scenario,
            side,
            wanted: requests.len(),
            answered: count(&all),
            wanted_in_fault: faulty.len(),
            answered_in_fault: count(&faulty),
            told_missing: requests.iter().filter(|request| request.told_missing).count(),
            answer: answered(&all),
            answer_in_fault: answered(&faulty),
            users: tally.users.values().collect::<BTreeSet<&Uuid>>().len(),
            without_mail: tally.without_mail.len(),
            without_count: tally.without_count.len(),
            without_profile: tally.without_profile.len(),
            doubled_mails: tally.doubled_mails,
            incomplete_of_repeating: lacking(true),
            incomplete_of_giving_up: lacking(false),
            recovered: match facts.fault {
                Some(fault) => recovered(fault, requests, tally),
                None => facts.settled.map(|settled| settled.as_secs_f64()),
            },
            retried: facts.retried,
            mail_window: window(requests, &tally.mailed_at),
            count_window: window(requests, &tally.counted_at),
            profile_window: spread(reads.iter().filter(|read| !read.with_version).filter_map(|read| read.readable)),
            reads: Reads::of(&reads, false),
            reads_with_version: Reads::of(&reads, true),
            cost: facts.cost,
        }
    }

    /// Requests that never got 201.
    pub fn refused(&self) -> usize {
        self.wanted - self.answered
    }

    /// Users that lack an effect at the end.
    pub fn incomplete(&self) -> usize {
        self.incomplete_of_repeating + self.incomplete_of_giving_up
    }
}

impl Reads {
    fn of(reads: &[Read], with_version: bool) -> Self {
        let reads: Vec<&Read> = reads.iter().filter(|read| read.with_version == with_version).collect();
        Self {
            all: reads.len(),
            found_at_once: reads.iter().filter(|read| read.found_at_once).count(),
            found: reads.iter().filter(|read| read.readable.is_some()).count(),
        }
    }
}

fn count(requests: &[&Registration]) -> usize {
    requests.iter().filter(|request| request.answered.is_some()).count()
}

/// Of no values: zeros.
fn spread(values: impl Iterator<Item = f64>) -> Spread {
    let mut values = values.peekable();
    if values.peek().is_none() { Spread::default() } else { Spread::of(values) }
}

/// Seconds from the end of the fault until the users that were wanted before it had their mail and
/// count.
fn recovered(fault: During, requests: &[Registration], tally: &Tally) -> Option<f64> {
    let incomplete = tally.incomplete();
    let mut last = fault.ended_at;
    for request in requests.iter().filter(|request| request.intended < fault.end) {
        // A request that registered no user needs no effect.
        let Some(user) = tally.users.get(&request.email) else { continue };
        if incomplete.contains(user) {
            return None;
        }
        let effects = [tally.mailed_at.get(user), tally.counted_at.get(user)].into_iter().flatten();
        last = effects.copied().fold(last, u64::max);
    }
    Some((last - fault.ended_at) as f64 / 1000.0)
}

/// Milliseconds from the answer until the effect.
fn window(requests: &[Registration], effects: &std::collections::BTreeMap<Uuid, u64>) -> Spread {
    let windows = requests.iter().filter_map(|request| {
        let effect = effects.get(&request.user?)?;
        Some(effect.saturating_sub(request.answered_at?) as f64)
    });
    spread(windows)
}
