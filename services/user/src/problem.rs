//! Everything a request can end with except success, as RFC 9457 problems.

use axum::http::{HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use problem_details::ProblemDetails;
use shared::service::http::problem;

#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The request cannot be read; the problem says where.
    #[error("malformed request")]
    Malformed(Box<ProblemDetails>),
    #[error("{field}: {rule}")]
    Invalid { field: &'static str, rule: &'static str },
    #[error("there is no such user, or not any more")]
    UnknownUser,
    #[error("the address belongs to another user")]
    AddressTaken,
    /// `If-Match` names another version than the current one.
    #[error("the user has changed since")]
    StaleVersion { current: i64 },
    #[error("the Idempotency-Key was used for another request")]
    KeyReused,
    /// Somebody else holds what we need.
    #[error("another request is changing the same thing")]
    Busy,
    #[error(transparent)]
    Database(sqlx::Error),
    #[error(transparent)]
    Internal(#[from] anyhow::Error),
}

impl From<sqlx::Error> for Error {
    fn from(error: sqlx::Error) -> Self {
        match error.as_database_error().and_then(|error| error.code()).as_deref() {
            // lock_timeout, deadlock: the other one goes on, this one may try again.
            Some("55P03" | "40P01") => Self::Busy,
            _ => Self::Database(error),
        }
    }
}

impl Error {
    /// For the one statement whose conflict cannot be skipped by `on conflict do nothing`: an update.
    pub fn address_taken(error: sqlx::Error) -> Self {
        match error.as_database_error().and_then(|error| error.constraint()) {
            Some("users_email") => Self::AddressTaken,
            _ => error.into(),
        }
    }

    fn problem(self) -> ProblemDetails {
        match self {
            Self::Malformed(problem) => *problem,
            Self::Invalid { field, rule } => problem(StatusCode::UNPROCESSABLE_ENTITY, format!("{field}: {rule}")),
            Self::UnknownUser => problem(StatusCode::NOT_FOUND, "there is no user with this id, or not any more"),
            Self::AddressTaken => {
                problem(StatusCode::CONFLICT, "email: a user with this address is registered already; use another one")
            }
            Self::StaleVersion { current } => problem(
                StatusCode::PRECONDITION_FAILED,
                format!(
                    "the user is at version {current} by now: read it again, then change it with If-Match: \"{current}\""
                ),
            ),
            Self::KeyReused => problem(
                StatusCode::UNPROCESSABLE_ENTITY,
                "Idempotency-Key: it was used for another request; use a new one for each new request",
            ),
            Self::Busy => problem(StatusCode::CONFLICT, "another request is changing the same thing; try again"),
            Self::Database(_) => problem(StatusCode::SERVICE_UNAVAILABLE, "the database does not answer; try again"),
            Self::Internal(_) => {
                problem(StatusCode::INTERNAL_SERVER_ERROR, "this is our fault; the request may be tried again")
            }
        }
    }
}

impl IntoResponse for Error {
    fn into_response(self) -> Response {
        match &self {
            // The message of a database error may quote values, so only its code is logged.
            Self::Database(sqlx::Error::Database(error)) => {
                tracing::error!(code = error.code().as_deref(), "the database refused a statement");
            }
            Self::Database(error) => tracing::error!(%error, "the database does not answer"),
            Self::Internal(error) => tracing::error!(error = %format!("{error:#}"), "cannot answer a request"),
            _ => {}
        }
        let retry = matches!(self, Self::Busy | Self::Database(_));
        let mut response = self.problem().into_response();
        if retry {
            response.headers_mut().insert(header::RETRY_AFTER, HeaderValue::from_static("1"));
        }
        response
    }
}
