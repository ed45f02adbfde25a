//! Waiting for a condition, with a deadline.

use std::fmt::Debug;
use std::time::{Duration, Instant};

/// How long a test waits for a condition. Everything that works takes less, even on two busy cores.
pub const DEADLINE: Duration = Duration::from_secs(60);
/// The pause between two probes of a condition.
pub const POLL: Duration = Duration::from_millis(50);

/// Waits until `probe` returns a value, and returns it. `what` names the condition in the panic
/// message.
///
/// # Panics
/// `probe` returned `None` for [`DEADLINE`].
pub async fn eventually<T>(what: &str, probe: impl AsyncFnMut() -> Option<T>) -> T {
    within(DEADLINE, what, probe).await
}

/// As [`eventually`], with another deadline.
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

/// Waits until `probe` returns `expected`.
///
/// # Panics
/// It did not within [`DEADLINE`]. The message contains the last value.
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

/// Waits until `probe` returns a text that contains this one.
///
/// # Panics
/// It did not within [`DEADLINE`]. The message contains the last text.
pub async fn eventually_contains(what: &str, expected: &str, mut probe: impl AsyncFnMut() -> String) {
    let deadline = Instant::now() + DEADLINE;
    loop {
        let found = probe().await;
        if found.contains(expected) {
            return;
        }
        assert!(Instant::now() < deadline, "not within {DEADLINE:?}: {what}: no {expected:?} in {found:?}");
        tokio::time::sleep(POLL).await;
    }
}

/// Waits until a growing number reaches `goal`. The deadline starts again whenever the number
/// grows, so a slow machine does not fail the test.
///
/// # Panics
/// The number did not grow for [`DEADLINE`], or it exceeded `goal`.
pub async fn eventually_reaches(what: &str, goal: i64, mut probe: impl AsyncFnMut() -> i64) {
    let mut reached = 0;
    while reached < goal {
        let more = async || Some(probe().await).filter(|found| *found > reached);
        reached = eventually(&format!("{what}: more than {reached} of {goal}"), more).await;
    }
    assert_eq!(reached, goal, "{what}");
}

/// Checks for `duration` that `probe` stays true.
///
/// # Panics
/// `probe` returned false.
pub async fn throughout(duration: Duration, what: &str, mut probe: impl AsyncFnMut() -> bool) {
    let end = Instant::now() + duration;
    while Instant::now() < end {
        assert!(probe().await, "did not hold: {what}");
        tokio::time::sleep(POLL).await;
    }
}
