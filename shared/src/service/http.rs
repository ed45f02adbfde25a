//! What every public HTTP route gets: a request id, a span in the caller's trace, a latency metric, a time limit, a size
//! limit, and a problem (RFC 9457) instead of a plain-text error.

use axum::Router;
use axum::extract::rejection::{JsonRejection, PathRejection, QueryRejection};
use axum::extract::{DefaultBodyLimit, MatchedPath, Request, State};
use axum::http::{HeaderMap, HeaderName, Method, StatusCode};
use axum::middleware::{self, Next};
use axum::response::{IntoResponse, Response};
use problem_details::ProblemDetails;
use tokio::time::{Duration, Instant, timeout};
use tower_http::catch_panic::CatchPanicLayer;
use tower_http::request_id::{MakeRequestUuid, PropagateRequestIdLayer, SetRequestIdLayer};
use tracing::{Instrument, field::Empty};

use super::metrics::{self, Metrics};
use super::telemetry::{self, TraceContext};

/// Longer than every database time-out, so that the more telling error wins.
const REQUEST_TIMEOUT: Duration = Duration::from_secs(10);
/// Bytes. The largest honest body is an address and a name.
const BODY_LIMIT: usize = 16 * 1024;
const REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");

/// Wraps a service's routes in what every public route gets.
pub(crate) fn layered(routes: Router, metrics: Metrics) -> Router {
    routes
        .fallback(async || problem(StatusCode::NOT_FOUND, "there is no such resource"))
        .method_not_allowed_fallback(async || {
            problem(StatusCode::METHOD_NOT_ALLOWED, "the resource exists, but not with this method")
        })
        .layer(DefaultBodyLimit::max(BODY_LIMIT))
        .layer(CatchPanicLayer::custom(|_| internal()))
        .layer(middleware::from_fn_with_state(metrics, observed))
        .layer(PropagateRequestIdLayer::new(REQUEST_ID))
        .layer(SetRequestIdLayer::new(REQUEST_ID, MakeRequestUuid))
}

/// A problem with its status, the status' name as title, and what the caller can do as detail.
pub fn problem(status: StatusCode, detail: impl Into<String>) -> ProblemDetails {
    ProblemDetails::from_status_code(status).with_detail(detail)
}

fn internal() -> Response {
    problem(StatusCode::INTERNAL_SERVER_ERROR, "this is our fault; the request may be tried again").into_response()
}

/// An axum rejection as a problem. The detail names the field and the rule.
pub trait IntoProblem {
    fn into_problem(self) -> ProblemDetails;
}

impl IntoProblem for JsonRejection {
    fn into_problem(self) -> ProblemDetails {
        let detail = match self.status() {
            StatusCode::UNSUPPORTED_MEDIA_TYPE => "send the body with content-type: application/json".to_owned(),
            StatusCode::PAYLOAD_TOO_LARGE => format!("the body may have at most {BODY_LIMIT} bytes"),
            StatusCode::BAD_REQUEST => format!("the body is not JSON: {}", cause(&self.body_text())),
            _ => format!("the body is not what is asked for: {}", cause(&self.body_text())),
        };
        problem(self.status(), detail)
    }
}

/// What axum's message says behind its first words, which speak of our types and not of the caller's request.
fn cause(text: &str) -> &str {
    text.split_once(": ").map_or(text, |(_, cause)| cause)
}

impl IntoProblem for PathRejection {
    fn into_problem(self) -> ProblemDetails {
        problem(StatusCode::NOT_FOUND, "there is no such resource: the id in the path is not a UUID")
    }
}

impl IntoProblem for QueryRejection {
    fn into_problem(self) -> ProblemDetails {
        problem(StatusCode::BAD_REQUEST, self.body_text())
    }
}

/// The span, the metric and the time limit of a request. A request that is cut off by the limit may or may not have taken
/// effect, as with any lost answer: an `Idempotency-Key` makes trying again safe.
async fn observed(State(metrics): State<Metrics>, request: Request, next: Next) -> Response {
    let begun = Instant::now();
    let matched = request.extensions().get::<MatchedPath>();
    let route = matched.map_or("none", MatchedPath::as_str).to_owned(); // never the path: it holds what users type
    // HTTP allows any word as a method; a label has only those that mean something.
    let known = [Method::GET, Method::POST, Method::PUT, Method::PATCH, Method::DELETE, Method::HEAD, Method::OPTIONS];
    let method = known.iter().find(|known| *known == request.method()).map_or("other", Method::as_str).to_owned();
    let span = tracing::error_span!(
        "request",
        "otel.kind" = "server",
        http.request.method = %method,
        http.route = %route,
        http.response.status_code = Empty,
        trace.id = Empty,
    );
    telemetry::continue_from(&span, &trace_context(request.headers()));
    let response = timeout(REQUEST_TIMEOUT, next.run(request)).instrument(span.clone()).await.unwrap_or_else(|_| {
        problem(StatusCode::SERVICE_UNAVAILABLE, "the answer took too long; try again").into_response()
    });
    let status = response.status().as_u16();
    span.record("http.response.status_code", status);
    span.in_scope(|| tracing::debug!("answered"));
    let labels = metrics::Request { method, route, status };
    metrics.http_requests.get_or_create(&labels).observe(begun.elapsed().as_secs_f64());
    response
}

fn trace_context(headers: &HeaderMap) -> TraceContext {
    let text = |name: &str| headers.get(name).and_then(|value| value.to_str().ok()).map(str::to_owned);
    TraceContext { traceparent: text("traceparent"), tracestate: text("tracestate") }
}
