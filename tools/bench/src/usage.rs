//! CPU time and memory of processes and of the machine, from /proc.

use std::collections::HashMap;
use std::fs;

use anyhow::{Context, Result};
use serde::Serialize;

/// The kernel counts CPU time in hundredths of a second, on every architecture.
const TICKS_PER_SECOND: f64 = 100.0;

/// CPU time in seconds, of each program that takes part.
#[derive(Clone, Copy, Debug, Default, Serialize)]
pub struct Cpu {
    pub service: f64,
    pub postgres: f64,
    pub kafka: f64,
    pub redis: f64,
    /// The benchmark itself, including the SMTP sink.
    pub load: f64,
    /// Everything else on the machine, including the kernel's own threads.
    pub others: f64,
}

impl Cpu {
    pub fn plus(self, other: Self) -> Self {
        Self {
            service: self.service + other.service,
            postgres: self.postgres + other.postgres,
            kafka: self.kafka + other.kafka,
            redis: self.redis + other.redis,
            load: self.load + other.load,
            others: self.others + other.others,
        }
    }

    pub fn map(self, change: impl Fn(f64) -> f64) -> Self {
        Self {
            service: change(self.service),
            postgres: change(self.postgres),
            kafka: change(self.kafka),
            redis: change(self.redis),
            load: change(self.load),
            others: change(self.others),
        }
    }
}

/// The fields of /proc/PID/stat that matter here.
struct Stat {
    parent: u32,
    /// Of the process, in ticks.
    own: u64,
    /// Of its children that have ended, in ticks.
    ended_children: u64,
}

/// CPU time of all processes at one moment.
pub struct Snapshot {
    processes: HashMap<u32, Stat>,
    /// Of the whole machine, in seconds.
    busy: f64,
}

impl Snapshot {
    pub fn take() -> Result<Self> {
        let mut processes = HashMap::new();
        for entry in fs::read_dir("/proc").context("the benchmark needs Linux")? {
            let name = entry?.file_name();
            let Some(pid) = name.to_str().and_then(|name| name.parse().ok()) else { continue };
            // A process may end in between.
            if let Some(stat) = fs::read_to_string(format!("/proc/{pid}/stat")).ok().and_then(|text| parse(&text)) {
                processes.insert(pid, stat);
            }
        }
        Ok(Self { processes, busy: busy()? })
    }

    /// Seconds of a process, its children and their children.
    pub fn of_tree(&self, root: u32) -> f64 {
        let ticks: u64 = self
            .processes
            .iter()
            .filter(|(pid, _)| self.is_in_tree(**pid, root))
            .map(|(_, stat)| stat.own + stat.ended_children)
            .sum();
        ticks as f64 / TICKS_PER_SECOND
    }

    /// Seconds of a process without its children.
    pub fn of_process(&self, pid: u32) -> f64 {
        self.processes.get(&pid).map_or(0.0, |stat| stat.own as f64 / TICKS_PER_SECOND)
    }

    /// Seconds of the whole machine.
    pub fn busy(&self) -> f64 {
        self.busy
    }

    fn is_in_tree(&self, pid: u32, root: u32) -> bool {
        let mut at = pid;
        loop {
            if at == root {
                return true;
            }
            match self.processes.get(&at) {
                Some(stat) if stat.parent != 0 => at = stat.parent,
                _ => return false,
            }
        }
    }
}

fn parse(stat: &str) -> Option<Stat> {
    // The second field is the program's name in parentheses, which may contain blanks.
    let (_, rest) = stat.rsplit_once(')')?;
    let fields: Vec<&str> = rest.split_whitespace().collect();
    let ticks = |index: usize| fields.get(index)?.parse::<u64>().ok();
    Some(Stat {
        parent: fields.get(1)?.parse().ok()?,
        own: ticks(11)? + ticks(12)?,
        ended_children: ticks(13)? + ticks(14)?,
    })
}

/// Seconds in which the machine's cores worked since it was started.
fn busy() -> Result<f64> {
    let stat = fs::read_to_string("/proc/stat")?;
    let line = stat.lines().next().context("/proc/stat is empty")?;
    let ticks: Vec<u64> = line.split_whitespace().skip(1).filter_map(|field| field.parse().ok()).collect();
    // user, nice, system; then idle and iowait; then irq and softirq. The guest's time is in user.
    let busy: u64 = [0, 1, 2, 5, 6].iter().filter_map(|index| ticks.get(*index)).sum();
    Ok(busy as f64 / TICKS_PER_SECOND)
}

/// The most memory (MB) that a process had since [`forget_peak`].
pub fn peak_memory(pid: u32) -> Result<f64> {
    memory(pid, "VmHWM:")
}

/// The memory (MB) that a process has now.
pub fn resident_memory(pid: u32) -> Result<f64> {
    memory(pid, "VmRSS:")
}

/// The part (MB) of [`resident_memory`] that the process has allocated. The rest are pages of its
/// program and libraries: the processes of one machine share them, and the kernel may drop them.
pub fn allocated_memory(pid: u32) -> Result<f64> {
    memory(pid, "RssAnon:")
}

fn memory(pid: u32, field: &str) -> Result<f64> {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).context("the process has ended")?;
    let line = status.lines().find_map(|line| line.strip_prefix(field));
    let kilobytes: f64 = line.and_then(|line| line.split_whitespace().next()?.parse().ok()).context("no such field")?;
    Ok(kilobytes * 1024.0 / 1e6)
}

/// Begins to measure the peak of a process's memory.
pub fn forget_peak(pid: u32) -> Result<()> {
    fs::write(format!("/proc/{pid}/clear_refs"), "5").context("cannot reset the peak of a process's memory")
}

/// The load average of the last minute.
pub fn load_average() -> Result<f64> {
    let text = fs::read_to_string("/proc/loadavg")?;
    text.split_whitespace().next().and_then(|load| load.parse().ok()).context("/proc/loadavg is empty")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_program_name_may_contain_blanks_and_parentheses() {
        let stat = parse("17 (a) b) S 3 17 17 0 -1 4194560 100 0 0 0 250 50 7 3 20 0 1 0 100").unwrap();
        assert_eq!((stat.parent, stat.own, stat.ended_children), (3, 300, 10));
    }

    #[test]
    fn the_time_of_a_busy_process_is_counted() {
        let before = Snapshot::take().unwrap();
        let pid = std::process::id();
        // The kernel counts in steps of 10 ms.
        while Snapshot::take().unwrap().of_process(pid) < before.of_process(pid) + 0.05 {}
        let after = Snapshot::take().unwrap();
        assert!(after.busy() > before.busy());
        assert!(after.of_tree(pid) >= after.of_process(pid));
    }
}
