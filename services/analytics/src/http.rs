//! Queries on the read models.

use axum::extract::rejection::QueryRejection;
use axum::extract::{Query, State};
use axum::response::{IntoResponse, Response};
use axum::{Json, Router, routing};
use serde::{Deserialize, Serialize};
use shared::platform::access::{Caller, Forbidden, PublicRoutes};
use shared::platform::problem::{INVALID_QUERY, IntoProblem, Unavailable, problem};
use shared::platform::settings::number;
use sqlx::PgPool;
use time::format_description::well_known::Rfc3339;
use time::{OffsetDateTime, UtcOffset};
use uuid::Uuid;

/// Buckets per answer: a year of days, or two weeks of hours.
const BUCKETS_MAX: i32 = 400;
/// Entries of the audit per answer.
const ENTRIES_MAX: i64 = 500;
const ENTRIES: i64 = 100;

pub fn routes(db: PgPool) -> PublicRoutes {
    let about_all = Router::new()
        .route("/registrations", routing::get(registrations))
        .route("/funnel", routing::get(funnel))
        .with_state(db.clone());
    let about_one = Router::new().route("/audit", routing::get(audit)).with_state(db);
    PublicRoutes::default().for_admins(about_all).for_owners(about_one)
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

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Page {
    user_id: Uuid,
    /// Where to continue: `next` of the answer before.
    after: Option<String>,
    /// How many entries. Default: 100.
    limit: Option<String>,
}

#[derive(Serialize)]
struct Audit {
    entries: Vec<Entry>,
    /// Where the next page begins. Absent on the last page.
    #[serde(skip_serializing_if = "Option::is_none")]
    next: Option<String>,
}

/// One fact. Ids only: the principal and the command are known to those who keep them.
#[derive(Serialize)]
struct Entry {
    event_id: Uuid,
    #[serde(rename = "type")]
    kind: String,
    /// The user's version after the event.
    version: i64,
    #[serde(with = "time::serde::rfc3339")]
    occurred_at: OffsetDateTime,
    /// Who gave the command: a keyed hash. Null: given without a token.
    actor: Option<Uuid>,
    /// The command, and the command at the beginning of the chain.
    causation_id: Option<Uuid>,
    correlation_id: Option<Uuid>,
}

/// The facts about a user, in the order of the user's versions. They stay when the user is erased,
/// and so does the right of the owner to read them. A user without facts, who may also be unknown,
/// has an empty audit, and any caller gets it.
async fn audit(
    State(db): State<PgPool>,
    caller: Caller,
    page: Result<Query<Page>, QueryRejection>,
) -> Result<Json<Audit>, Error> {
    let Query(Page { user_id, after, limit }) = page.map_err(Error::Malformed)?;
    let limit = limit.as_deref().map_or(Ok(ENTRIES), number(1..=ENTRIES_MAX));
    let limit = limit.map_err(|rule| Error::InvalidLimit { rule })?;
    let (version, event_id) = after.as_deref().map_or(Some((0, Uuid::nil())), cursor).ok_or(Error::InvalidCursor)?;
    // One more than the page, to see whether there is another page.
    let mut entries = sqlx::query_as!(
        Entry,
        "select event_id, type as kind, version, occurred_at, actor, causation_id, correlation_id from audit
         where user_id = $1 and (version, event_id) > ($2, $3) order by version, event_id limit $4",
        user_id,
        version,
        event_id,
        limit + 1,
    )
    .fetch_all(&db)
    .await
    .map_err(Unavailable::from)?;
    let owner = sqlx::query_scalar!(
        "select actor from audit where user_id = $1 and version = 1 and type = 'user.registered' order by event_id limit 1",
        user_id
    );
    let owner = owner.fetch_optional(&db).await.map_err(Unavailable::from)?;
    if owner.is_some() || !entries.is_empty() {
        caller.require_owner(owner.flatten())?;
    }
    let has_more = entries.len() as i64 > limit;
    entries.truncate(limit as usize);
    let last = entries.last().filter(|_| has_more);
    let next = last.map(|last| format!("{}.{}", last.version, last.event_id));
    Ok(Json(Audit { entries, next }))
}

/// The version and the event of an entry.
fn cursor(text: &str) -> Option<(i64, Uuid)> {
    let (version, event_id) = text.split_once('.')?;
    Some((version.parse().ok()?, event_id.parse().ok()?))
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
    #[error("limit: {rule}")]
    InvalidLimit { rule: String },
    #[error("the cursor is not one of an answer")]
    InvalidCursor,
    #[error(transparent)]
    Forbidden(#[from] Forbidden),
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
            Self::InvalidLimit { rule } => problem(INVALID_QUERY, format!("limit: {rule}")).into_response(),
            Self::InvalidCursor => {
                problem(INVALID_QUERY, "after: it must be the `next` of an answer to this query").into_response()
            }
            Self::Forbidden(error) => error.into_response(),
            Self::Unavailable(error) => error.into_response(),
        }
    }
}
