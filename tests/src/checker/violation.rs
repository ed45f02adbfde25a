//! The violations of a run.

use std::fmt;

/// A broken invariant, with the evidence.
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

/// The violations found so far.
#[derive(Default)]
pub(super) struct Found(Vec<Violation>);

impl Found {
    pub(super) fn add(&mut self, invariant: &'static str, evidence: String) {
        self.0.push(Violation { invariant, evidence });
    }

    /// Adds a violation unless `holds`.
    pub(super) fn expect(&mut self, holds: bool, invariant: &'static str, evidence: impl FnOnce() -> String) {
        if !holds {
            self.add(invariant, evidence());
        }
    }

    pub(super) fn into_violations(self) -> Vec<Violation> {
        self.0
    }
}
