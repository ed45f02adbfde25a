//! Errors of requests, as problem documents (RFC 9457). Each has a `type` that clients can rely on;
//! `docs/problems.md` lists all of them.

use axum::extract::rejection::{JsonRejection, PathRejection, QueryRejection};
use axum::http::{HeaderValue, StatusCode, Uri, header};
use axum::response::{IntoResponse, Response};
use problem_details::ProblemDetails;

use super::database;

/// A kind of problem: the last part of its `type`, and its status.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Kind {
    name: &'static str,
    status: StatusCode,
}

impl Kind {
    pub const fn new(name: &'static str, status: StatusCode) -> Self {
        Self { name, status }
    }
}

pub(super) const NO_SUCH_RESOURCE: Kind = Kind::new("no-such-resource", StatusCode::NOT_FOUND);
pub(super) const METHOD_NOT_ALLOWED: Kind = Kind::new("method-not-allowed", StatusCode::METHOD_NOT_ALLOWED);
pub(super) const BODY_TOO_LARGE: Kind = Kind::new("body-too-large", StatusCode::PAYLOAD_TOO_LARGE);
pub(super) const BODY_TOO_SLOW: Kind = Kind::new("body-too-slow", StatusCode::REQUEST_TIMEOUT);
pub(super) const BODY_INCOMPLETE: Kind = Kind::new("body-incomplete", StatusCode::BAD_REQUEST);
pub(super) const OVERLOADED: Kind = Kind::new("overloaded", StatusCode::SERVICE_UNAVAILABLE);
pub(super) const TOOK_TOO_LONG: Kind = Kind::new("took-too-long", StatusCode::SERVICE_UNAVAILABLE);
const UNSUPPORTED_MEDIA_TYPE: Kind = Kind::new("unsupported-media-type", StatusCode::UNSUPPORTED_MEDIA_TYPE);
const MALFORMED_JSON: Kind = Kind::new("malformed-json", StatusCode::BAD_REQUEST);
const INVALID_BODY: Kind = Kind::new("invalid-body", StatusCode::UNPROCESSABLE_ENTITY);
const INTERNAL_ERROR: Kind = Kind::new("internal-error", StatusCode::INTERNAL_SERVER_ERROR);
/// A parameter of the query string is missing, unknown or out of range.
pub const INVALID_QUERY: Kind = Kind::new("invalid-query", StatusCode::BAD_REQUEST);
/// The precondition of a request (`If-Match`, `If-None-Match`) is false.
pub const PRECONDITION_FAILED: Kind = Kind::new("precondition-failed", StatusCode::PRECONDITION_FAILED);
/// The service's own database or store does not answer.
pub const STORE_UNAVAILABLE: Kind = Kind::new("store-unavailable", StatusCode::SERVICE_UNAVAILABLE);

/// A problem document. The title is the status' name; `detail` says what the caller can do.
pub fn problem(kind: Kind, detail: impl Into<String>) -> ProblemDetails {
    let uri = Uri::try_from(format!("/problems/{}", kind.name)).expect("names of kinds are valid in a URI");
    ProblemDetails::from_status_code(kind.status).with_type(uri).with_detail(detail)
}

/// A problem that passes by itself: `Retry-After` asks the caller to repeat the request.
pub fn retry_later(kind: Kind, detail: impl Into<String>) -> Response {
    ([(header::RETRY_AFTER, HeaderValue::from_static("1"))], problem(kind, detail)).into_response()
}

/// The answer to a request that failed because of a bug. The caller of this function logs the
/// cause; the answer does not show it.
pub fn internal_error() -> ProblemDetails {
    problem(INTERNAL_ERROR, "internal error; retry the request (use an Idempotency-Key)")
}

/// A request failed because the database refused a statement or did not answer. Answers 503 with
/// `Retry-After`. If the database refused a value of the request, that is a bug, because requests
/// are checked before. A retry would fail again, so the answer is 500.
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
                let code = error.code();
                if code.as_deref().is_some_and(is_about_a_value) {
                    tracing::error!(
                        code = code.as_deref(),
                        "the database refused a value that the service had accepted"
                    );
                    return internal_error().into_response();
                }
                tracing::error!(code = code.as_deref(), "the database refused a statement");
            }
            sqlx::Error::PoolTimedOut => {
                tracing::error!("no database session is free; if the database answers, all of them are in use");
                return retry_later(STORE_UNAVAILABLE, "no database session is free; retry the request");
            }
            error => tracing::error!(%error, "the database does not answer"),
        }
        retry_later(STORE_UNAVAILABLE, "the database does not answer; retry the request")
    }
}

/// Whether this SQLSTATE is of class 22 (data) or 23 (constraints).
fn is_about_a_value(code: &str) -> bool {
    code.starts_with("22") || code.starts_with("23")
}

/// Turns an axum rejection into a problem document whose detail names the field and the rule.
pub trait IntoProblem {
    fn into_problem(self) -> ProblemDetails;
}

impl IntoProblem for JsonRejection {
    fn into_problem(self) -> ProblemDetails {
        match self {
            Self::MissingJsonContentType(_) => {
                problem(UNSUPPORTED_MEDIA_TYPE, "send the body with content-type: application/json")
            }
            Self::JsonDataError(error) => {
                let detail = format!("the body does not have the required form: {}", cause(&error.body_text()));
                problem(INVALID_BODY, detail)
            }
            error => problem(MALFORMED_JSON, format!("the body is not JSON: {}", cause(&error.body_text()))),
        }
    }
}

/// axum's message without its first words, which name our Rust types.
fn cause(text: &str) -> &str {
    text.split_once(": ").map_or(text, |(_, cause)| cause)
}

impl IntoProblem for PathRejection {
    fn into_problem(self) -> ProblemDetails {
        problem(NO_SUCH_RESOURCE, "no such resource: the id in the path is not a UUID")
    }
}

impl IntoProblem for QueryRejection {
    fn into_problem(self) -> ProblemDetails {
        let text = self.body_text();
        problem(INVALID_QUERY, format!("the query does not have the required form: {}", cause(&text)))
    }
}
