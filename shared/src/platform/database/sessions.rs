//! Pooled sessions that cannot work any more. After a failover a session stays open and read-only.
//! When a pooler switches to another server, the session loses its prepared statements. A changed
//! table makes the plans of a session invalid. A ping succeeds in all these sessions. So the error
//! of a statement decides: if the session may be its cause, all sessions that are older than the
//! error are replaced before they are used again.

use std::sync::{Mutex, PoisonError};

use tokio::time::{Duration, Instant};

/// All sessions are replaced at most once in this time. Otherwise a statement that fails in every
/// session would make each request connect again.
const REPLACE_INTERVAL: Duration = Duration::from_secs(1);
/// Classes and codes of errors that come from the statement, its data or other sessions, and not
/// from the session: cardinality, data, constraints, deadlocks, names and rights, resources,
/// limits, locks, a cancelled statement, errors that our own functions raise.
const NOT_OF_THE_SESSION: [&str; 10] = ["21", "22", "23", "40", "42", "53", "54", "55", "57014", "P0"];

/// A process has one database, so the doubt is about all sessions of the process.
static DOUBT: Mutex<Doubt> = Mutex::new(Doubt { effective: None, latest: None });

struct Doubt {
    /// Sessions that are older than this are replaced.
    effective: Option<Instant>,
    /// The latest error that a session may have caused.
    latest: Option<Instant>,
}

impl Doubt {
    /// Whether a session of this age may be used.
    fn trusts(&mut self, created: Instant, now: Instant) -> bool {
        if self.effective.is_none_or(|effective| now >= effective + REPLACE_INTERVAL) {
            self.effective = self.latest;
        }
        self.effective.is_none_or(|effective| created > effective)
    }
}

/// Reports the error of a statement on a pooled session. Call it where the error ends: where a
/// request is answered, where a batch is retried later, in [`bounded`](super::bounded).
pub fn report(error: &sqlx::Error) {
    if is_of_the_session(error) {
        doubt();
    }
}

/// Replaces all sessions that are open now.
pub(super) fn doubt() {
    DOUBT.lock().unwrap_or_else(PoisonError::into_inner).latest = Some(Instant::now());
}

/// Whether a session of this age may be used.
pub(super) fn is_trusted(age: Duration) -> bool {
    let now = Instant::now();
    let created = now.checked_sub(age).unwrap_or(now);
    DOUBT.lock().unwrap_or_else(PoisonError::into_inner).trusts(created, now)
}

/// Whether the session may be the cause. Unknown errors count: a new connection costs little.
fn is_of_the_session(error: &sqlx::Error) -> bool {
    match error {
        sqlx::Error::RowNotFound | sqlx::Error::PoolTimedOut | sqlx::Error::PoolClosed => false,
        sqlx::Error::Database(error) => {
            error.code().is_some_and(|code| !NOT_OF_THE_SESSION.iter().any(|known| code.starts_with(known)))
        }
        _ => true,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// I12.
    #[test]
    fn sessions_older_than_an_error_are_replaced_at_most_once_a_second() {
        let mut doubt = Doubt { effective: None, latest: None };
        let start = Instant::now();
        let at = |ms: u64| start + Duration::from_millis(ms);
        assert!(doubt.trusts(at(0), at(1)));
        doubt.latest = Some(at(10));
        assert!(!doubt.trusts(at(9), at(11)));
        assert!(doubt.trusts(at(12), at(13)));
        // A new session failed too. It is kept for a moment, and replaced also if nothing fails
        // after that.
        doubt.latest = Some(at(20));
        assert!(doubt.trusts(at(12), at(21)));
        assert!(!doubt.trusts(at(12), at(60_000)));
        assert!(doubt.trusts(at(21), at(60_001)));
    }
}
