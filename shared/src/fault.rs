//! Crash and freeze points for the fault tests. Without the feature `fault-points` a point is an
//! empty function.

/// A named place between two effects. The tests set `FAULT_AT=point:nth:action` in the environment.
/// When the process reaches the point for the nth time (counted from 1), the action happens:
///
/// - `kill`: the process gets SIGKILL.
/// - `stop`: the process gets SIGSTOP.
/// - `stall`: the thread blocks until the file named by `FAULT_UNTIL` exists.
/// - `panic`: the thread panics.
#[cfg(not(feature = "fault-points"))]
#[inline(always)]
pub fn point(_name: &str) {}

#[cfg(feature = "fault-points")]
pub use armed::point;

#[cfg(feature = "fault-points")]
mod armed {
    use std::path::Path;
    use std::sync::LazyLock;
    use std::sync::atomic::{AtomicU64, Ordering};
    use std::time::Duration;

    use nix::sys::signal::{Signal, raise};

    /// How often a stalled thread checks whether the file exists.
    const STALL_CHECK_INTERVAL: Duration = Duration::from_millis(100);

    #[derive(Clone, Copy)]
    enum Action {
        Signal(Signal),
        Stall,
        Panic,
    }

    struct Fault {
        point: String,
        nth: u64,
        action: Action,
        reached: AtomicU64,
    }

    static FAULT: LazyLock<Option<Fault>> =
        LazyLock::new(|| Some(parse(&variable("FAULT_AT")?).expect("FAULT_AT is point:nth:kill|stop|stall|panic")));

    #[expect(clippy::disallowed_methods, reason = "a switch of the tests, not a setting of the service")]
    fn variable(name: &str) -> Option<String> {
        std::env::var(name).ok()
    }

    fn parse(text: &str) -> Option<Fault> {
        let (rest, action) = text.rsplit_once(':')?;
        let (point, nth) = rest.rsplit_once(':')?;
        let action = match action {
            "kill" => Action::Signal(Signal::SIGKILL),
            "stop" => Action::Signal(Signal::SIGSTOP),
            "stall" => Action::Stall,
            "panic" => Action::Panic,
            _ => return None,
        };
        Some(Fault { point: point.to_owned(), nth: nth.parse().ok()?, action, reached: AtomicU64::new(0) })
    }

    pub fn point(name: &str) {
        if let Some(fault) = FAULT.as_ref()
            && fault.point == name
            && fault.reached.fetch_add(1, Ordering::SeqCst) + 1 == fault.nth
        {
            act(name, fault.action);
        }
    }

    fn act(name: &str, action: Action) {
        match action {
            Action::Signal(signal) => raise(signal).expect("a process may send itself a signal"),
            Action::Stall => {
                let until = variable("FAULT_UNTIL").expect("FAULT_UNTIL names the file that ends the stall");
                tracing::warn!(point = name, until, "fault point reached: this thread stalls until the file exists");
                while !Path::new(&until).exists() {
                    std::thread::sleep(STALL_CHECK_INTERVAL);
                }
            }
            Action::Panic => panic!("fault point {name} reached"),
        }
    }
}
