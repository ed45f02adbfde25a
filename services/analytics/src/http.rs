//! Queries on the read models.

use axum::extract::rejection::QueryRejection;
use axum::extract::{Query, State};
use axum::response::{IntoResponse, Response};
use axum::{Json, Router, routing};
use serde::{Deserialize, Serialize};
use shared::platform::http::{IntoProblem, Unavailable};
use sqlx::PgPool;
use time::OffsetDateTime;

/// Buckets per answer: a year of days, or two weeks of hours.
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
    /// RFC 3339, inclusive. Default: the first registration.
    #[serde(default, with = "time::serde::rfc3339::option")]
    from: Option<OffsetDateTime>,
    /// RFC 3339, exclusive. Default: after the last registration.
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
    /// The start of the bucket, in UTC.
    #[serde(with = "time::serde::rfc3339")]
    start: OffsetDateTime,
    registrations: i64,
}

#[derive(Serialize)]
struct Funnel {
    registered: i64,
    /// How many of them were sent a mail that an SMTP server accepted.
    mailed: i64,
}

/// The newest buckets of the range, oldest first. Empty buckets are omitted.
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
    .await
    .map_err(Unavailable::from)?;
    buckets.reverse();
    Ok(Json(buckets))
}

async fn funnel(State(db): State<PgPool>) -> Result<Json<Funnel>, Error> {
    let funnel = sqlx::query_as!(
        Funnel,
        r#"select count(registered_at) as "registered!", count(mailed_at) filter (where registered_at is not null) as "mailed!"
           from funnel"#
    );
    Ok(Json(funnel.fetch_one(&db).await.map_err(Unavailable::from)?))
}

#[derive(thiserror::Error, Debug)]
enum Error {
    #[error(transparent)]
    Malformed(QueryRejection),
    #[error(transparent)]
    Unavailable(#[from] Unavailable),
}

impl IntoResponse for Error {
    fn into_response(self) -> Response {
        match self {
            Self::Malformed(rejection) => rejection.into_problem().into_response(),
            Self::Unavailable(error) => error.into_response(),
        }
    }
}
