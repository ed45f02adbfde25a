//! Which mails a user was sent.

use axum::extract::rejection::PathRejection;
use axum::extract::{Path, State};
use axum::http::StatusCode;
use axum::{Json, Router, routing};
use problem_details::ProblemDetails;
use serde::Serialize;
use shared::service::http::{IntoProblem, problem};
use sqlx::PgPool;
use time::OffsetDateTime;
use uuid::Uuid;

pub fn routes(db: PgPool) -> Router {
    Router::new().route("/users/{id}/emails", routing::get(emails)).with_state(db)
}

#[derive(Serialize)]
struct Email {
    delivery_id: Uuid,
    template: String,
    /// `pending`, `held`, `sending`, `unknown`, `sent`, `failed` or `cancelled`.
    status: String,
    attempts: i32,
    /// The mail server's last reply.
    smtp_code: Option<i16>,
    #[serde(with = "time::serde::rfc3339")]
    requested_at: OffsetDateTime,
}

/// Empty for a user without mails, whom this service cannot tell from one who does not exist.
async fn emails(
    State(db): State<PgPool>,
    id: Result<Path<Uuid>, PathRejection>,
) -> Result<Json<Vec<Email>>, ProblemDetails> {
    let Path(id) = id.map_err(IntoProblem::into_problem)?;
    let emails = sqlx::query_as!(
        Email,
        "select id as delivery_id, template, status, attempt as attempts, smtp_code, requested_at
         from deliveries where user_id = $1 order by requested_at, id",
        id
    );
    emails.fetch_all(&db).await.map(Json).map_err(|error| {
        tracing::error!(%error, "the database does not answer");
        problem(StatusCode::SERVICE_UNAVAILABLE, "the database does not answer; try again")
    })
}
