//! The admin port: `/livez`, `/readyz`, `/metrics`.
//!
//! `/livez` does not check any dependency, because a restart would not repair the database.
//! `/readyz` lists the components of the process that wait, and what each waits for.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex};

use anyhow::{Context, bail};
use axum::extract::State;
use axum::http::{StatusCode, header};
use axum::response::IntoResponse;
use axum::{Json, Router, routing};
use serde_json::json;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::time::{Duration, timeout};

use super::metrics::Metrics;

/// Longer than a healthy process needs to answer, and shorter than the health-check time-out of
/// container platforms.
const HEALTHCHECK_TIMEOUT: Duration = Duration::from_secs(3);
const LOCK: &str = "no thread panics while it holds the lock";

/// The components of this process that wait, each with what it waits for. The process is ready when
/// there are none.
#[derive(Clone, Default)]
pub struct Health(Arc<Mutex<BTreeMap<String, String>>>);

impl Health {
    /// Reports that `component` waits for `what`.
    pub fn waiting(&self, component: &str, what: impl Into<String>) {
        self.0.lock().expect(LOCK).insert(component.to_owned(), what.into());
    }

    /// Reports that `component` waits for nothing.
    pub fn ready(&self, component: &str) {
        self.0.lock().expect(LOCK).remove(component);
    }
}

pub(crate) fn router(health: Health, metrics: Metrics) -> Router {
    Router::new()
        .route("/livez", routing::get(async || "alive\n"))
        .route("/readyz", routing::get(readyz).with_state(health))
        .route("/metrics", routing::get(page).with_state(metrics))
}

async fn readyz(State(health): State<Health>) -> impl IntoResponse {
    let waiting_for = health.0.lock().expect(LOCK).clone();
    let status = if waiting_for.is_empty() { StatusCode::OK } else { StatusCode::SERVICE_UNAVAILABLE };
    (status, Json(json!({ "ready": waiting_for.is_empty(), "waiting_for": waiting_for })))
}

async fn page(State(metrics): State<Metrics>) -> impl IntoResponse {
    ([(header::CONTENT_TYPE, "application/openmetrics-text; version=1.0.0; charset=utf-8")], metrics.page())
}

/// The subcommand `healthcheck`: requests `/readyz` at `admin_addr`. It serves as the health check
/// of images that have neither a shell nor curl.
///
/// # Errors
/// The service does not answer, or it is not ready; then the message says what it waits for.
pub async fn healthcheck(admin_addr: SocketAddr) -> anyhow::Result<()> {
    let mut addr = admin_addr;
    if addr.ip().is_unspecified() {
        addr.set_ip(std::net::Ipv4Addr::LOCALHOST.into());
    }
    let answer = timeout(HEALTHCHECK_TIMEOUT, async {
        let mut stream = TcpStream::connect(addr).await?;
        stream.write_all(b"GET /readyz HTTP/1.0\r\n\r\n").await?;
        let mut answer = String::new();
        stream.read_to_string(&mut answer).await.map(|_| answer)
    });
    let answer = answer
        .await
        .with_context(|| format!("{addr} did not answer within {HEALTHCHECK_TIMEOUT:?}"))?
        .with_context(|| format!("cannot connect to {addr}: is the service running, and is ADMIN_ADDR the same?"))?;
    match answer.split_once("\r\n\r\n") {
        Some((head, _)) if head.contains(" 200 ") => Ok(()),
        Some((_, body)) => bail!("the service is not ready: {body}"),
        None => bail!("{addr} did not answer with HTTP: check ADMIN_ADDR"),
    }
}
