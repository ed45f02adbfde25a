//! Measures a slice: a piece of work of one side.

use std::time::Instant;

use anyhow::Result;
use serde::Serialize;

use crate::usage::{Cpu, Snapshot, forget_peak, peak_memory};

/// What one side did in one slice.
#[derive(Clone, Debug, Serialize)]
pub struct Slice {
    /// How many rows, events, requests or mails.
    pub amount: u64,
    pub seconds: f64,
    /// Seconds in this slice.
    pub cpu: Cpu,
    /// The most memory (MB) of the service; 0 without one.
    pub peak_memory: f64,
}

impl Slice {
    /// Per second.
    pub fn rate(&self) -> f64 {
        self.amount as f64 / self.seconds
    }

    /// CPU seconds per 100,000.
    pub fn cpu_per_100_000(&self) -> Cpu {
        self.cpu.map(|seconds| seconds * 100_000.0 / self.amount as f64)
    }

    /// Cores that other programs took.
    pub fn cores_of_others(&self) -> f64 {
        self.cpu.others / self.seconds
    }
}

/// A slice that is being measured.
pub struct Meter {
    /// Of Postgres, Kafka and Redis.
    components: [u32; 3],
    services: Vec<u32>,
    before: Snapshot,
    start: Instant,
}

impl Meter {
    /// Begins a slice. All are pids: of Postgres, Kafka and Redis, and of the processes that are
    /// measured as the service.
    pub fn start(components: [u32; 3], services: &[u32]) -> Result<Self> {
        services.iter().try_for_each(|pid| forget_peak(*pid))?;
        let before = Snapshot::take()?;
        Ok(Self { components, services: services.to_vec(), before, start: Instant::now() })
    }

    /// Ends the slice, in which this amount of work was done.
    pub fn stop(self, amount: u64) -> Result<Slice> {
        let seconds = self.start.elapsed().as_secs_f64();
        let after = Snapshot::take()?;
        let tree = |root: u32| after.of_tree(root) - self.before.of_tree(root);
        let own = std::process::id();
        // The sum of no numbers is -0.0.
        let service = self.services.iter().map(|pid| tree(*pid)).sum::<f64>() + 0.0;
        let [postgres, kafka, redis] = self.components.map(tree);
        let load = after.of_process(own) - self.before.of_process(own);
        let busy = after.busy() - self.before.busy();
        let others = (busy - service - postgres - kafka - redis - load).max(0.0);
        let peaks = self.services.iter().map(|pid| peak_memory(*pid)).collect::<Result<Vec<f64>>>()?;
        let cpu = Cpu { service, postgres, kafka, redis, load, others };
        Ok(Slice { amount, seconds, cpu, peak_memory: peaks.into_iter().sum() })
    }
}
