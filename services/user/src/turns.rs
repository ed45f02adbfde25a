//! Limits on the commands that are in progress. A command keeps its database session while it waits for
//! a lock. Without limits the callers of one locked user would occupy all sessions, and every other
//! request would wait for a session in vain.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard};

use shared::platform::database::POOL_SIZE;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::time::{Duration, timeout};
use uuid::Uuid;

use crate::problem::Error;

/// Commands in progress on one user, or with one key, in this process: one works and two wait for its
/// locks. Further ones are refused at once.
const PER_TARGET: usize = 3;
/// Sessions of the pool that commands leave to other statements, whatever the commands wait for.
const SESSIONS_FOR_READS: u32 = 3;
/// How long a command waits for a session, as long as a read does.
const SESSION_TIMEOUT: Duration = Duration::from_secs(3);

/// What a command locks.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Target {
    User(Uuid),
    /// An `Idempotency-Key` with its scope.
    Key(String),
}

#[derive(Clone)]
pub struct Turns {
    sessions: Arc<Semaphore>,
    in_progress: InProgress,
}

type InProgress = Arc<Mutex<HashMap<Target, usize>>>;

/// Keep it until the transaction of the command has ended.
pub struct Turn {
    _places: Places,
    _session: OwnedSemaphorePermit,
}

/// The places of one command. Dropping it frees them.
struct Places {
    targets: Vec<Target>,
    in_progress: InProgress,
}

impl Turns {
    pub fn new() -> Self {
        let sessions = (POOL_SIZE - SESSIONS_FOR_READS) as usize;
        Self { sessions: Arc::new(Semaphore::new(sessions)), in_progress: InProgress::default() }
    }

    /// # Errors
    /// [`Error::Busy`], or no session becomes free.
    pub async fn take(&self, targets: Vec<Target>) -> Result<Turn, Error> {
        let places = Places::take(targets, &self.in_progress)?;
        let session = timeout(SESSION_TIMEOUT, Arc::clone(&self.sessions).acquire_owned()).await;
        let session = session.map_err(|_| sqlx::Error::PoolTimedOut)?.map_err(anyhow::Error::new)?;
        Ok(Turn { _places: places, _session: session })
    }
}

impl Places {
    fn take(targets: Vec<Target>, in_progress: &InProgress) -> Result<Self, Error> {
        let mut counts = lock(in_progress);
        if targets.iter().any(|target| counts.get(target).is_some_and(|count| *count >= PER_TARGET)) {
            return Err(Error::Busy);
        }
        for target in &targets {
            *counts.entry(target.clone()).or_default() += 1;
        }
        drop(counts);
        Ok(Self { targets, in_progress: Arc::clone(in_progress) })
    }
}

impl Drop for Places {
    fn drop(&mut self) {
        let mut counts = lock(&self.in_progress);
        for target in &self.targets {
            if let Some(count) = counts.get_mut(target) {
                *count -= 1;
                if *count == 0 {
                    counts.remove(target);
                }
            }
        }
    }
}

fn lock(in_progress: &InProgress) -> MutexGuard<'_, HashMap<Target, usize>> {
    in_progress.lock().expect("no thread panics while it holds the lock")
}

#[cfg(test)]
mod tests {
    use shared::events::mint_id;

    use super::*;

    #[test]
    fn three_commands_on_one_target_are_in_progress_and_others_are_refused() {
        let in_progress = InProgress::default();
        let [ada, grace] = [(); 2].map(|()| Target::User(mint_id()));
        let key = |number: usize| Target::Key(format!("key {number}"));
        let mut places = vec![];
        for number in 0..PER_TARGET {
            places.push(Places::take(vec![ada.clone(), key(number)], &in_progress).unwrap());
        }
        assert!(matches!(Places::take(vec![key(9), ada.clone()], &in_progress), Err(Error::Busy)));
        assert!(Places::take(vec![grace, key(0)], &in_progress).is_ok());
        drop(places.pop());
        places.push(Places::take(vec![ada], &in_progress).unwrap());
        drop(places);
        assert!(lock(&in_progress).is_empty(), "targets without commands are forgotten");
    }
}
