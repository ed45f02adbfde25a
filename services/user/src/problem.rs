//! All errors of requests, as problem documents (RFC 9457).

use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};
use problem_details::ProblemDetails;
use shared::platform::access::{Forbidden, TooMany};
use shared::platform::problem::{Kind, PRECONDITION_FAILED, Unavailable, internal_error, problem, retry_later};

const INVALID_FIELD: Kind = Kind::new("invalid-field", StatusCode::UNPROCESSABLE_ENTITY);
const REPEATED_IDEMPOTENCY_KEY: Kind = Kind::new("repeated-idempotency-key", StatusCode::BAD_REQUEST);
const IDEMPOTENCY_KEY_REUSED: Kind = Kind::new("idempotency-key-reused", StatusCode::UNPROCESSABLE_ENTITY);
const UNKNOWN_USER: Kind = Kind::new("unknown-user", StatusCode::NOT_FOUND);
const ADDRESS_TAKEN: Kind = Kind::new("address-taken", StatusCode::CONFLICT);
const BUSY: Kind = Kind::new("busy", StatusCode::CONFLICT);

#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The request cannot be parsed; the problem document says where.
    #[error("malformed request")]
    Malformed(Box<ProblemDetails>),
    #[error("{field}: {rule}")]
    Invalid { field: &'static str, rule: &'static str },
    #[error("two Idempotency-Keys")]
    TwoKeys,
    #[error("no such user")]
    UnknownUser,
    #[error("the address belongs to another user")]
    AddressTaken,
    /// `If-Match` on a request that creates a user.
    #[error("no version to match")]
    NothingToMatch,
    /// The preconditions do not allow a change of the current version.
    #[error("the user has another version")]
    StaleVersion { current: i64 },
    #[error("the Idempotency-Key was used for another request")]
    KeyReused,
    /// Another transaction holds a lock that this request needs.
    #[error("another request is changing the same user or key")]
    Busy,
    #[error(transparent)]
    Forbidden(#[from] Forbidden),
    #[error(transparent)]
    TooMany(#[from] TooMany),
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
            Self::Invalid { field, rule } => problem(INVALID_FIELD, format!("{field}: {rule}")).into_response(),
            Self::TwoKeys => {
                problem(REPEATED_IDEMPOTENCY_KEY, "Idempotency-Key: send this header once").into_response()
            }
            Self::UnknownUser => problem(UNKNOWN_USER, "no user has this id; it may have been deleted").into_response(),
            Self::AddressTaken => {
                let detail = "email: a user with this address is already registered; use another address";
                problem(ADDRESS_TAKEN, detail).into_response()
            }
            Self::NothingToMatch => {
                let detail = "this request creates a user, so no version can match: send it without If-Match";
                problem(PRECONDITION_FAILED, detail).into_response()
            }
            Self::StaleVersion { current } => {
                let detail = format!(
                    "the user now has version {current}: read it again, then repeat the change with If-Match: \"{current}\""
                );
                problem(PRECONDITION_FAILED, detail).into_response()
            }
            Self::KeyReused => {
                let detail =
                    "Idempotency-Key: this key was used for another request; use a new key for each new request";
                problem(IDEMPOTENCY_KEY_REUSED, detail).into_response()
            }
            Self::Busy => retry_later(BUSY, "another request is changing the same user or key; retry the request"),
            Self::Forbidden(error) => error.into_response(),
            Self::TooMany(error) => error.into_response(),
            Self::Unavailable(error) => error.into_response(),
            Self::Internal(error) => {
                tracing::error!(error = %format!("{error:#}"), "cannot answer a request");
                internal_error().into_response()
            }
        }
    }
}
