//! Crash and freeze points for the fault tests. Without the feature `fault-points` a point is an empty function.

/// A named place between two effects. With `FAULT_AT=point:nth:kill|stop` in the environment the process gets SIGKILL or
/// SIGSTOP when it comes here for the nth time (counted from 1).
#[cfg(not(feature = "fault-points"))]
#[inline(always)]
pub fn point(_name: &str) {}

#[cfg(feature = "fault-points")]
pub use armed::point;

#[cfg(feature = "fault-points")]
mod armed {
    use std::sync::LazyLock;
    use std::sync::atomic::{AtomicU64, Ordering};

    use nix::sys::signal::{Signal, raise};

    struct Fault {
        point: String,
        nth: u64,
        signal: Signal,
        seen: AtomicU64,
    }

    static FAULT: LazyLock<Option<Fault>> = LazyLock::new(|| {
        #[expect(clippy::disallowed_methods, reason = "a test switch, not a setting of the service")]
        let text = std::env::var("FAULT_AT").ok()?;
        Some(parse(&text).expect("FAULT_AT is point:nth:kill|stop"))
    });

    fn parse(text: &str) -> Option<Fault> {
        let (rest, action) = text.rsplit_once(':')?;
        let (point, nth) = rest.rsplit_once(':')?;
        let signal = match action {
            "kill" => Signal::SIGKILL,
            "stop" => Signal::SIGSTOP,
            _ => return None,
        };
        Some(Fault { point: point.to_owned(), nth: nth.parse().ok()?, signal, seen: AtomicU64::new(0) })
    }

    pub fn point(name: &str) {
        if let Some(fault) = FAULT.as_ref()
            && fault.point == name
            && fault.seen.fetch_add(1, Ordering::SeqCst) + 1 == fault.nth
        {
            raise(fault.signal).expect("a process may signal itself");
        }
    }
}
