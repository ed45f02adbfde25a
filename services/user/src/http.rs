//! The public API. A handler opens a transaction, calls a command, commits, and notifies the relay.
//! Every command takes an `Idempotency-Key`, `If-Match` and `If-None-Match`.

use axum::extract::rejection::{JsonRejection, PathRejection};
use axum::extract::{FromRequestParts, MatchedPath, Path, State};
use axum::http::request::Parts;
use axum::http::{HeaderMap, StatusCode, header};
use axum::response::{IntoResponse, Response};
use axum::{Json, Router, routing};
use headers::HeaderMapExt;
use serde::{Deserialize, Serialize};
use serde_json::json;
use shared::events::check_address;
use shared::fault;
use shared::messaging::Wake;
use shared::platform::access::{Caller, PublicRoutes, Rates};
use shared::platform::preconditions::{self, Preconditions};
use shared::platform::problem::IntoProblem;
use shared::platform::telemetry;
use sqlx::PgPool;
use uuid::Uuid;

use crate::commands::{self, User};
use crate::idempotency::{self, Claim, Claimed, Hasher, Key};
use crate::problem::Error;
use crate::turns::{Target, Turn, Turns};

const DISPLAY_NAME_MAX: usize = 100;
const IDEMPOTENCY_KEY_MAX: usize = 255;
/// What the trace of a command notes.
const TRANSACTION_BEGUN: &str = "transaction begun";
const TRANSACTION_COMMITTED: &str = "transaction committed";

#[derive(Clone)]
pub struct App {
    pub db: PgPool,
    pub wake: Wake,
    pub idempotency: Hasher,
    /// The limits of registrations: each sends a mail to an address that the caller chooses.
    pub registrations: Rates,
    pub turns: Turns,
}

pub fn routes(app: App) -> PublicRoutes {
    let routes = Router::new()
        .route("/users", routing::post(register))
        .route("/users/{id}", routing::get(show).patch(rename).delete(erase))
        .route("/users/{id}/email", routing::put(change_email))
        .with_state(app);
    PublicRoutes::default().for_owners(routes)
}

#[derive(Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
struct Registration {
    email: String,
    display_name: String,
}

#[derive(Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
struct Renaming {
    display_name: String,
}

#[derive(Deserialize, Serialize)]
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

/// What the head of a command says.
struct Head {
    caller: Caller,
    /// `None` for a registration.
    user: Option<Uuid>,
    preconditions: Preconditions,
    key: Option<Key>,
    /// The path and the preconditions as text. A repetition has the same.
    target: Vec<String>,
}

impl FromRequestParts<App> for Head {
    type Rejection = Error;

    async fn from_request_parts(parts: &mut Parts, app: &App) -> Result<Self, Error> {
        let Ok(route) = MatchedPath::from_request_parts(parts, app).await else {
            return Err(anyhow::anyhow!("a command was routed without a route").into());
        };
        let Ok(caller) = Caller::from_request_parts(parts, app).await else {
            return Err(anyhow::anyhow!("a command was routed without a caller").into());
        };
        let principal = caller.actor().map(|principal| principal.to_string()).unwrap_or_default();
        let scope = format!("{principal} {} {}", parts.method, route.as_str());
        let user = Path::from_request_parts(parts, app).await.ok().map(|Path(id)| id);
        let headers = &parts.headers;
        let mut target = vec![parts.uri.path().to_owned()];
        for name in preconditions::names() {
            let lines = headers.get_all(name).into_iter().map(|line| String::from_utf8_lossy(line.as_bytes()));
            target.extend(lines.map(|line| format!("{name}: {line}")));
        }
        let preconditions = Preconditions::of(headers);
        Ok(Self { caller, user, preconditions, key: idempotency_key(headers, scope)?, target })
    }
}

/// A command whose transaction is open.
struct Begun {
    turn: Turn,
    claim: Option<Claim>,
    wake: Wake,
}

/// The result of [`begin`].
enum Beginning {
    First(Begun),
    /// The request was answered before, with this answer.
    Repeated(Response),
}

/// Opens the transaction of a command, and claims its key.
async fn begin(app: &App, head: &Head, body: impl Serialize) -> Result<Beginning, Error> {
    let key = head.key.as_ref().map(|key| Target::Key(format!("{}\n{}", key.scope, key.text)));
    let mut turn = app.turns.take(head.user.map(Target::User).into_iter().chain(key).collect()).await?;
    telemetry::note(TRANSACTION_BEGUN);
    let mut claim = None;
    if let Some(key) = &head.key {
        let request = serde_json::to_vec(&(&head.target, body)).map_err(anyhow::Error::new)?;
        match idempotency::claim(turn.tx(), &app.idempotency, key, &request).await? {
            Claimed::Answered(status, accepted) => return Ok(Beginning::Repeated(answer(status, accepted))),
            Claimed::Free(free) => claim = Some(free),
        }
    }
    Ok(Beginning::First(Begun { turn, claim, wake: app.wake.clone() }))
}

