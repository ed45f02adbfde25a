//! Judges a run by what it left behind: a pure function from everything that was recorded to the promises that were broken.
//!
//! The promises are the invariants of `docs/guarantees.md`. The function knows nothing of how the run was made, so it serves a
//! test of one fault, a soak of random ones, and a history written by hand alike.

mod effects;
mod history;
mod letters;
mod log;
mod mail;
mod violation;

use violation::Found;

pub use history::{
    Analytics, Asked, Delivery, Email, Fact, Funnel, History, Inserted, Known, Operation, Outcome, Person,
};
pub use violation::Violation;

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
    found.into_violations()
}
