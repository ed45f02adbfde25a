//! Queries on the read models.

use axum::extract::rejection::QueryRejection;
use axum::extract::{Query, State};
use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};
use axum::{Json, Router, routing};
use serde::{Deserialize, Serialize};
use shared::service::http::{IntoProblem, problem};
use sqlx::PgPool;
use time::OffsetDateTime;

/// Buckets in one answer; a year of days, or two weeks of hours.
const BUCKETS_MAX: i64 = 400;

pub fn routes(db: PgPool) -> Router {
    Router::new()
        .route("/registrations", routing::get(registrations))
        .route("/funnel", routing::get(funnel))
        .with_state(db)
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Range {
    bucket: Bucket,
    /// RFC 3339, inclusive. Absent: from the first registration.
    #[serde(default, with = "time::serde::rfc3339::option")]
    from: Option<OffsetDateTime>,
    /// RFC 3339, exclusive. Absent: until the last.
    #[serde(default, with = "time::serde::rfc3339::option")]
    to: Option<OffsetDateTime>,
}

#[derive(Deserialize, Clone, Copy)]
#[serde(rename_all = "lowercase")]
enum Bucket {
    Hour,
    Day,
}

#[derive(Serialize)]
struct Registrations {
    /// The bucket's beginning, UTC.
    #[serde(with = "time::serde::rfc3339")]
    start: OffsetDateTime,
    registrations: i64,
}

#[derive(Serialize)]
struct Funnel {
    registered: i64,
    /// Of those, how many had a mail taken over by an SMTP server.
    mailed: i64,
}

/// The newest buckets of the range, oldest first. Empty buckets are left out.
async fn registrations(
    State(db): State<PgPool>,
    range: Result<Query<Range>, QueryRejection>,
) -> Result<Json<Vec<Registrations>>, Error> {
    let Query(range) = range.map_err(Error::Malformed)?;
    let unit = match range.bucket {
        Bucket::Hour => "hour",
        Bucket::Day => "day",
    };
    let mut buckets = sqlx::query_as!(
        Registrations,
        r#"select date_trunc($1, hour, 'UTC') as "start!", sum(registrations)::bigint as "registrations!"
           from registrations
           where hour >= coalesce($2, '-infinity'::timestamptz) and hour < coalesce($3, 'infinity'::timestamptz)
           group by 1 order by 1 desc limit $4"#,
        unit,
        range.from,
        range.to,
        BUCKETS_MAX,
    )
    .fetch_all(&db)
    .await?;
    buckets.reverse();
    Ok(Json(buckets))
}

async fn funnel(State(db): State<PgPool>) -> Result<Json<Funnel>, Error> {
    let funnel = sqlx::query_as!(
        Funnel,
        r#"select count(registered_at) as "registered!", count(mailed_at) filter (where registered_at is not null) as "mailed!"
           from funnel"#
    );
    Ok(Json(funnel.fetch_one(&db).await?))
}

#[derive(thiserror::Error, Debug)]
enum Error {
    #[error(transparent)]
    Malformed(QueryRejection),
    #[error(transparent)]
    Database(#[from] sqlx::Error),
}

impl IntoResponse for Error {
    fn into_response(self) -> Response {
        match self {
            Self::Malformed(rejection) => rejection.into_problem().into_response(),
            Self::Database(error) => {
                tracing::error!(%error, "the database does not answer");
                problem(StatusCode::SERVICE_UNAVAILABLE, "the database does not answer; try again").into_response()
            }
        }
    }
}