impl Begun {
    /// The change, the events and the stored answer are one transaction. Crash before the commit:
    /// nothing is stored, and a retry with the same key runs the command. Crash after it: a retry
    /// with the same key gets the stored answer.
    async fn commit(mut self, status: StatusCode, accepted: Accepted) -> Result<Response, Error> {
        if let Some(claim) = self.claim {
            idempotency::store(self.turn.tx(), claim, status, &json!(accepted)).await?;
        }
        fault::point("user.before_commit");
        self.turn.commit().await?;
        telemetry::note(TRANSACTION_COMMITTED);
        fault::point("user.after_commit");
        self.wake.notify();
        Ok(answer(status, accepted))
    }
}

async fn register(State(app): State<App>, head: Head, body: Body<Registration>) -> Result<Response, Error> {
    let Json(registration) = body.map_err(malformed)?;
    let email = valid_email(&registration.email)?;
    let display_name = valid_display_name(&registration.display_name)?;
    app.registrations.check(&head.caller)?;
    let mut command = match begin(&app, &head, &registration).await? {
        Beginning::First(command) => command,
        Beginning::Repeated(answer) => return Ok(answer),
    };
    if !head.preconditions.allow_change_of(None) {
        return Err(Error::NothingToMatch);
    }
    let user = commands::register(command.turn.tx(), &head.caller, email, display_name).await?;
    command.commit(StatusCode::CREATED, Accepted { id: user.id, version: user.version }).await
}

async fn show(State(app): State<App>, caller: Caller, id: Id, preconditions: Preconditions) -> Result<Response, Error> {
    let Path(id) = id.map_err(malformed)?;
    let User { id, version, profile } = commands::find(&mut *app.db.acquire().await?, id).await?;
    caller.require_owner(profile.owner)?;
    let body = json!({ "id": id, "version": version, "email": profile.email, "display_name": profile.display_name });
    Ok(preconditions.answer_with(version, Json(body)))
}

async fn rename(State(app): State<App>, id: Id, head: Head, body: Body<Renaming>) -> Result<Response, Error> {
    let Path(id) = id.map_err(malformed)?;
    let Json(renaming) = body.map_err(malformed)?;
    let display_name = valid_display_name(&renaming.display_name)?;
    let mut command = match begin(&app, &head, &renaming).await? {
        Beginning::First(command) => command,
        Beginning::Repeated(answer) => return Ok(answer),
    };
    let user = commands::rename(command.turn.tx(), &head.caller, id, &head.preconditions, &display_name).await?;
    command.commit(StatusCode::OK, Accepted { id, version: user.version }).await
}

async fn change_email(State(app): State<App>, id: Id, head: Head, body: Body<NewAddress>) -> Result<Response, Error> {
    let Path(id) = id.map_err(malformed)?;
    let Json(address) = body.map_err(malformed)?;
    let email = valid_email(&address.email)?;
    let mut command = match begin(&app, &head, &address).await? {
        Beginning::First(command) => command,
        Beginning::Repeated(answer) => return Ok(answer),
    };
    let user = commands::change_email(command.turn.tx(), &head.caller, id, &head.preconditions, &email).await?;
    command.commit(StatusCode::OK, Accepted { id, version: user.version }).await
}

async fn erase(State(app): State<App>, id: Id, head: Head) -> Result<Response, Error> {
    let Path(id) = id.map_err(malformed)?;
    let mut command = match begin(&app, &head, ()).await? {
        Beginning::First(command) => command,
        Beginning::Repeated(answer) => return Ok(answer),
    };
    let version = commands::erase(command.turn.tx(), &head.caller, id, &head.preconditions).await?;
    command.commit(StatusCode::NO_CONTENT, Accepted { id, version }).await
}

fn answer(status: StatusCode, accepted: Accepted) -> Response {
    if status == StatusCode::NO_CONTENT {
        return status.into_response();
    }
    let location = format!("/users/{}", accepted.id);
    let etag = preconditions::etag(accepted.version);
    let mut response = (status, Json(accepted)).into_response();
    response.headers_mut().typed_insert(etag);
    if status == StatusCode::CREATED {
        response.headers_mut().insert(header::LOCATION, location.parse().expect("a UUID is a valid header"));
    }
    response
}

fn malformed(rejection: impl IntoProblem) -> Error {
    Error::Malformed(Box::new(rejection.into_problem()))
}

fn idempotency_key(headers: &HeaderMap, scope: String) -> Result<Option<Key>, Error> {
    let mut lines = headers.get_all("idempotency-key").into_iter();
    let Some(value) = lines.next() else { return Ok(None) };
    if lines.next().is_some() {
        return Err(Error::TwoKeys);
    }
    match value.to_str() {
        Ok(key) if (1..=IDEMPOTENCY_KEY_MAX).contains(&key.len()) => Ok(Some(Key { scope, text: key.to_owned() })),
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
