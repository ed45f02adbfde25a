//! What every public HTTP route gets: a request id, a span in the caller's trace, a latency metric,
//! a check of the caller, limits of time, size and number, and errors as problem documents.

use std::sync::Arc;

use axum::Router;
use axum::body::{self, Body, HttpBody};
use axum::extract::{MatchedPath, Request, State};
use axum::http::{HeaderMap, HeaderName, HeaderValue, Method, header};
use axum::middleware::{self, Next};
use axum::response::{IntoResponse, Response};
use http_body_util::LengthLimitError;
use tokio::sync::Semaphore;
use tokio::time::{Duration, Instant, timeout};
use tokio_util::sync::CancellationToken;
use tower_http::catch_panic::CatchPanicLayer;
use tracing::{Instrument, field::Empty};
use tracing_opentelemetry::OpenTelemetrySpanExt;
use uuid::Uuid;

use super::access::{Gate, PublicRoutes, admit};
use super::metrics::{Exemplars, Metrics, RequestLabels, TracedHistograms, observe};
use super::problem::{self, internal_error, problem, retry_later};
use super::telemetry::{self, TraceContext};
use crate::events;

/// Longer than every time-out of the database, so that its error, which is more specific, comes
/// first.
const REQUEST_TIMEOUT: Duration = Duration::from_secs(10);
/// Bytes. The largest valid body holds an address and a name.
const BODY_LIMIT: usize = 16 * 1024;
const REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");
/// Characters. Longer than the ids of common proxies and tracers.
const REQUEST_ID_MAX: usize = 128;

/// What the layers of a public port need.
#[derive(Clone)]
pub(crate) struct Layers {
    pub metrics: Metrics,
    pub gate: Gate,
    /// The setting TRUST_TRACE_CONTEXT.
    pub trust_trace_context: bool,
    /// How long a caller may take to send a body.
    pub body_timeout: Duration,
    /// How many requests are handled at the same time.
    pub requests: usize,
    /// Cancelled when the process is about to stop.
    pub draining: CancellationToken,
}

/// Adds to a service's routes what every public route gets. The first layer of a tuple is the
/// outermost. For each [`Router::layer`] axum copies and boxes all layers within it on every
/// request, so layers that belong together are added together.
pub(crate) fn layered(routes: PublicRoutes, layers: &Layers) -> Router {
    let requests = Arc::new(Semaphore::new(layers.requests));
    let routes = routes
        .into_router()
        .fallback(async || problem(problem::NO_SUCH_RESOURCE, "no such resource"))
        .method_not_allowed_fallback(async || {
            problem(problem::METHOD_NOT_ALLOWED, "the resource does not support this method")
        })
        .layer((
            // Before the body is read, so that a refused caller cannot make the service wait for it.
            middleware::from_fn_with_state(Arc::new(layers.gate.clone()), admit),
            middleware::from_fn_with_state(layers.body_timeout, with_whole_body),
            middleware::from_fn_with_state(requests, limited),
        ));
    observed_by(routes, layers)
}

/// Limits the size of a request's body, and the time that it takes to arrive.
pub(crate) fn with_whole_bodies(routes: Router, limit: Duration) -> Router {
    routes.layer(middleware::from_fn_with_state(limit, with_whole_body))
}

/// The routes of connections beyond the limit: each request is answered with 503.
pub(crate) fn overloaded() -> Router {
    Router::new().fallback(async || ([(header::CONNECTION, "close")], too_many("connections")))
}

/// Adds the span, the metric and the id of each request. A panic is answered with 500.
pub(crate) fn observed_by(routes: Router, layers: &Layers) -> Router {
    routes.layer((
        middleware::from_fn_with_state(layers.draining.clone(), identify),
        middleware::from_fn_with_state(Arc::new(Observer::of(layers)), observed),
        CatchPanicLayer::custom(|_| internal_error().into_response()),
    ))
}

/// Gives every request an id: that of the caller, if it is usable, or a new one. The answer carries
/// it in `x-request-id`, and every log line of the request in its span. While the process drains,
/// answers also ask callers to close the connection.
pub(crate) fn identified(routes: Router, draining: CancellationToken) -> Router {
    routes.layer(middleware::from_fn_with_state(draining, identify))
}

#[derive(Clone)]
struct RequestId(HeaderValue);

/// What [`observed`] needs. Axum clones the state of each layer for each request, so this is in an
/// `Arc`, and not the many counters of [`Metrics`].
struct Observer {
    http_requests: TracedHistograms<RequestLabels>,
    exemplars: Exemplars,
    trust_trace_context: bool,
}

impl Observer {
    fn of(layers: &Layers) -> Self {
        Self {
            http_requests: layers.metrics.http_requests.clone(),
            exemplars: layers.metrics.exemplars,
            trust_trace_context: layers.trust_trace_context,
        }
    }
}

async fn identify(State(draining): State<CancellationToken>, mut request: Request, next: Next) -> Response {
    let id = request_id(request.headers());
    request.extensions_mut().insert(RequestId(id.clone()));
    let mut response = next.run(request).await;
    response.headers_mut().insert(REQUEST_ID, id);
    if draining.is_cancelled() {
        response.headers_mut().insert(header::CONNECTION, HeaderValue::from_static("close"));
    }
    response
}

