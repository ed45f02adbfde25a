//! What the end-to-end tests stand on: the real services as processes, on real components. Nothing in here sleeps instead of
//! waiting for a condition; every wait has a deadline.

#![allow(
    clippy::disallowed_methods,
    clippy::unwrap_used,
    clippy::missing_panics_doc,
    reason = "test support: a panic is how a test fails"
)]

pub mod api;
pub mod brokers;
pub mod checker;
pub mod clock;
pub mod consume;
pub mod load;
pub mod log;
pub mod mailing;
pub mod otlp;
pub mod proxy;
pub mod search;
pub mod soak;
pub mod system;
pub mod topics;
pub mod watch;
pub mod wire;

use std::fmt::Debug;
use std::time::{Duration, Instant};

pub use system::{Part, System};

/// What `cargo xtask test` repeats, or what `cargo xtask test --full` does.
pub fn repeats(usual: &'static [u32], full: &'static [u32]) -> impl Iterator<Item = u32> {
    let repeats = if std::env::var_os("WAYBILL_FULL").is_some() { full } else { usual };
    repeats.iter().copied()
}

/// Longer than anything takes that works, also on two busy cores.
pub const DEADLINE: Duration = Duration::from_secs(60);
pub(crate) const POLL: Duration = Duration::from_millis(50);

/// Waits until `probe` answers something, and returns it.
///
/// # Panics
/// It did not within [`DEADLINE`].
pub async fn eventually<T>(what: &str, probe: impl AsyncFnMut() -> Option<T>) -> T {
    within(DEADLINE, what, probe).await
}

/// The same with a deadline of the caller's own.
pub async fn within<T>(limit: Duration, what: &str, mut probe: impl AsyncFnMut() -> Option<T>) -> T {
    let deadline = Instant::now() + limit;
    loop {
        if let Some(found) = probe().await {
            return found;
        }
        assert!(Instant::now() < deadline, "not within {limit:?}: {what}");
        tokio::time::sleep(POLL).await;
    }
}

/// Waits until `probe` answers `expected`.
///
/// # Panics
/// It did not within [`DEADLINE`]; the message has what it answered last.
pub async fn eventually_eq<T: PartialEq + Debug>(what: &str, expected: T, mut probe: impl AsyncFnMut() -> T) {
    let deadline = Instant::now() + DEADLINE;
    loop {
        let found = probe().await;
        if found == expected {
            return;
        }
        assert!(Instant::now() < deadline, "not within {DEADLINE:?}: {what}: {found:?} instead of {expected:?}");
        tokio::time::sleep(POLL).await;
    }
}

/// Waits until `probe` has counted up to `goal`, for what takes its time on a slow machine: only standing still fails.
///
/// # Panics
/// It did not grow for [`DEADLINE`], or it went beyond.
pub async fn counted_up_to(what: &str, goal: i64, mut probe: impl AsyncFnMut() -> i64) {
    let mut counted = 0;
    while counted < goal {
        let more = async || Some(probe().await).filter(|found| *found > counted);
        counted = eventually(&format!("{what}: more than {counted} of {goal}"), more).await;
    }
    assert_eq!(counted, goal, "{what}");
}

/// Watches for `duration` that `probe` stays true: for what must not happen.
///
/// # Panics
/// It was false once.
pub async fn throughout(duration: Duration, what: &str, mut probe: impl AsyncFnMut() -> bool) {
    let end = Instant::now() + duration;
    while Instant::now() < end {
        assert!(probe().await, "did not hold: {what}");
        tokio::time::sleep(POLL).await;
    }
}
