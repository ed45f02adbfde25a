//! The admin port: `/livez`, `/readyz`, `/metrics`.
//!
//! `/livez` never depends on a dependency: restarting us would not mend the database. `/readyz` says what we wait for.

use std::collections::BTreeMap;
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

use super::config::ServiceConfig;
use super::metrics::Metrics;

/// Longer than any answer of a healthy process, shorter than a container platform's own patience.
const HEALTHCHECK_TIMEOUT: Duration = Duration::from_secs(3);

/// What this process waits for. Empty: it is ready.
#[derive(Clone, Default)]
pub struct Health(Arc<Mutex<BTreeMap<String, String>>>);

impl Health {
    /// `part` cannot work until `what` is there.
    pub fn waiting(&self, part: &str, what: impl Into<String>) {
        self.0.lock().expect("no holder panics").insert(part.to_owned(), what.into());
    }

    /// `part` works.
    pub fn ready(&self, part: &str) {
        self.0.lock().expect("no holder panics").remove(part);
    }
}

pub(crate) fn router(health: Health, metrics: Metrics) -> Router {
    Router::new()
        .route("/livez", routing::get(async || "alive\n"))
        .route("/readyz", routing::get(readyz).with_state(health))
        .route("/metrics", routing::get(page).with_state(metrics))
}

async fn readyz(State(health): State<Health>) -> impl IntoResponse {
    let waiting_for = health.0.lock().expect("no holder panics").clone();
    let status = if waiting_for.is_empty() { StatusCode::OK } else { StatusCode::SERVICE_UNAVAILABLE };
    (status, Json(json!({ "ready": waiting_for.is_empty(), "waiting_for": waiting_for })))
}

async fn page(State(metrics): State<Metrics>) -> impl IntoResponse {
    ([(header::CONTENT_TYPE, "application/openmetrics-text; version=1.0.0; charset=utf-8")], metrics.page())
}

/// The subcommand `healthcheck`: asks this service's own `/readyz`, for images that have no shell and no curl.
///
/// # Errors
/// The service does not answer, or answers that it waits for something; the message says for what.
pub async fn healthcheck(config: &ServiceConfig) -> anyhow::Result<()> {
    let mut addr = config.admin_addr;
    if addr.ip().is_unspecified() {
        addr.set_ip(std::net::Ipv4Addr::LOCALHOST.into());
    }
    let answer = timeout(HEALTHCHECK_TIMEOUT, async {
        let mut stream = TcpStream::connect(addr).await?;
        stream.write_all(b"GET /readyz HTTP/1.0\r\n\r\n").await?;
        let mut answer = String::new();
        stream.read_to_string(&mut answer).await.map(|_| answer)
    });
    let answer = answer.await.context("no answer in time")?.with_context(|| format!("cannot ask {addr}"))?;
    match answer.split_once("\r\n\r\n") {
        Some((head, _)) if head.contains(" 200 ") => Ok(()),
        Some((_, body)) => bail!("not ready: {body}"),
        None => bail!("not an HTTP answer"),
    }
}
