//! Everything that a run has measured.

use bench::Machine;
use serde::{Deserialize, Serialize};

use crate::added::Added;
use crate::outcome::Outcome;
use crate::plan::Plan;
use crate::scenario::Scenario;
use crate::subject::Side;

/// The outcomes of a run.
#[derive(Debug, Deserialize, Serialize)]
pub struct Results {
    pub machine: Machine,
    pub plan: Plan,
    /// Registrations per second, with all their effects, of each side.
    pub capacity: Vec<(Side, f64)>,
    pub outcomes: Vec<Outcome>,
    /// What adding a fourth receiver took. Empty if its programs were not built.
    pub added: Vec<Added>,
    /// Violated invariants that the checker of the fault tests found at the end of Waybill's
    /// faults.
    pub violations: Vec<String>,
    /// Lines of code of Waybill's services, and of the synchronous version.
    pub lines: [usize; 2],
}

impl Results {
    /// The outcome of one side in a scenario, if it was run.
    pub fn of(&self, scenario: Scenario, side: Side) -> Option<&Outcome> {
        self.outcomes.iter().find(|outcome| outcome.scenario == scenario && outcome.side == side)
    }
}
