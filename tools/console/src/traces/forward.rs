//! Passes requests on to another collector, best effort. The queue has a fixed size, and no service
//! waits for it.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use axum::http::uri::PathAndQuery;
use bytes::Bytes;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc};
use tonic::client::Grpc;
use tonic::transport::{Channel, Endpoint};
use tonic::{Request, Status};

use super::wire::{EXPORT, Raw};

/// How long the other collector may take to accept a connection.
pub const CONNECT_LIMIT: Duration = Duration::from_secs(3);
/// How long it may take to answer a request.
pub const ANSWER_LIMIT: Duration = Duration::from_secs(5);
/// Requests and bytes that wait for the other collector: some seconds of a busy system.
const QUEUE: usize = 256;
const QUEUE_BYTES: usize = 4 * 1024 * 1024;

/// Puts requests into the queue. Clones share it.
#[derive(Clone)]
pub struct Forward {
    queue: mpsc::Sender<Waiting>,
    room: Arc<Semaphore>,
    losses: Arc<Losses>,
}

/// A request that waits, with its share of [`QUEUE_BYTES`].
struct Waiting {
    request: Bytes,
    _room: OwnedSemaphorePermit,
}

/// The other end of the queue.
pub struct Queue {
    waiting: mpsc::Receiver<Waiting>,
    losses: Arc<Losses>,
}

/// Requests that the other collector did not get. The first loss is logged. The next one is logged
/// only if the collector has accepted a request in between.
#[derive(Default)]
struct Losses {
    count: AtomicU64,
    is_reported: AtomicBool,
}

impl Forward {
    pub fn new() -> (Self, Queue) {
        let (queue, waiting) = mpsc::channel(QUEUE);
        let losses = Arc::new(Losses::default());
        let room = Arc::new(Semaphore::new(QUEUE_BYTES));
        (Self { queue, room, losses: losses.clone() }, Queue { waiting, losses })
    }

    /// Never waits: a request for which there is no room is lost.
    pub fn pass_on(&self, request: Bytes) {
        let size = u32::try_from(request.len()).unwrap_or(u32::MAX);
        let Ok(room) = self.room.clone().try_acquire_many_owned(size) else {
            return self.losses.add("the queue has no room for these bytes");
        };
        if self.queue.try_send(Waiting { request, _room: room }).is_err() {
            self.losses.add("the queue has no room for a request");
        }
    }

    /// How many requests the other collector did not get.
    pub fn lost(&self) -> u64 {
        self.losses.count.load(Ordering::Relaxed)
    }
}

impl Losses {
    fn add(&self, error: &str) {
        self.count.fetch_add(1, Ordering::Relaxed);
        if !self.is_reported.swap(true, Ordering::Relaxed) {
            tracing::warn!(error, "the collector of FORWARD_OTLP does not accept traces; dropping them until it does");
        }
    }

    fn end(&self) {
        if self.is_reported.swap(false, Ordering::Relaxed) {
            tracing::info!("the collector of FORWARD_OTLP accepts traces again");
        }
    }
}

/// Sends what is in the queue, one request after the other. A request is tried once: while the
/// other collector is down, retries would only fill the queue.
pub async fn forward(mut queue: Queue, target: Endpoint) -> anyhow::Result<()> {
    // Connects when it is needed, and again after a failure.
    let mut client = Grpc::new(target.connect_lazy());
    while let Some(Waiting { request, _room }) = queue.waiting.recv().await {
        match send(&mut client, request).await {
            Ok(()) => queue.losses.end(),
            Err(status) => queue.losses.add(&format!("{:?}: {}", status.code(), status.message())),
        }
    }
    Ok(())
}

async fn send(client: &mut Grpc<Channel>, request: Bytes) -> Result<(), Status> {
    let sent = async {
        client.ready().await.map_err(|error| Status::unavailable(error.to_string()))?;
        client.unary(Request::new(request), PathAndQuery::from_static(EXPORT), Raw).await.map(drop)
    };
    // The limit of the endpoint begins when there is a connection.
    let limited = tokio::time::timeout(CONNECT_LIMIT + ANSWER_LIMIT, sent).await;
    limited.unwrap_or_else(|_| Err(Status::deadline_exceeded("no answer in time")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_target_that_takes_nothing_fills_a_queue_of_fixed_size() {
        let (forward, mut queue) = Forward::new();
        let large = Bytes::from(vec![0; QUEUE_BYTES / 4]);
        (0..10).for_each(|_| forward.pass_on(large.clone()));
        assert_eq!(forward.lost(), 6, "four fit");
        while queue.waiting.try_recv().is_ok() {}
        (0..QUEUE + 5).for_each(|_| forward.pass_on(Bytes::from_static(b"x")));
        assert_eq!(forward.lost(), 6 + 5, "there is room again, for so many");
    }
}
