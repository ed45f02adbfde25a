//! What every public HTTP route gets: a request id, a span in the caller's trace, a latency metric,
//! a time limit, a size limit, and errors as problem documents (RFC 9457).

use axum::Router;
use axum::extract::rejection::{JsonRejection, PathRejection, QueryRejection};
use axum::extract::{DefaultBodyLimit, MatchedPath, Request, State};
use axum::http::{HeaderMap, HeaderName, HeaderValue, Method, StatusCode, header};
use axum::middleware::{self, Next};
use axum::response::{IntoResponse, Response};
use problem_details::ProblemDetails;
use tokio::time::{Duration, Instant, timeout};
use tower_http::catch_panic::CatchPanicLayer;
use tower_http::request_id::{MakeRequestUuid, PropagateRequestIdLayer, SetRequestIdLayer};
use tracing::{Instrument, field::Empty};

use super::database;
use super::metrics::{Metrics, RequestLabels};
use super::telemetry::{self, TraceContext};

/// Longer than every time-out of the database, so that its error, which is more specific, comes
/// first.
const REQUEST_TIMEOUT: Duration = Duration::from_secs(10);
/// Bytes. The largest valid body holds an address and a name.
const BODY_LIMIT: usize = 16 * 1024;
const REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");

/// Adds to a service's routes what every public route gets.
pub(crate) fn layered(routes: Router, metrics: Metrics, trust_trace_context: bool) -> Router {
    routes
        .fallback(async || problem(StatusCode::NOT_FOUND, "no such resource"))
        .method_not_allowed_fallback(async || {
            problem(StatusCode::METHOD_NOT_ALLOWED, "the resource does not support this method")
        })
        .layer(DefaultBodyLimit::max(BODY_LIMIT))
        .layer(CatchPanicLayer::custom(|_| internal_error().into_response()))
        .layer(middleware::from_fn_with_state(Observer { metrics, trust_trace_context }, observed))
        .layer(PropagateRequestIdLayer::new(REQUEST_ID))
        .layer(SetRequestIdLayer::new(REQUEST_ID, MakeRequestUuid))
}

/// A problem document. The title is the status' name; `detail` says what the caller can do.
pub fn problem(status: StatusCode, detail: impl Into<String>) -> ProblemDetails {
    ProblemDetails::from_status_code(status).with_detail(detail)
}

/// The answer to a request that failed because of a bug. The caller of this function logs the
/// cause; the answer does not show it.
pub fn internal_error() -> ProblemDetails {
    problem(StatusCode::INTERNAL_SERVER_ERROR, "internal error; retry the request (use an Idempotency-Key)")
}

/// A request failed because the database refused a statement or did not answer. Answers 503 with
/// `Retry-After`.
#[derive(Debug, thiserror::Error)]
#[error("the database does not answer")]
pub struct Unavailable(#[from] sqlx::Error);

impl IntoResponse for Unavailable {
    /// Logs the cause. The message of a database error may quote values, so only its code is
    /// logged.
    fn into_response(self) -> Response {
        database::report(&self.0);
        match self.0 {
            sqlx::Error::Database(error) => {
                tracing::error!(code = error.code().as_deref(), "the database refused a statement");
            }
            error => tracing::error!(%error, "the database does not answer"),
        }
        let problem = problem(StatusCode::SERVICE_UNAVAILABLE, "the database does not answer; retry the request");
        ([(header::RETRY_AFTER, HeaderValue::from_static("1"))], problem).into_response()
    }
}

/// Turns an axum rejection into a problem document whose detail names the field and the rule.
pub trait IntoProblem {
    fn into_problem(self) -> ProblemDetails;
}

impl IntoProblem for JsonRejection {
    fn into_problem(self) -> ProblemDetails {
        let detail = match self.status() {
            StatusCode::UNSUPPORTED_MEDIA_TYPE => "send the body with content-type: application/json".to_owned(),
            StatusCode::PAYLOAD_TOO_LARGE => format!("the body may have at most {BODY_LIMIT} bytes"),
            StatusCode::BAD_REQUEST => format!("the body is not JSON: {}", cause(&self.body_text())),
            _ => format!("the body does not have the required form: {}", cause(&self.body_text())),
        };
        problem(self.status(), detail)
    }
}

/// axum's message without its first words, which name our Rust types.
fn cause(text: &str) -> &str {
    text.split_once(": ").map_or(text, |(_, cause)| cause)
}

impl IntoProblem for PathRejection {
    fn into_problem(self) -> ProblemDetails {
        problem(StatusCode::NOT_FOUND, "no such resource: the id in the path is not a UUID")
    }
}

impl IntoProblem for QueryRejection {
    fn into_problem(self) -> ProblemDetails {
        problem(StatusCode::BAD_REQUEST, self.body_text())
    }
}

/// The span, the metric and the time limit of a request. A request that exceeds the limit may have
/// taken effect, as after any lost answer. With an `Idempotency-Key` it is safe to retry.
async fn observed(State(observer): State<Observer>, request: Request, next: Next) -> Response {
    let started = Instant::now();
    let matched = request.extensions().get::<MatchedPath>();
    let route = matched.map_or("none", MatchedPath::as_str).to_owned(); // never the path, which contains what users type
    // HTTP allows any word as a method. A label has only known methods, so that callers cannot
    // create series.
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
    let caller = trace_context(request.headers());
    if observer.trust_trace_context {
        telemetry::continue_from(&span, &caller);
    } else {
        // Text that a stranger chose must not reach the outbox, where it would be kept with the
        // event.
        telemetry::continue_from(&span, &TraceContext::default());
        telemetry::link(&span, &TraceContext { tracestate: None, ..caller });
    }
    let response = timeout(REQUEST_TIMEOUT, next.run(request)).instrument(span.clone()).await.unwrap_or_else(|_| {
        problem(StatusCode::SERVICE_UNAVAILABLE, "the request took too long; retry it").into_response()
    });
    let status = response.status().as_u16();
    span.record("http.response.status_code", status);
    span.in_scope(|| tracing::debug!("request answered"));
    let labels = RequestLabels { method, route, status };
    observer.metrics.http_requests.get_or_create(&labels).observe(started.elapsed().as_secs_f64());
    response
}

/// What [`observed`] needs.
#[derive(Clone)]
struct Observer {
    metrics: Metrics,
    /// The setting TRUST_TRACE_CONTEXT.
    trust_trace_context: bool,
}

fn trace_context(headers: &HeaderMap) -> TraceContext {
    let text = |name: &str| headers.get(name).and_then(|value| value.to_str().ok()).map(str::to_owned);
    TraceContext { traceparent: text("traceparent"), tracestate: text("tracestate") }
}
