//! The checker: a pure function from the recorded history of a run to its violations.
//!
//! The invariants I1 to I14 are those of `docs/guarantees.md`. The function does not know how the
//! run was made, so it checks a test of one fault, a soak with random faults, and a history written
//! by hand.

mod effects;
mod history;
mod letters;
mod log;
mod mail;
mod violation;

use violation::Found;

pub use history::{
    Analytics, Audited, Delivery, Discard, Email, Fact, Funnel, History, Inserted, Operation, Outcome, Person,
    Recipient, Request, Steps, StoredUser,
};
pub use violation::Violation;

/// Every violation in a run, after its faults are healed and its work is drained. The project
/// promises that there is none.
pub fn violations(history: &History) -> Vec<Violation> {
    let mut found = Found::default();
    log::check(history, &mut found);
    if let Some(email) = &history.email {
        mail::check(history, email, &mut found);
    }
    effects::check(history, &mut found);
    letters::check(history, &mut found);
    for work_left in &history.work_left {
        found.add("I12", format!("not drained: {work_left}"));
    }
    for ended in &history.ended {
        found.add("I12", format!("ended by itself: {ended}"));
    }
    for leak in &history.leaks {
        found.add("I14", format!("personal data in {leak}"));
    }
    found.into_violations()
}
