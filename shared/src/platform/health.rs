//! The admin port: `/livez`, `/readyz`, `/status`, `/metrics`, `/metrics/descriptions`. The
//! messaging layer adds what operators need about consumers.
//!
//! `/livez` does not check any dependency, because a restart would not repair the database.
//! `/readyz` is for load balancers: whether this process can answer its own public requests.
//! `/status` is for people and tools: everything that the process waits for. A consumer that waits
//! for Kafka is in `/status` only: if it were in `/readyz`, an outage of Kafka would take every
//! replica out of the load balancer although all of them can answer.

use std::collections::BTreeMap;
use std::fmt::Write;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, MutexGuard};

use anyhow::{Context, bail};
use axum::extract::State;
use axum::http::{HeaderMap, StatusCode, header};
use axum::response::{IntoResponse, Response};
use axum::{Json, Router, routing};
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::time::{Duration, timeout};

use super::metrics::Metrics;

/// Longer than a healthy process needs to answer, and shorter than the health-check time-out of
/// container platforms.
const HEALTHCHECK_TIMEOUT: Duration = Duration::from_secs(3);

/// What the process waits for, by component.
#[derive(Clone, Default)]
pub struct Health(Arc<Mutex<Reasons>>);

#[derive(Clone, Default)]
struct Reasons {
    /// Why the process cannot answer its own requests.
    waiting: BTreeMap<String, String>,
    /// What else the process waits for.
    reported: BTreeMap<String, String>,
}

impl Health {
    /// Reports that `component` waits for `what`, and that the process cannot answer its own
    /// requests until then. Shown in `/readyz` and `/status`.
    pub fn waiting(&self, component: &str, what: impl Into<String>) {
        self.lock().waiting.insert(component.to_owned(), what.into());
    }

    /// Withdraws what [`Health::waiting`] has reported about `component`.
    pub fn ready(&self, component: &str) {
        self.lock().waiting.remove(component);
    }

    /// Reports that `component` waits for something that the answers to requests do not need.
    /// Shown in `/status` only.
    pub fn report(&self, component: &str, reason: impl Into<String>) {
        self.lock().reported.insert(component.to_owned(), reason.into());
    }

    /// Withdraws what [`Health::report`] has reported about `component`.
    pub fn resolved(&self, component: &str) {
        self.lock().reported.remove(component);
    }

    /// How many components wait.
    fn count(&self) -> usize {
        let Reasons { waiting, reported } = &*self.lock();
        let twice = waiting.keys().filter(|component| reported.contains_key(*component)).count();
        waiting.len() + reported.len() - twice
    }

    fn lock(&self) -> MutexGuard<'_, Reasons> {
        self.0.lock().expect("no thread panics while it holds the lock")
    }
}

/// The routes of an admin port that reports the health and the metrics of its process.
pub fn router(health: Health, metrics: Metrics) -> Router {
    Router::new()
        .route("/livez", routing::get(async || "alive\n"))
        .route("/readyz", routing::get(readyz).with_state(health.clone()))
        .route("/status", routing::get(status).with_state(health.clone()))
        .route("/metrics/descriptions", routing::get(descriptions).with_state(metrics.clone()))
        .route("/metrics", routing::get(page).with_state((health, metrics)))
}

async fn readyz(State(health): State<Health>) -> impl IntoResponse {
    let waiting_for = health.lock().waiting.clone();
    let ready = waiting_for.is_empty();
    (status_code(ready), Json(json!({ "ready": ready, "waiting_for": waiting_for })))
}

/// Text, with one line per component, or JSON for callers that prefer it.
async fn status(State(health): State<Health>, headers: HeaderMap) -> Response {
    let Reasons { waiting, reported } = health.lock().clone();
    let mut waiting_for = reported;
    waiting_for.extend(waiting);
    let ok = waiting_for.is_empty();
    let mut response = if prefers_json(&headers) {
        Json(json!({ "ok": ok, "waiting_for": waiting_for })).into_response()
    } else if ok {
        "ok\n".into_response()
    } else {
        let mut text = "waiting for\n".to_owned();
        for (component, reason) in waiting_for {
            writeln!(text, "  {component}: {reason}").expect("writing to a string does not fail");
        }
        text.into_response()
    };
    *response.status_mut() = status_code(ok);
    response
}

fn status_code(ok: bool) -> StatusCode {
    if ok { StatusCode::OK } else { StatusCode::SERVICE_UNAVAILABLE }
}

/// Whether `Accept` gives JSON a higher quality than text. A caller without a preference gets text.
fn prefers_json(headers: &HeaderMap) -> bool {
    let lines = headers.get_all(header::ACCEPT).into_iter().filter_map(|value| value.to_str().ok());
    let ranges: Vec<(String, f32)> = lines.flat_map(|line| line.split(',')).map(media_range).collect();
    let quality = |names: [&str; 3]| {
        let named = |name: &str| ranges.iter().find(|(range, _)| range == name).map(|(_, quality)| *quality);
        names.into_iter().find_map(named).unwrap_or(0.0)
    };
    quality(["application/json", "application/*", "*/*"]) > quality(["text/plain", "text/*", "*/*"])
}

