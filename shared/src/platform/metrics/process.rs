//! The process itself, under the names that Prometheus' client libraries use. Linux only: elsewhere
//! the metrics that come from /proc are 0.

use std::fs;
use std::sync::atomic::AtomicU64;

use nix::sys::resource::{UsageWho, getrusage};
use nix::sys::time::{TimeVal, TimeValLike};
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::gauge::Gauge;

use super::description::{Description, Registered};
use super::since::now_ms;

#[derive(Clone)]
pub(super) struct Process {
    start: Gauge<f64, AtomicU64>,
    cpu: Counter<f64, AtomicU64>,
    memory: Gauge,
    open_files: Gauge,
}

impl Process {
    pub fn new() -> Self {
        let process = Self {
            start: Gauge::default(),
            cpu: Counter::default(),
            memory: Gauge::default(),
            open_files: Gauge::default(),
        };
        process.start.set(now_ms() as f64 / 1000.0);
        process
    }

    pub fn register(&self, registered: &mut Registered) {
        let description = Description {
            name: "process_start_time_seconds",
            unit: "seconds",
            labels: &[],
            meaning: "When the process started, in seconds since 1970",
            bad: "changes several times within minutes: \
                  [A process restarts again and again](operations.md#a-process-restarts-again-and-again)",
        };
        registered.add(description, &self.start);
        let description = Description {
            name: "process_cpu_seconds",
            unit: "seconds",
            labels: &[],
            meaning: "CPU time of the process, user and system",
            bad: "grows per second by the number of cores that the process has: \
                  [Memory and CPU](operations.md#a-process-uses-too-much-memory-or-cpu)",
        };
        registered.add(description, &self.cpu);
        let description = Description {
            name: "process_resident_memory_bytes",
            unit: "bytes",
            labels: &[],
            meaning: "Memory of the process that is in RAM",
            bad: "grows for hours, or is near the limit of the container: \
                  [Memory and CPU](operations.md#a-process-uses-too-much-memory-or-cpu)",
        };
        registered.add(description, &self.memory);
        let description = Description {
            name: "process_open_fds",
            unit: "files",
            labels: &[],
            meaning: "Open files of the process, connections included",
            bad: "near `ulimit -n`: [503 or 409](operations.md#requests-are-answered-with-503-or-409)",
        };
        registered.add(description, &self.open_files);
    }

    /// Measures the process, for a scrape. Two scrapes at the same time would count CPU time twice,
    /// so the caller holds a lock.
    pub fn measure(&self) {
        if let Ok(usage) = getrusage(UsageWho::RUSAGE_SELF) {
            let used = seconds(usage.user_time()) + seconds(usage.system_time());
            self.cpu.inc_by((used - self.cpu.get()).max(0.0));
        }
        if let Some(bytes) = resident_bytes() {
            self.memory.set(bytes);
        }
        if let Ok(files) = fs::read_dir("/proc/self/fd") {
            self.open_files.set(files.count() as i64);
        }
    }
}

fn seconds(time: TimeVal) -> f64 {
    time.num_microseconds() as f64 / 1e6
}

/// The line `VmRSS:    1234 kB` of /proc/self/status.
fn resident_bytes() -> Option<i64> {
    let status = fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"))?;
    let kilobytes: i64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    Some(kilobytes * 1024)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    #[cfg(target_os = "linux")]
    fn a_process_measures_itself() {
        let process = Process::new();
        process.measure();
        assert!(process.memory.get() > 1024 * 1024, "{}", process.memory.get());
        assert!(process.open_files.get() > 2, "{}", process.open_files.get());
        assert!(process.cpu.get() > 0.0);
        assert!(process.start.get() > 1.7e9);
    }
}
