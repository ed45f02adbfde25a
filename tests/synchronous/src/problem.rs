//! The errors of requests, as problem documents.

use axum::extract::rejection::JsonRejection;
use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};
use shared::platform::problem::{IntoProblem, Kind, Unavailable, internal_error, problem, retry_later};

const INVALID_FIELD: Kind = Kind::new("invalid-field", StatusCode::UNPROCESSABLE_ENTITY);
const IDEMPOTENCY_KEY_REUSED: Kind = Kind::new("idempotency-key-reused", StatusCode::UNPROCESSABLE_ENTITY);
const UNKNOWN_USER: Kind = Kind::new("unknown-user", StatusCode::NOT_FOUND);
const ADDRESS_TAKEN: Kind = Kind::new("address-taken", StatusCode::CONFLICT);
const BUSY: Kind = Kind::new("busy", StatusCode::CONFLICT);

#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("malformed request")]
    Malformed(JsonRejection),
    #[error("{field}: {rule}")]
    Invalid { field: &'static str, rule: &'static str },
    #[error("no such user")]
    UnknownUser,
    #[error("the address belongs to another user")]
    AddressTaken,
    #[error("the Idempotency-Key was used for another request")]
    KeyReused,
    /// A request with the same key is making its calls.
    #[error("another request with the same key is in progress")]
    Busy,
    #[error(transparent)]
    Unavailable(#[from] Unavailable),
    #[error(transparent)]
    Internal(#[from] anyhow::Error),
}

impl From<sqlx::Error> for Error {
    fn from(error: sqlx::Error) -> Self {
        Self::Unavailable(error.into())
    }
}

impl IntoResponse for Error {
    fn into_response(self) -> Response {
        match self {
            Self::Malformed(rejection) => rejection.into_problem().into_response(),
            Self::Invalid { field, rule } => problem(INVALID_FIELD, format!("{field}: {rule}")).into_response(),
            Self::UnknownUser => problem(UNKNOWN_USER, "no user has this id").into_response(),
            Self::AddressTaken => {
                let detail = "email: a user with this address is already registered; use another address";
                problem(ADDRESS_TAKEN, detail).into_response()
            }
            Self::KeyReused => {
                let detail =
                    "Idempotency-Key: this key was used for another request; use a new key for each new request";
                problem(IDEMPOTENCY_KEY_REUSED, detail).into_response()
            }
            Self::Busy => retry_later(BUSY, "a request with the same key is in progress; retry the request"),
            Self::Unavailable(error) => error.into_response(),
            Self::Internal(error) => {
                tracing::error!(error = %format!("{error:#}"), "cannot answer a request");
                internal_error().into_response()
            }
        }
    }
}
