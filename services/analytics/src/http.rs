//! Queries on the read models.

use axum::extract::rejection::QueryRejection;
use axum::extract::{Query, State};
use axum::response::{IntoResponse, Response};
use axum::{Json, Router, routing};
use serde::{Deserialize, Serialize};
use shared::platform::access::PublicRoutes;
use shared::platform::problem::{INVALID_QUERY, IntoProblem, Unavailable, problem};
use sqlx::PgPool;
use time::format_description::well_known::Rfc3339;
use time::{OffsetDateTime, UtcOffset};

/// Buckets per answer: a year of days, or two weeks of hours.
const BUCKETS_MAX: i32 = 400;

pub fn routes(db: PgPool) -> PublicRoutes {
    let about_all = Router::new()
        .route("/registrations", routing::get(registrations))
        .route("/funnel", routing::get(funnel))
        .with_state(db);
    PublicRoutes::default().for_admins(about_all)
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Range {
    bucket: Bucket,
    /// RFC 3339, inclusive. Default: the first registration.
    from: Option<String>,
    /// RFC 3339, exclusive. Default: after the last registration.
    to: Option<String>,
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
    let from = range.from.map(|text| utc("from", &text)).transpose()?;
    let to = range.to.map(|text| utc("to", &text)).transpose()?;
    let unit = match range.bucket {
        Bucket::Hour => "hour",
        Bucket::Day => "day",
    };
    // Finds the newest buckets one after another, each with one lookup in the index. So the query
    // reads the buckets that it returns, however long the history is.
    let mut buckets = sqlx::query_as!(
        Registrations,
        r#"with recursive bounds as (
               select coalesce($2, '-infinity'::timestamptz) as lower, coalesce($3, 'infinity'::timestamptz) as upper),
           buckets (start, number) as (
               select (select date_trunc($1, hour, 'UTC') from registrations
                       where hour >= lower and hour < upper order by hour desc limit 1), 1
               from bounds
               union all
               select (select date_trunc($1, hour, 'UTC') from registrations
                       where hour >= lower and hour < start order by hour desc limit 1), number + 1
               from buckets, bounds where start is not null and number < $4)
           select start as "start!", (
               select sum(registrations)::bigint from registrations
               where hour >= greatest(start, lower) and hour < upper
                   and hour < date_add(start, ('1 ' || $1::text)::interval, 'UTC')) as "registrations!"
           from buckets, bounds where start is not null order by start desc"#,
        unit,
        from,
        to,
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
        r#"select coalesce(sum(registered), 0)::bigint as "registered!", coalesce(sum(mailed), 0)::bigint as "mailed!"
           from funnel_totals"#
    );
    Ok(Json(funnel.fetch_one(&db).await.map_err(Unavailable::from)?))
}

/// A time that can be said in UTC in the years 1 to 9999. Times that RFC 3339 allows with an offset
/// may be outside.
fn utc(field: &'static str, text: &str) -> Result<OffsetDateTime, Error> {
    let time = OffsetDateTime::parse(text, &Rfc3339).ok().and_then(|time| time.checked_to_offset(UtcOffset::UTC));
    time.filter(|time| (1..=9999).contains(&time.year())).ok_or(Error::InvalidTime { field })
}

#[derive(thiserror::Error, Debug)]
enum Error {
    #[error(transparent)]
    Malformed(QueryRejection),
    #[error("{field} is not a time")]
    InvalidTime { field: &'static str },
    #[error(transparent)]
    Unavailable(#[from] Unavailable),
}

impl IntoResponse for Error {
    fn into_response(self) -> Response {
        match self {
            Self::Malformed(rejection) => rejection.into_problem().into_response(),
            Self::InvalidTime { field } => {
                let detail = format!(
                    "{field}: it must be a time between the years 1 and 9999 in UTC, for example 2026-01-31T12:00:00Z"
                );
                problem(INVALID_QUERY, detail).into_response()
            }
            Self::Unavailable(error) => error.into_response(),
        }
    }
}
