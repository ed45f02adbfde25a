//! The public API. A handler opens a transaction, calls a command, commits, and notifies the relay.

use axum::extract::rejection::{JsonRejection, PathRejection};
use axum::extract::{Path, State};
use axum::http::{HeaderMap, StatusCode, header};
use axum::response::{IntoResponse, Response};
use axum::{Json, Router, routing};
use serde::{Deserialize, Serialize};
use serde_json::json;
use shared::events::{Profile, check_address};
use shared::fault;
use shared::messaging::Wake;
use shared::platform::http::IntoProblem;
use sqlx::PgPool;
use uuid::Uuid;

use crate::commands::{self, User};
use crate::idempotency::{self, Claimed, Hasher};
use crate::problem::Error;

const DISPLAY_NAME_MAX: usize = 100;
const IDEMPOTENCY_KEY_MAX: usize = 255;

#[derive(Clone)]
pub struct App {
    pub db: PgPool,
    pub wake: Wake,
    pub idempotency: Hasher,
}

pub fn routes(app: App) -> Router {
    Router::new()
        .route("/users", routing::post(register))
        .route("/users/{id}", routing::get(show).patch(rename).delete(erase))
        .route("/users/{id}/email", routing::put(change_email))
        .with_state(app)
}

#[derive(Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
struct Registration {
    email: String,
    display_name: String,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Renaming {
    display_name: String,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct NewAddress {
    email: String,
}

/// The answer to a command. It contains no personal data, so stored answers contain none.
#[derive(Serialize, Deserialize)]
struct Accepted {
    id: Uuid,
    version: i64,
}

type Body<T> = Result<Json<T>, JsonRejection>;
type Id = Result<Path<Uuid>, PathRejection>;

/// The user, the two events and the stored answer are one transaction. Crash before the commit:
/// nothing is stored, and a retry with the same key registers the user. Crash after it: a retry
/// with the same key gets the stored answer.
async fn register(State(app): State<App>, headers: HeaderMap, body: Body<Registration>) -> Result<Response, Error> {
    let Json(registration) = body.map_err(malformed)?;
    let profile = Profile {
        email: valid_email(&registration.email)?,
        display_name: valid_display_name(&registration.display_name)?,
    };
    let key = idempotency_key(&headers)?;
    let mut tx = app.db.begin().await?;
    let mut claim = None;
    if let Some(key) = key {
        let request = serde_json::to_vec(&registration).map_err(anyhow::Error::new)?;
        match idempotency::claim(&mut tx, &app.idempotency, key, &request).await? {
            Claimed::Answered(status, accepted) => return Ok(answer(status, accepted)),
            Claimed::Free(free) => claim = Some(free),
        }
    }
    let user = commands::register(&mut tx, profile).await?;
    if let Some(claim) = claim {
        let stored = json!(Accepted { id: user.id, version: user.version });
        idempotency::store(&mut tx, claim, StatusCode::CREATED, &stored).await?;
    }
    fault::point("user.before_commit");
    tx.commit().await?;
    fault::point("user.after_commit");
    app.wake.notify();
    Ok(answer(StatusCode::CREATED, Accepted { id: user.id, version: user.version }))
}

async fn show(State(app): State<App>, id: Id) -> Result<Response, Error> {
    let Path(id) = id.map_err(malformed)?;
    let User { id, version, profile } = commands::find(&mut *app.db.acquire().await?, id).await?;
    let body = json!({ "id": id, "version": version, "email": profile.email, "display_name": profile.display_name });
    Ok(([(header::ETAG, etag(version))], Json(body)).into_response())
}

async fn rename(State(app): State<App>, id: Id, headers: HeaderMap, body: Body<Renaming>) -> Result<Response, Error> {
    let Path(id) = id.map_err(malformed)?;
    let Json(renaming) = body.map_err(malformed)?;
    let display_name = valid_display_name(&renaming.display_name)?;
    let expected = if_match(&headers)?;
    let mut tx = app.db.begin().await?;
    let user = commands::rename(&mut tx, id, expected, &display_name).await?;
    tx.commit().await?;
    app.wake.notify();
    Ok(answer(StatusCode::OK, Accepted { id, version: user.version }))
}

async fn change_email(
    State(app): State<App>,
    id: Id,
    headers: HeaderMap,
    body: Body<NewAddress>,
) -> Result<Response, Error> {
    let Path(id) = id.map_err(malformed)?;
    let Json(address) = body.map_err(malformed)?;
    let email = valid_email(&address.email)?;
    let expected = if_match(&headers)?;
    let mut tx = app.db.begin().await?;
    let user = commands::change_email(&mut tx, id, expected, &email).await?;
    tx.commit().await?;
    app.wake.notify();
    Ok(answer(StatusCode::OK, Accepted { id, version: user.version }))
}

async fn erase(State(app): State<App>, id: Id, headers: HeaderMap) -> Result<StatusCode, Error> {
    let Path(id) = id.map_err(malformed)?;
    let expected = if_match(&headers)?;
    let mut tx = app.db.begin().await?;
    commands::erase(&mut tx, id, expected).await?;
    tx.commit().await?;
    app.wake.notify();
    Ok(StatusCode::NO_CONTENT)
}

fn answer(status: StatusCode, accepted: Accepted) -> Response {
    let location = format!("/users/{}", accepted.id);
    let mut response = (status, [(header::ETAG, etag(accepted.version))], Json(accepted)).into_response();
    if status == StatusCode::CREATED {
        response.headers_mut().insert(header::LOCATION, location.parse().expect("a UUID is a valid header"));
    }
    response
}

fn malformed(rejection: impl IntoProblem) -> Error {
    Error::Malformed(Box::new(rejection.into_problem()))
}

fn etag(version: i64) -> String {
    format!("\"{version}\"")
}

/// The version that `If-Match` requires; `None` if the caller accepts any version.
fn if_match(headers: &HeaderMap) -> Result<Option<i64>, Error> {
    let Some(value) = headers.get(header::IF_MATCH) else { return Ok(None) };
    let text = value.to_str().unwrap_or_default().trim();
    if text == "*" {
        return Ok(None);
    }
    let version = text.strip_prefix('"').and_then(|text| text.strip_suffix('"')).and_then(|text| text.parse().ok());
    version.map(Some).ok_or(Error::Invalid { field: "If-Match", rule: "send the ETag of the user, for example \"3\"" })
}

fn idempotency_key(headers: &HeaderMap) -> Result<Option<&str>, Error> {
    let Some(value) = headers.get("idempotency-key") else { return Ok(None) };
    match value.to_str() {
        Ok(key) if (1..=IDEMPOTENCY_KEY_MAX).contains(&key.len()) => Ok(Some(key)),
        _ => Err(Error::Invalid {
            field: "Idempotency-Key",
            rule: "1 to 255 printable ASCII characters, for example a UUID",
        }),
    }
}

fn valid_email(email: &str) -> Result<String, Error> {
    let email = email.trim();
    check_address(email).map_err(|rule| Error::Invalid { field: "email", rule })?;
    Ok(email.to_owned())
}

fn valid_display_name(name: &str) -> Result<String, Error> {
    let name = name.trim();
    match name.chars().count() {
        0 => Err(Error::Invalid { field: "display_name", rule: "must not be empty" }),
        1..=DISPLAY_NAME_MAX if !name.contains(char::is_control) => Ok(name.to_owned()),
        1..=DISPLAY_NAME_MAX => Err(Error::Invalid { field: "display_name", rule: "no control characters" }),
        _ => Err(Error::Invalid { field: "display_name", rule: "at most 100 characters" }),
    }
}
