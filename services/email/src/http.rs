//! Queries for the mails of a user.

use axum::extract::rejection::PathRejection;
use axum::extract::{Path, State};
use axum::response::{IntoResponse, Response};
use axum::{Json, Router, routing};
use serde::Serialize;
use shared::platform::access::{Caller, PublicRoutes};
use shared::platform::problem::{IntoProblem, Unavailable};
use sqlx::PgPool;
use time::OffsetDateTime;
use uuid::Uuid;

pub fn routes(db: PgPool) -> PublicRoutes {
    PublicRoutes::default().for_owners(Router::new().route("/users/{id}/emails", routing::get(emails)).with_state(db))
}

#[derive(Serialize)]
struct Email {
    delivery_id: Uuid,
    template: String,
    /// `unaddressed`, `pending`, `held`, `sending`, `unknown`, `sent`, `failed` or `cancelled`.
    status: String,
    attempts: i32,
    /// The code of the mail server's last reply.
    smtp_code: Option<i16>,
    #[serde(with = "time::serde::rfc3339")]
    requested_at: OffsetDateTime,
    #[serde(skip)]
    owner: Option<Uuid>,
}

/// Returns an empty list for a user without mails and for an unknown user: this service cannot
/// distinguish them. So any caller gets it.
async fn emails(
    State(db): State<PgPool>,
    caller: Caller,
    id: Result<Path<Uuid>, PathRejection>,
) -> Result<Json<Vec<Email>>, Response> {
    let Path(id) = id.map_err(|rejection| rejection.into_problem().into_response())?;
    let emails = sqlx::query_as!(
        Email,
        "select id as delivery_id, template, status, attempt as attempts, smtp_code, requested_at, owner
         from deliveries where user_id = $1 order by requested_at, id",
        id
    );
    let emails = emails.fetch_all(&db).await.map_err(|error| Unavailable::from(error).into_response())?;
    for email in &emails {
        caller.require_owner(email.owner).map_err(IntoResponse::into_response)?;
    }
    Ok(Json(emails))
}
