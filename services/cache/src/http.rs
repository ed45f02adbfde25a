//! Who a user is now. With `min_version`, which every command of the user service answers, a caller reads its own writes
//! across the asynchronous boundary.

use axum::extract::rejection::{PathRejection, QueryRejection};
use axum::extract::{Path, Query, State};
use axum::http::{HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use axum::{Json, Router, routing};
use problem_details::ProblemDetails;
use serde::Deserialize;
use serde_json::json;
use shared::events::Profile;
use shared::service::http::{IntoProblem, problem};
use tokio::time::{Duration, Instant, sleep};
use uuid::Uuid;

use crate::view::{Lookup, View};

/// How long a request waits for its `min_version`; an event takes some ten milliseconds.
const PATIENCE: Duration = Duration::from_secs(2);
const POLL_INTERVAL: Duration = Duration::from_millis(20);

pub fn routes(view: View) -> Router {
    Router::new().route("/profiles/{id}", routing::get(profile)).with_state(view)
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Freshness {
    /// The version that the answer must have at least. Absent: whatever is there.
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
    let deadline = Instant::now() + PATIENCE;
    loop {
        let found = view.find(id).await.map_err(|error| {
            tracing::error!(error = %format!("{error:#}"), "Valkey does not answer");
            problem(StatusCode::SERVICE_UNAVAILABLE, "the cache's store does not answer; try again")
        })?;
        // Also of an incomplete view a version may be known, but an older one than was answered before.
        if found.complete && found.version >= min_version {
            return Ok(answer(id, found));
        }
        if min_version <= 0 {
            return Ok(not_yet("the cache is being filled"));
        }
        if Instant::now() >= deadline {
            return Ok(not_yet("this version has not arrived; if a command answered it, it will"));
        }
        sleep(POLL_INTERVAL).await;
    }
}

fn answer(id: Uuid, Lookup { version, profile, .. }: Lookup) -> Response {
    let Some(Profile { email, display_name }) = profile else {
        return problem(StatusCode::NOT_FOUND, "there is no user with this id, or not any more").into_response();
    };
    let body = json!({ "id": id, "version": version, "email": email, "display_name": display_name });
    ([(header::ETAG, format!("\"{version}\""))], Json(body)).into_response()
}

fn not_yet(detail: &str) -> Response {
    let problem = problem(StatusCode::SERVICE_UNAVAILABLE, format!("{detail}; try again"));
    ([(header::RETRY_AFTER, HeaderValue::from_static("1"))], problem).into_response()
}
