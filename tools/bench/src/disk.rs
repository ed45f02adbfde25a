//! How long the disk takes to store data durably. Most figures of a benchmark with a database
//! follow from it.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::Result;

/// How often the disk is probed.
const INTERVAL: Duration = Duration::from_secs(1);
/// Bytes that a probe writes: a page of Postgres.
const BYTES: usize = 8192;

/// A thread that writes a page and calls fdatasync once a second.
pub struct DiskProbe {
    times: Arc<Mutex<Vec<Duration>>>,
    is_over: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl DiskProbe {
    /// Probes the disk of this folder.
    pub fn start(folder: &Path) -> Result<Self> {
        let file = File::create(folder.join("disk-probe"))?;
        let times: Arc<Mutex<Vec<Duration>>> = Arc::default();
        let is_over = Arc::new(AtomicBool::new(false));
        let thread = {
            let (times, is_over) = (Arc::clone(&times), Arc::clone(&is_over));
            std::thread::spawn(move || {
                while !is_over.load(Ordering::Relaxed) {
                    let start = Instant::now();
                    if file.write_all_at(&[0; BYTES], 0).and_then(|()| file.sync_data()).is_ok() {
                        times.lock().expect("no thread panics while it holds this lock").push(start.elapsed());
                    }
                    std::thread::park_timeout(INTERVAL);
                }
            })
        };
        Ok(Self { times, is_over, thread: Some(thread) })
    }

    /// The times since the last call.
    pub fn take(&self) -> Vec<Duration> {
        std::mem::take(&mut self.times.lock().expect("no thread panics while it holds this lock"))
    }
}

impl Drop for DiskProbe {
    fn drop(&mut self) {
        self.is_over.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            thread.thread().unpark();
            let _ = thread.join();
        }
    }
}
