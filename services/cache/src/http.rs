//! Queries for the current profile of a user. Every command of the user service answers with a
//! version. A caller that sends it as `min_version` reads its own write, although the cache is
//! updated asynchronously.

use axum::extract::rejection::{PathRejection, QueryRejection};
use axum::extract::{Path, Query, State};
use axum::http::{HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use axum::{Json, Router, routing};
use problem_details::ProblemDetails;
use serde::Deserialize;
use serde_json::json;
use shared::events::Profile;
use shared::platform::http::{IntoProblem, problem};
use tokio::time::{Duration, Instant, sleep};
use uuid::Uuid;

use crate::view::{Lookup, View};

/// How long a request waits for its `min_version`. Usually an event arrives within tens of
/// milliseconds.
const WAIT_LIMIT: Duration = Duration::from_secs(2);
const POLL_INTERVAL: Duration = Duration::from_millis(20);

pub fn routes(view: View) -> Router {
    Router::new().route("/profiles/{id}", routing::get(profile)).with_state(view)
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Freshness {
    /// The lowest version that the caller accepts. Default: any version.
    #[serde(default)]
    min_version: i64,
}

async fn profile(
    State(view): State<View>,
    id: Result<Path<Uuid>, PathRejection>,
    freshness: Result<Query<Freshness>, QueryRejection>,
) -> Result<Response, ProblemDetails> {
    let Path(id) = id.map_err(IntoProblem::into_problem)?;
    let Query(Freshness { min_version }) = freshness.map_err(IntoProblem::into_problem)?;
    let deadline = Instant::now() + WAIT_LIMIT;
    loop {
        let found = view.find(id).await.map_err(|error| {
            tracing::error!(error = %format!("{error:#}"), "Valkey does not answer");
            problem(StatusCode::SERVICE_UNAVAILABLE, "the store of the cache does not answer; retry the request")
        })?;
        // An incomplete view may contain an older version than the service has returned before.
        if found.complete && found.version >= min_version {
            return Ok(answer(id, found));
        }
        if min_version <= 0 {
            return Ok(not_yet("the cache is being filled from the topic"));
        }
        if Instant::now() >= deadline {
            return Ok(not_yet("the cache does not have this version yet; if a command returned it, it will arrive"));
        }
        sleep(POLL_INTERVAL).await;
    }
}

fn answer(id: Uuid, Lookup { version, profile, .. }: Lookup) -> Response {
    let Some(Profile { email, display_name }) = profile else {
        return problem(StatusCode::NOT_FOUND, "no user has this id; it may have been deleted").into_response();
    };
    let body = json!({ "id": id, "version": version, "email": email, "display_name": display_name });
    ([(header::ETAG, format!("\"{version}\""))], Json(body)).into_response()
}

fn not_yet(detail: &str) -> Response {
    let problem = problem(StatusCode::SERVICE_UNAVAILABLE, format!("{detail}; retry the request"));
    ([(header::RETRY_AFTER, HeaderValue::from_static("1"))], problem).into_response()
}
