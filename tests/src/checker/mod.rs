//! Judges a run by what it left behind: a pure function from everything that was recorded to the promises that were broken.
//!
//! The promises are the invariants of `docs/guarantees.md`. The function knows nothing of how the run was made, so it serves a
//! test of one fault, a soak of random ones, and a history written by hand alike.

mod effects;
mod history;
mod letters;
mod log;
mod mail;

use std::fmt;

pub use history::{
    Analytics, Asked, Delivery, Email, Fact, Funnel, History, Inserted, Known, Operation, Outcome, Person,
};

/// A broken promise and what shows it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Violation {
    /// `I1` to `I14`.
    pub invariant: &'static str,
    pub evidence: String,
}

impl fmt::Display for Violation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.invariant, self.evidence)
    }
}

/// Every violation in a run that was healed and drained; none is what the project promises.
pub fn violations(history: &History) -> Vec<Violation> {
    let mut found = Found::default();
    log::check(history, &mut found);
    if let Some(email) = &history.email {
        mail::check(history, email, &mut found);
    }
    effects::check(history, &mut found);
    letters::check(history, &mut found);
    for behind in &history.behind {
        found.add("I12", format!("not drained: {behind}"));
    }
    for ended in &history.ended {
        found.add("I12", format!("ended by itself: {ended}"));
    }
    for leak in &history.leaks {
        found.add("I14", format!("personal data in {leak}"));
    }
    found.0
}

/// The violations found so far.
#[derive(Default)]
struct Found(Vec<Violation>);

impl Found {
    fn add(&mut self, invariant: &'static str, evidence: String) {
        self.0.push(Violation { invariant, evidence });
    }

    /// A violation unless `holds`.
    fn expect(&mut self, holds: bool, invariant: &'static str, evidence: impl FnOnce() -> String) {
        if !holds {
            self.add(invariant, evidence());
        }
    }
}
