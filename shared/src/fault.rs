//! Crash and freeze points for the fault tests. Without the feature `fault-points` a point is an empty function.

/// A named place between two effects. With `FAULT_AT=point:nth:kill|stop|stall|panic` in the environment, when the process comes
/// here for the nth time (counted from 1), it gets SIGKILL or SIGSTOP, its thread hangs until the file `FAULT_UNTIL` exists, or its
/// thread panics.
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

    /// How often a thread that hangs looks whether it still should.
    const LOOK_INTERVAL: Duration = Duration::from_millis(100);

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
        seen: AtomicU64,
    }

    static FAULT: LazyLock<Option<Fault>> =
        LazyLock::new(|| Some(parse(&switch("FAULT_AT")?).expect("FAULT_AT is point:nth:kill|stop|stall|panic")));

    #[expect(clippy::disallowed_methods, reason = "a test switch, not a setting of the service")]
    fn switch(name: &str) -> Option<String> {
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
        Some(Fault { point: point.to_owned(), nth: nth.parse().ok()?, action, seen: AtomicU64::new(0) })
    }

    pub fn point(name: &str) {
        if let Some(fault) = FAULT.as_ref()
            && fault.point == name
            && fault.seen.fetch_add(1, Ordering::SeqCst) + 1 == fault.nth
        {
            strike(name, fault.action);
        }
    }

    fn strike(name: &str, action: Action) {
        match action {
            Action::Signal(signal) => raise(signal).expect("a process may signal itself"),
            Action::Stall => {
                let until = switch("FAULT_UNTIL").expect("FAULT_UNTIL names the file that ends the stall");
                tracing::warn!(point = name, until, "this thread stalls");
                while !Path::new(&until).exists() {
                    std::thread::sleep(LOOK_INTERVAL);
                }
            }
            Action::Panic => panic!("the fault at {name}"),
        }
    }
}