/// The lower-case media range, and its quality (RFC 9110 §12.4.2).
fn media_range(text: &str) -> (String, f32) {
    let mut parts = text.split(';').map(|part| part.trim().to_ascii_lowercase());
    let range = parts.next().unwrap_or_default();
    let quality = parts.find_map(|part| part.strip_prefix("q=").map(|quality| quality.parse().unwrap_or(0.0)));
    (range, quality.unwrap_or(1.0))
}

/// What each metric of this process means, as JSON. `docs/metrics.md` is written from it.
async fn descriptions(State(metrics): State<Metrics>) -> impl IntoResponse {
    Json(metrics.descriptions())
}

/// Prometheus reads exemplars only if the content type is that of OpenMetrics.
async fn page(State((health, metrics)): State<(Health, Metrics)>) -> impl IntoResponse {
    metrics.waiting_components.set(health.count() as i64);
    ([(header::CONTENT_TYPE, "application/openmetrics-text; version=1.0.0; charset=utf-8")], metrics.page())
}

/// The subcommand `healthcheck`: requests `/status` at `admin_addr`. It serves as the health check
/// of images that have neither a shell nor curl.
///
/// # Errors
/// The service does not answer, or it waits for something; then the message says for what.
pub async fn healthcheck(admin_addr: SocketAddr) -> anyhow::Result<()> {
    match ask(admin_addr, "GET", "/status", "", None, HEALTHCHECK_TIMEOUT).await? {
        (200, _) => Ok(()),
        (_, body) => bail!("the service runs, and waits: {body}"),
    }
}

/// Sends a request to the admin port of the running service, with these header lines. Returns the
/// status and the body.
///
/// # Errors
/// The service does not answer in time, or not with HTTP.
pub(crate) async fn ask(
    admin_addr: SocketAddr,
    method: &str,
    path: &str,
    headers: &str,
    body: Option<&Value>,
    limit: Duration,
) -> anyhow::Result<(u16, String)> {
    let answer = timeout(limit, async {
        let mut stream = send(admin_addr, method, path, headers, body, limit).await?;
        let mut answer = String::new();
        stream.read_to_string(&mut answer).await.context("the connection to the service was lost")?;
        anyhow::Ok(answer)
    });
    let answer = answer.await.with_context(|| format!("{admin_addr} did not answer within {limit:?}"))??;
    let parsed = answer.split_once("\r\n\r\n").and_then(|(head, body)| {
        let status = head.split(' ').nth(1)?.parse().ok()?;
        Some((status, body.to_owned()))
    });
    parsed.with_context(|| format!("{admin_addr} did not answer with HTTP: check ADMIN_ADDR"))
}

/// Sends a request to the admin port, as [`ask`] does, and returns the connection, from which the
/// answer can be read. The service closes it after the answer.
///
/// # Errors
/// The service cannot be reached in time.
pub(crate) async fn send(
    admin_addr: SocketAddr,
    method: &str,
    path: &str,
    headers: &str,
    body: Option<&Value>,
    limit: Duration,
) -> anyhow::Result<TcpStream> {
    let mut addr = admin_addr;
    if addr.ip().is_unspecified() {
        addr.set_ip(std::net::Ipv4Addr::LOCALHOST.into());
    }
    let body = body.map(Value::to_string).unwrap_or_default();
    let request = format!(
        "{method} {path} HTTP/1.0\r\n{headers}content-type: application/json\r\ncontent-length: {}\r\n\r\n{body}",
        body.len()
    );
    let sent = timeout(limit, async {
        let mut stream = TcpStream::connect(addr).await?;
        stream.write_all(request.as_bytes()).await.map(|()| stream)
    });
    sent.await
        .with_context(|| format!("{addr} did not answer within {limit:?}"))?
        .with_context(|| format!("cannot connect to {addr}: is the service running, and is ADMIN_ADDR the same?"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_caller_gets_json_only_if_it_prefers_json() {
        let prefers = |accept: &[&'static str]| {
            let mut headers = HeaderMap::new();
            for line in accept {
                headers.append(header::ACCEPT, line.parse().unwrap());
            }
            prefers_json(&headers)
        };
        for json in ["application/json", "Application/JSON; q=0.5", "text/plain;q=0.1, application/*", "text/*;q=0,*/*"]
        {
            assert!(prefers(&[json]), "{json}");
        }
        assert!(prefers(&["text/html", "application/json"]));
        for text in ["*/*", "text/html,*/*;q=0.8", "text/plain, application/json", "application/json;q=0", "json", ""] {
            assert!(!prefers(&[text]), "{text}");
        }
        assert!(!prefers(&[]));
    }
}
