//! Counts the records that consumers received again. Counters are lost with their process, so they
//! are read each second.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use reqwest::Client;
use tokio::task::JoinSet;

use crate::services::CONSUMERS;
use crate::system::System;

const EVERY: Duration = Duration::from_secs(1);

pub struct Redelivered {
    seen: Arc<AtomicU64>,
    readers: JoinSet<()>,
}

impl Redelivered {
    pub fn watch(system: &System) -> Self {
        let seen = Arc::new(AtomicU64::new(0));
        let mut readers = JoinSet::new();
        for service in CONSUMERS {
            readers.spawn(read(system.processes.admin(service).url("/metrics"), seen.clone()));
        }
        Self { seen, readers }
    }

    /// The number so far. It lacks the records between the last read and the end of a process.
    pub async fn end(mut self) -> u64 {
        self.readers.shutdown().await;
        self.seen.load(Ordering::Relaxed)
    }
}

async fn read(url: String, seen: Arc<AtomicU64>) {
    let client = Client::builder().timeout(EVERY).build().unwrap();
    let mut before = 0;
    loop {
        if let Ok(page) = client.get(&url).send().await
            && let Ok(page) = page.text().await
        {
            let now = redelivered(&page);
            // A smaller number comes from a new process, which began at 0.
            seen.fetch_add(if now < before { now } else { now - before }, Ordering::Relaxed);
            before = now;
        }
        tokio::time::sleep(EVERY).await;
    }
}

/// The number of duplicate and stale records.
fn redelivered(page: &str) -> u64 {
    let lines = page.lines().filter(|line| line.starts_with("events_consumed_total"));
    let again = lines.filter(|line| line.contains("outcome=\"duplicate\"") || line.contains("outcome=\"stale\""));
    again.filter_map(|line| line.rsplit(' ').next()?.parse::<f64>().ok()).map(|count| count as u64).sum()
}