/// The caller's id if it is one line of 1 to 128 visible ASCII characters: it is written to the
/// log.
fn request_id(headers: &HeaderMap) -> HeaderValue {
    let mut lines = headers.get_all(REQUEST_ID).into_iter();
    let usable = |id: &&HeaderValue| {
        let bytes = id.as_bytes();
        (1..=REQUEST_ID_MAX).contains(&bytes.len()) && bytes.iter().all(u8::is_ascii_graphic)
    };
    match (lines.next().filter(usable), lines.next()) {
        (Some(id), None) => id.clone(),
        _ => HeaderValue::try_from(Uuid::new_v4().to_string()).expect("a UUID is a valid header"),
    }
}

/// The span and the metric of a request.
async fn observed(State(observer): State<Arc<Observer>>, request: Request, next: Next) -> Response {
    let started = Instant::now();
    let matched = request.extensions().get::<MatchedPath>();
    let route = matched.map_or("none", MatchedPath::as_str).to_owned(); // never the path, which contains what users type
    let method = method_label(request.method());
    let id = request.extensions().get::<RequestId>().and_then(|RequestId(id)| id.to_str().ok()).unwrap_or_default();
    let span = tracing::error_span!(
        "request",
        "otel.kind" = "server",
        http.request.method = %method,
        http.route = %route,
        request.id = %id,
        trace.id = Empty,
    );
    let caller = trace_context(request.headers());
    if observer.trust_trace_context {
        telemetry::continue_from(&span, &caller);
    } else {
        // Text that a stranger chose must not reach the outbox, where it would be kept with the
        // event.
        telemetry::continue_from(&span, &TraceContext::default());
        telemetry::link(&span, &TraceContext { tracestate: None, ..caller });
    }
    let response = next.run(request).instrument(span.clone()).await;
    let status = response.status().as_u16();
    // Not a field of the span: the log layer would format all fields of the span again.
    span.set_attribute("http.response.status_code", i64::from(status));
    span.in_scope(|| tracing::debug!(http.response.status_code = status, "request answered"));
    let labels = RequestLabels { method, route, status };
    let took = started.elapsed().as_secs_f64();
    observe(&observer.http_requests.get_or_create(&labels), took, observer.exemplars.of(&span));
    response
}

/// HTTP allows any word as a method. A label has only known methods, so that callers cannot create
/// series.
fn method_label(method: &Method) -> &'static str {
    match *method {
        Method::GET => "GET",
        Method::POST => "POST",
        Method::PUT => "PUT",
        Method::PATCH => "PATCH",
        Method::DELETE => "DELETE",
        Method::HEAD => "HEAD",
        Method::OPTIONS => "OPTIONS",
        _ => "other",
    }
}

fn trace_context(headers: &HeaderMap) -> TraceContext {
    let text = |name: &str| headers.get(name).and_then(|value| value.to_str().ok());
    let (traceparent, tracestate) = events::trace_context(text("traceparent"), text("tracestate"));
    TraceContext { traceparent: traceparent.map(str::to_owned), tracestate: tracestate.map(str::to_owned) }
}

/// Reads the whole body before the request is handled. A slow caller occupies its connection, and
/// none of the places for requests.
async fn with_whole_body(State(limit): State<Duration>, request: Request, next: Next) -> Response {
    if request.body().is_end_stream() {
        return next.run(request).await;
    }
    let (parts, body) = request.into_parts();
    let too_large =
        || problem(problem::BODY_TOO_LARGE, format!("the body may have at most {BODY_LIMIT} bytes")).into_response();
    if body.size_hint().lower() > BODY_LIMIT as u64 {
        return too_large();
    }
    match timeout(limit, body::to_bytes(body, BODY_LIMIT)).await {
        Ok(Ok(body)) => next.run(Request::from_parts(parts, Body::from(body))).await,
        Ok(Err(error)) if std::error::Error::source(&error).is_some_and(|source| source.is::<LengthLimitError>()) => {
            too_large()
        }
        Ok(Err(_)) => {
            problem(problem::BODY_INCOMPLETE, "the body ended early or is not chunked correctly").into_response()
        }
        Err(_) => {
            let detail = format!("the body did not arrive within {limit:?}; send the request again");
            ([(header::CONNECTION, "close")], problem(problem::BODY_TOO_SLOW, detail)).into_response()
        }
    }
}

/// Limits how many requests are handled at the same time, and for how long. A request that exceeds
/// the time may have taken effect, as after any lost answer. With an `Idempotency-Key` it is safe
/// to retry.
async fn limited(State(requests): State<Arc<Semaphore>>, request: Request, next: Next) -> Response {
    let Ok(_place) = requests.try_acquire() else { return too_many("requests") };
    let answer = timeout(REQUEST_TIMEOUT, next.run(request)).await;
    answer.unwrap_or_else(|_| problem(problem::TOOK_TOO_LONG, "the request took too long; retry it").into_response())
}

fn too_many(what: &str) -> Response {
    retry_later(problem::OVERLOADED, format!("the service has too many {what}; retry the request"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_request_keeps_the_id_of_its_caller_unless_it_is_unusable() {
        let id_of = |lines: &[&str]| {
            let mut headers = HeaderMap::new();
            for line in lines {
                headers.append(REQUEST_ID, HeaderValue::from_bytes(line.as_bytes()).unwrap());
            }
            request_id(&headers).to_str().unwrap().to_owned()
        };
        let longest = "a".repeat(REQUEST_ID_MAX);
        for usable in ["abc-1", &longest] {
            assert_eq!(id_of(&[usable]), usable);
        }
        assert_eq!(id_of(&[]).len(), 36, "a UUID");
        assert_eq!(id_of(&["a", "b"]).len(), 36, "a UUID for two lines");
        for unusable in ["", "a b", "é", &format!("{longest}a")] {
            assert_eq!(id_of(&[unusable]).len(), 36, "a UUID for {unusable:?}");
        }
    }
}
