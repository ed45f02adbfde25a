//! Queries for the current profile of a user. Every command of the user service answers with a
//! version. A caller that sends it as `min_version` reads its own write, although the cache is
//! updated asynchronously.

use axum::extract::rejection::{PathRejection, QueryRejection};
use axum::extract::{Path, Query, State};
use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};
use axum::{Json, Router, routing};
use serde::{Deserialize, Serialize};
use shared::events::Profile;
use shared::platform::access::{Caller, PublicRoutes};
use shared::platform::preconditions::Preconditions;
use shared::platform::problem::{INVALID_QUERY, IntoProblem, Kind, STORE_UNAVAILABLE, problem, retry_later};
use shared::platform::settings::number;
use tokio::time::Duration;
use uuid::Uuid;

use crate::reads::Reads;
use crate::view::Lookup;
use crate::waiters::{Ended, Waiters};

/// How long a request waits for its `min_version`. Usually an event arrives within tens of
/// milliseconds.
const WAIT_LIMIT: Duration = Duration::from_secs(2);

const UNKNOWN_USER: Kind = Kind::new("unknown-user", StatusCode::NOT_FOUND);
const VIEW_INCOMPLETE: Kind = Kind::new("view-incomplete", StatusCode::SERVICE_UNAVAILABLE);
const VERSION_NOT_ARRIVED: Kind = Kind::new("version-not-arrived", StatusCode::SERVICE_UNAVAILABLE);
const TOO_MANY_WAITERS: Kind = Kind::new("too-many-waiters", StatusCode::SERVICE_UNAVAILABLE);

#[derive(Clone)]
pub struct App {
    pub reads: Reads,
    pub waiters: Waiters,
}

pub fn routes(app: App) -> PublicRoutes {
    PublicRoutes::default().for_owners(Router::new().route("/profiles/{id}", routing::get(profile)).with_state(app))
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Freshness {
    /// The lowest version that the caller accepts. Default: any version.
    min_version: Option<String>,
}

/// The profile of a user.
#[derive(Serialize)]
struct Body<'a> {
    id: Uuid,
    version: i64,
    email: &'a str,
    display_name: &'a str,
}

async fn profile(
    State(App { reads, waiters }): State<App>,
    caller: Caller,
    id: Result<Path<Uuid>, PathRejection>,
    freshness: Result<Query<Freshness>, QueryRejection>,
    preconditions: Preconditions,
) -> Result<Response, Response> {
    let Path(id) = id.map_err(|rejection| rejection.into_problem().into_response())?;
    let Query(freshness) = freshness.map_err(|rejection| rejection.into_problem().into_response())?;
    let min_version = freshness.min_version.as_deref().map_or(Ok(0), number(0..=i64::MAX));
    let min_version =
        min_version.map_err(|rule| problem(INVALID_QUERY, format!("min_version: {rule}")).into_response())?;
    let found = reads.find(id).await.map_err(|error| {
        tracing::error!(error = %format!("{error:#}"), "Valkey does not answer");
        no_answer()
    })?;
    if found.satisfies(min_version) {
        return Ok(answer(&caller, id, &found, &preconditions));
    }
    if min_version == 0 {
        return Err(retry_later(VIEW_INCOMPLETE, "the cache is being filled from the topic; retry the request"));
    }
    match waiters.wait(id, min_version, WAIT_LIMIT).await {
        Ended::Found(found) => Ok(answer(&caller, id, &found, &preconditions)),
        Ended::TooLate => {
            let detail = "the cache does not have this version yet; if a command returned it, it will arrive; retry \
                          the request";
            Err(retry_later(VERSION_NOT_ARRIVED, detail))
        }
        Ended::TooMany => {
            let detail = "too many requests wait for their min_version; retry the request";
            Err(retry_later(TOO_MANY_WAITERS, detail))
        }
        Ended::Failed => Err(no_answer()),
    }
}

fn answer(caller: &Caller, id: Uuid, found: &Lookup, preconditions: &Preconditions) -> Response {
    let Lookup { version, profile, .. } = found;
    let Some(Profile { email, display_name, owner }) = profile else {
        return problem(UNKNOWN_USER, "no user has this id; it may have been deleted").into_response();
    };
    if let Err(forbidden) = caller.require_owner(*owner) {
        return forbidden.into_response();
    }
    preconditions.answer_with(*version, Json(Body { id, version: *version, email, display_name }))
}

fn no_answer() -> Response {
    retry_later(STORE_UNAVAILABLE, "the store of the cache does not answer; retry the request")
}
