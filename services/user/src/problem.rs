//! All errors of requests, as problem documents (RFC 9457).

use axum::http::{HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use problem_details::ProblemDetails;
use shared::platform::http::{Unavailable, internal_error, problem};

#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The request cannot be parsed; the problem document says where.
    #[error("malformed request")]
    Malformed(Box<ProblemDetails>),
    #[error("{field}: {rule}")]
    Invalid { field: &'static str, rule: &'static str },
    #[error("no such user")]
    UnknownUser,
    #[error("the address belongs to another user")]
    AddressTaken,
    /// `If-Match` requires another version than the current one.
    #[error("the user has another version")]
    StaleVersion { current: i64 },
    #[error("the Idempotency-Key was used for another request")]
    KeyReused,
    /// Another transaction holds a lock that this request needs.
    #[error("another request is changing the same user or key")]
    Busy,
    #[error(transparent)]
    Unavailable(#[from] Unavailable),
    #[error(transparent)]
    Internal(#[from] anyhow::Error),
}

impl From<sqlx::Error> for Error {
    fn from(error: sqlx::Error) -> Self {
        match error.as_database_error().and_then(|error| error.code()).as_deref() {
            // lock_timeout and deadlock: the other transaction continues, and the caller may repeat
            // this request.
            Some("55P03" | "40P01") => Self::Busy,
            _ => Self::Unavailable(error.into()),
        }
    }
}

impl Error {
    /// The error of an update of the address, where `on conflict do nothing` cannot be used.
    pub fn address_taken(error: sqlx::Error) -> Self {
        match error.as_database_error().and_then(|error| error.constraint()) {
            Some("users_email") => Self::AddressTaken,
            _ => error.into(),
        }
    }
}

impl IntoResponse for Error {
    fn into_response(self) -> Response {
        match self {
            Self::Malformed(problem) => problem.into_response(),
            Self::Invalid { field, rule } => {
                problem(StatusCode::UNPROCESSABLE_ENTITY, format!("{field}: {rule}")).into_response()
            }
            Self::UnknownUser => {
                problem(StatusCode::NOT_FOUND, "no user has this id; it may have been deleted").into_response()
            }
            Self::AddressTaken => {
                let detail = "email: a user with this address is already registered; use another address";
                problem(StatusCode::CONFLICT, detail).into_response()
            }
            Self::StaleVersion { current } => {
                let detail = format!(
                    "the user now has version {current}: read it again, then repeat the change with If-Match: \"{current}\""
                );
                problem(StatusCode::PRECONDITION_FAILED, detail).into_response()
            }
            Self::KeyReused => {
                let detail =
                    "Idempotency-Key: this key was used for another request; use a new key for each new request";
                problem(StatusCode::UNPROCESSABLE_ENTITY, detail).into_response()
            }
            Self::Busy => {
                let detail = "another request is changing the same user or key; retry the request";
                ([(header::RETRY_AFTER, HeaderValue::from_static("1"))], problem(StatusCode::CONFLICT, detail))
                    .into_response()
            }
            Self::Unavailable(error) => error.into_response(),
            Self::Internal(error) => {
                tracing::error!(error = %format!("{error:#}"), "cannot answer a request");
                internal_error().into_response()
            }
        }
    }
}
