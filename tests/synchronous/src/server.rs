//! The HTTP server of every role: limits on the time, size and number of requests, `/readyz`,
//! `/metrics`, and a graceful shutdown.

use std::net::SocketAddr;
use std::sync::{Arc, Mutex};

use anyhow::Context;
use axum::extract::{DefaultBodyLimit, Request, State};
use axum::http::StatusCode;
use axum::middleware::{self, Next};
use axum::response::{IntoResponse, Response};
use axum::serve::ListenerExt;
use axum::{Router, routing};
use prometheus_client::encoding::text::encode;
use prometheus_client::registry::Registry;
use tokio::net::TcpListener;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::Semaphore;
use tokio::time::{Duration, timeout};
use tokio_util::task::TaskTracker;

/// Time-out of a request, as in Waybill. It is longer than all calls of a registration together.
pub const REQUEST_TIMEOUT: Duration = Duration::from_secs(10);
/// Requests that are handled at the same time, as in Waybill.
const REQUESTS: usize = 256;
/// Bytes of a request's body, as in Waybill.
const BODY_LIMIT: usize = 16 * 1024;
/// How long a stop waits for the registrations in progress.
const STOP_LIMIT: Duration = Duration::from_secs(8);

/// Serves until SIGTERM. Then it finishes the requests in progress and the work in `tasks`.
pub async fn serve(addr: SocketAddr, routes: Router, metrics: Registry, tasks: TaskTracker) -> anyhow::Result<()> {
    let metrics = Arc::new(Mutex::new(metrics));
    let admin = Router::new()
        .route("/readyz", routing::get(async || StatusCode::OK))
        .route("/metrics", routing::get(page))
        .with_state(metrics);
    let limits = Arc::new(Semaphore::new(REQUESTS));
    let routes = routes.layer(DefaultBodyLimit::max(BODY_LIMIT)).layer(middleware::from_fn_with_state(limits, limited));
    let listener = TcpListener::bind(addr).await.with_context(|| format!("HTTP_ADDR: cannot listen on {addr}"))?;
    // Answers are not held back until there is more to send.
    let listener = listener.tap_io(|stream| {
        let _ = stream.set_nodelay(true);
    });
    let mut terminated = signal(SignalKind::terminate())?;
    let stopped = async move {
        terminated.recv().await;
    };
    axum::serve(listener, routes.merge(admin)).with_graceful_shutdown(stopped).await?;
    tasks.close();
    if timeout(STOP_LIMIT, tasks.wait()).await.is_err() {
        tracing::warn!(registrations = tasks.len(), "stopped before the calls of some registrations had ended");
    }
    Ok(())
}

async fn page(State(metrics): State<Arc<Mutex<Registry>>>) -> Response {
    let mut page = String::new();
    let encoded = encode(&mut page, &metrics.lock().expect("no thread panics while it holds this lock"));
    if encoded.is_ok() { page.into_response() } else { StatusCode::INTERNAL_SERVER_ERROR.into_response() }
}

/// A request that exceeds the time may have taken effect, as after any lost answer.
async fn limited(State(requests): State<Arc<Semaphore>>, request: Request, next: Next) -> Response {
    let Ok(_place) = requests.try_acquire() else { return StatusCode::SERVICE_UNAVAILABLE.into_response() };
    let answer = timeout(REQUEST_TIMEOUT, next.run(request)).await;
    answer.unwrap_or_else(|_| StatusCode::SERVICE_UNAVAILABLE.into_response())
}
