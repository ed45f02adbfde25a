//! The server of a port. It limits what a caller can hold: the time to send a request's head, the
//! time to take an answer, the size of a head, and the number of connections.
//!
//! hyper is used directly, because `axum::serve` sets no timer, so that none of hyper's time-outs
//! would fire. It serves HTTP/1 only: to distinguish HTTP/1 from HTTP/2, hyper would read the first
//! bytes without a time-out.

use std::sync::Arc;

use anyhow::Context;
use axum::Router;
use clap::Args;
use hyper::server::conn::http1;
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::service::TowerToHyperService;
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use prometheus_client::metrics::counter::Counter;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::task::JoinSet;
use tokio::time::{Duration, sleep, timeout};
use tokio_io_timeout::TimeoutStream;
use tokio_util::sync::CancellationToken;
use tower_http::add_extension::AddExtension;

use super::access::Peer;
use super::settings::number;

/// Bytes of a request's head, and of what is read ahead. A larger head is answered with 431.
const HEAD_LIMIT: usize = 16 * 1024;
/// How many connections beyond the limit are answered with 503 at the same time. Others are closed
/// without an answer, because each needs a file descriptor.
const REFUSALS: usize = 256;
/// How long a refused connection may take to send its head. Short, because few are answered.
const REFUSAL_TIMEOUT: Duration = Duration::from_secs(1);
/// The wait after a failed accept: the process has no free file descriptor.
const ACCEPT_RETRY: Duration = Duration::from_secs(1);
/// Open files besides the public connections: the admin port and refused connections, Kafka, the
/// database, the mail server, and the runtime.
const OTHER_FILES: u64 = 400;

/// The limits of a public port.
#[derive(Args, Clone, Debug)]
pub struct HttpConfig {
    /// How many connections callers may have open. Further ones are answered with 503. The process
    /// needs 400 further open files, and does not start if its hard limit (ulimit -Hn) is lower.
    #[arg(long, env, default_value_t = 512, value_parser = number::<u32>(1..=65_536))]
    pub http_connections: u32,
    /// How many requests are handled at the same time. Further ones are answered with 503. At most
    /// HTTP_CONNECTIONS.
    #[arg(long, env, default_value_t = 256, value_parser = number::<u32>(1..=65_536))]
    pub http_requests: u32,
    /// How long a caller may take to send the head of a request, and again for its body, in
    /// milliseconds. An idle connection is closed after the same time, so a load balancer must
    /// close its idle connections earlier.
    #[arg(long, env, default_value_t = 10_000, value_parser = number::<u64>(100..=600_000))]
    pub http_read_timeout_ms: u64,
}

impl HttpConfig {
    /// # Errors
    /// Two settings contradict each other.
    pub(crate) fn check(&self) -> anyhow::Result<()> {
        anyhow::ensure!(
            self.http_requests <= self.http_connections,
            "HTTP_REQUESTS is {} but HTTP_CONNECTIONS is only {}, so it would have no effect: lower HTTP_REQUESTS or \
             raise HTTP_CONNECTIONS",
            self.http_requests,
            self.http_connections
        );
        Ok(())
    }

    /// Raises the process's limit of open files, as far as the connections need it and the
    /// operating system allows it.
    ///
    /// # Errors
    /// The limit is too low for HTTP_CONNECTIONS.
    pub(crate) fn reserve_files(&self) -> anyhow::Result<()> {
        let needed = u64::from(self.http_connections) + OTHER_FILES;
        let (soft, hard) = getrlimit(Resource::RLIMIT_NOFILE).context("cannot read the limit of open files")?;
        let raised = needed.min(hard);
        let limit =
            if soft < raised && setrlimit(Resource::RLIMIT_NOFILE, raised, hard).is_ok() { raised } else { soft };
        anyhow::ensure!(
            limit >= needed,
            "HTTP_CONNECTIONS is {} and needs {needed} open files, but the limit of the process is {limit}: raise the limit \
             (ulimit -n) or lower HTTP_CONNECTIONS",
            self.http_connections
        );
        Ok(())
    }

    pub(crate) fn read_timeout(&self) -> Duration {
        Duration::from_millis(self.http_read_timeout_ms)
    }
}

/// A port, and the limits of its callers.
pub struct Server {
    pub routes: Router,
    /// Answers the connections beyond the limit.
    pub overloaded: Router,
    pub connections: usize,
    pub read_timeout: Duration,
    /// How long requests in progress may take after the stop.
    pub shutdown: Duration,
    /// Counts the connections beyond the limit.
    pub refused: Counter,
}

impl Server {
    /// Serves until the stop. Then it accepts no connection, closes the idle ones, and waits for
    /// the requests in progress.
    pub async fn run(self, listener: TcpListener, stop: CancellationToken) -> anyhow::Result<()> {
        let places = Arc::new(Semaphore::new(self.connections));
        let refusals = Arc::new(Semaphore::new(REFUSALS));
        let mut open = JoinSet::new();
        loop {
            let accepted = tokio::select! {
                () = stop.cancelled() => break,
                Some(_) = open.join_next() => continue,
                accepted = listener.accept() => accepted,
            };
            let (stream, peer) = match accepted {
                Ok((stream, address)) => (stream, Peer(address.ip())),
                Err(error) => {
                    tracing::warn!(%error, "cannot accept a connection; will retry");
                    stop.run_until_cancelled(sleep(ACCEPT_RETRY)).await;
                    continue;
                }
            };
            if let Ok(place) = Arc::clone(&places).try_acquire_owned() {
                open.spawn(connection(stream, peer, self.routes.clone(), self.read_timeout, place, stop.clone()));
                continue;
            }
            self.refused.inc();
            if let Ok(place) = Arc::clone(&refusals).try_acquire_owned() {
                open.spawn(connection(stream, peer, self.overloaded.clone(), REFUSAL_TIMEOUT, place, stop.clone()));
            }
        }
        drop(listener);
        let all = async { while open.join_next().await.is_some() {} };
        if timeout(self.shutdown, all).await.is_err() {
            tracing::warn!(connections = open.len(), "closing connections whose request did not end in time");
        }
        Ok(())
    }
}

/// Serves one connection. Errors are the caller's fault, so they are ignored: it broke the
/// connection, sent no HTTP, or was too slow.
async fn connection(
    stream: TcpStream,
    peer: Peer,
    routes: Router,
    read_timeout: Duration,
    _place: OwnedSemaphorePermit,
    stop: CancellationToken,
) {
    // Fails only on a connection that is broken already.
    let _ = stream.set_nodelay(true);
    let mut stream = TimeoutStream::new(stream);
    stream.set_write_timeout(Some(read_timeout));
    let serving = http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(read_timeout)
        .max_buf_size(HEAD_LIMIT)
        .serve_connection(TokioIo::new(Box::pin(stream)), TowerToHyperService::new(AddExtension::new(routes, peer)));
    let mut serving = std::pin::pin!(serving);
    tokio::select! {
        _ = serving.as_mut() => return,
        () = stop.cancelled() => serving.as_mut().graceful_shutdown(),
    }
    let _ = serving.await;
}
