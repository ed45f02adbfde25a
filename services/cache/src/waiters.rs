//! Requests that wait for a version that the view does not have yet. However many they are, the
//! view is read once per user and change. The consumer of this process reports the users whose
//! states it has written, and all requests that wait for one of these users share one read. If
//! another process consumes the user's partition, the requests share one poll.

use std::collections::{BTreeMap, HashMap};
use std::sync::{Arc, Mutex, MutexGuard};

use futures::StreamExt;
use futures::stream;
use shared::events::{Event, UserState};
use shared::messaging::{EndOfPartition, Failure, Handler, Outcome, Record};
use tokio::sync::{Notify, Semaphore, watch};
use tokio::time::{Duration, Instant, sleep_until, timeout};
use uuid::Uuid;

use crate::view::{Lookup, View};

/// How often the view is read for a user whose partition another process consumes.
const POLL_INTERVAL: Duration = Duration::from_millis(20);
/// The consumer of this process reports each partition that it has read to the end once a second.
/// After this time without a report, another process may have the partition.
const REPORT_IS_VALID: Duration = Duration::from_millis(2_500);
/// Reads in progress at the same time.
const READS: usize = 16;

/// The requests that wait. Clones share them.
#[derive(Clone)]
pub struct Waiters {
    /// One permit for each request that may wait.
    places: Arc<Semaphore>,
    shared: Arc<Mutex<Shared>>,
    /// Notified when there may be a user to read.
    work: Arc<Notify>,
}

#[derive(Default)]
struct Shared {
    users: HashMap<Uuid, Waited>,
    /// When the consumer of this process last reported each partition.
    reported_at: BTreeMap<i32, Instant>,
}

/// A user for whom requests wait.
struct Waited {
    /// The result of the last read.
    seen: watch::Sender<Seen>,
    /// Whether the view may have changed since the last read.
    changed: bool,
    poll_at: Instant,
}

#[derive(Clone, Default)]
enum Seen {
    #[default]
    Nothing,
    Entry(Arc<Lookup>),
    /// The store did not answer.
    Failed,
}

/// How a wait ended.
pub enum Ended {
    Found(Arc<Lookup>),
    TooLate,
    /// Too many requests wait already.
    TooMany,
    /// The store does not answer.
    Failed,
}

impl Waiters {
    /// At most `places` requests wait at the same time.
    pub fn new(places: u32) -> Self {
        let places = Arc::new(Semaphore::new(places as usize));
        Self { places, shared: Arc::default(), work: Arc::default() }
    }

    /// Waits at most `limit` until the view is complete and has this version of the user.
    pub async fn wait(&self, user: Uuid, min_version: i64, limit: Duration) -> Ended {
        let Ok(_place) = self.places.try_acquire() else { return Ended::TooMany };
        let mut seen = self.lock().join(user);
        self.work.notify_one();
        let is_end = |seen: &Seen| match seen {
            Seen::Nothing => false,
            Seen::Entry(found) => found.satisfies(min_version),
            Seen::Failed => true,
        };
        let end = timeout(limit, async { seen.wait_for(is_end).await.map(|seen| seen.clone()) }).await;
        match end {
            Ok(Ok(Seen::Entry(found))) => Ended::Found(found),
            Ok(Ok(Seen::Failed)) => Ended::Failed,
            // The time is over, or the process stops.
            Ok(Ok(Seen::Nothing) | Err(_)) | Err(_) => Ended::TooLate,
        }
    }

    /// Reads the view for the requests that wait.
    pub async fn run(self, view: View) -> anyhow::Result<()> {
        loop {
            let (due, next) = self.lock().take_due();
            if due.is_empty() {
                tokio::select! {
                    () = self.work.notified() => {}
                    () = sleep_until(next) => {}
                }
                continue;
            }
            let view = &view;
            let reads = stream::iter(due).map(async |user| (user, view.find(user).await));
            let mut reads = reads.buffer_unordered(READS);
            while let Some((user, found)) = reads.next().await {
                self.lock().publish(user, found);
            }
        }
    }

    /// The consumer of this process has written this user's state.
    fn written(&self, user: Uuid) {
        if let Some(waited) = self.lock().users.get_mut(&user) {
            waited.changed = true;
            self.work.notify_one();
        }
    }

    /// The consumer of this process has handled records of the partition, or has read it to its
    /// end.
    fn reported(&self, partition: i32) {
        self.lock().reported_at.insert(partition, Instant::now());
    }

    fn lock(&self) -> MutexGuard<'_, Shared> {
        self.shared.lock().expect("no thread panics while it holds the lock")
    }
}

impl Shared {
    /// Adds a request to those that wait for a user. The caller has read the view before, and the
    /// version may have arrived since then, so the first request for a user causes a read. A later
    /// one finds the result of the last read, and every change after that read causes another.
    fn join(&mut self, user: Uuid) -> watch::Receiver<Seen> {
        let new = || Waited { seen: watch::Sender::default(), changed: true, poll_at: Instant::now() };
        self.users.entry(user).or_insert_with(new).seen.subscribe()
    }

    /// The users that must be read now, and when to look again. Forgets users for whom no request
    /// waits any more.
    fn take_due(&mut self) -> (Vec<Uuid>, Instant) {
        let now = Instant::now();
        let mut next = now + REPORT_IS_VALID;
        let mut due = vec![];
        self.users.retain(|_, waited| waited.seen.receiver_count() > 0);
        for (user, waited) in &mut self.users {
            let reported_at = self.reported_at.get(&UserState::TOPIC.partition_of(*user));
            let ours_until = reported_at.map_or(now, |at| *at + REPORT_IS_VALID);
            if waited.changed || waited.poll_at.max(ours_until) <= now {
                due.push(*user);
                waited.changed = false;
                waited.poll_at = now + POLL_INTERVAL;
            }
            next = next.min(waited.poll_at.max(ours_until));
        }
        (due, next)
    }

    fn publish(&mut self, user: Uuid, found: anyhow::Result<Lookup>) {
        match found {
            Ok(found) => {
                if let Some(waited) = self.users.get(&user) {
                    waited.seen.send_replace(Seen::Entry(Arc::new(found)));
                }
            }
            Err(error) => {
                tracing::error!(error = %format!("{error:#}"), "Valkey does not answer");
                // All requests that wait for this user end. The next one begins from scratch.
                if let Some(waited) = self.users.remove(&user) {
                    waited.seen.send_replace(Seen::Failed);
                }
            }
        }
    }
}

/// The handler of the view, which also wakes the requests that wait for what it has written.
#[derive(Clone)]
pub struct Waking {
    view: View,
    waiters: Waiters,
}

impl Waking {
    pub fn new(view: View, waiters: Waiters) -> Self {
        Self { view, waiters }
    }
}

impl Handler for Waking {
    type Event = UserState;

    const GROUP: &'static str = View::GROUP;

    async fn dependency_works(&self) -> bool {
        self.view.dependency_works().await
    }

    async fn handle(&self, batch: &[Record<UserState>]) -> Result<Outcome, Failure> {
        let outcome = self.view.handle(batch).await?;
        for record in batch {
            self.waiters.reported(record.coordinates.partition);
            self.waiters.written(record.envelope.key);
        }
        Ok(outcome)
    }

    async fn resume_at(&self, partition: i32) -> anyhow::Result<Option<i64>> {
        self.view.resume_at(partition).await
    }

    async fn caught_up(&self, end: EndOfPartition) -> Result<(), Failure> {
        self.view.caught_up(end).await?;
        self.waiters.reported(end.partition);
        Ok(())
    }
}
