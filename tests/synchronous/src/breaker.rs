//! The circuit breaker of one receiver: after some failures in a row, calls fail at once, and one
//! call from time to time tries whether the receiver works again.

use std::sync::{Mutex, MutexGuard};

use tokio::time::{Duration, Instant};

/// Failures in a row that open it.
const FAILURES: u32 = 5;
/// Time between two probes. Shorter than that of the email service, because each call that is
/// refused here is a lost one.
const PROBE_INTERVAL: Duration = Duration::from_secs(1);

#[derive(Default)]
pub struct Breaker(Mutex<State>);

#[derive(Default)]
struct State {
    failures: u32,
    /// `None`: it is closed.
    next_probe: Option<Instant>,
}

impl Breaker {
    /// Whether a call may be made now.
    pub fn permits(&self) -> bool {
        let now = Instant::now();
        let mut state = self.state();
        match state.next_probe {
            None => true,
            Some(next) if next > now => false,
            Some(_) => {
                state.next_probe = Some(now + PROBE_INTERVAL);
                true
            }
        }
    }

    /// Whether a call would be refused now.
    pub fn refuses(&self) -> bool {
        self.state().next_probe.is_some_and(|next| next > Instant::now())
    }

    pub fn succeeded(&self) {
        *self.state() = State::default();
    }

    pub fn failed(&self) {
        let mut state = self.state();
        state.failures = state.failures.saturating_add(1);
        if state.failures >= FAILURES && state.next_probe.is_none() {
            state.next_probe = Some(Instant::now() + PROBE_INTERVAL);
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.0.lock().expect("no thread panics while it holds this lock")
    }
}
