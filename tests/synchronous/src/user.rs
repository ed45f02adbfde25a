//! The role `user`: registers users, and calls the receivers within the request.

use std::collections::HashSet;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex};

use axum::extract::rejection::JsonRejection;
use axum::extract::{Path, State};
use axum::http::{HeaderMap, StatusCode, header};
use axum::response::{IntoResponse, Response};
use axum::{Json, Router, routing};
use prometheus_client::registry::Registry;
use serde::{Deserialize, Serialize};
use serde_json::json;
use shared::events::check_address;
use shared::platform::database;
use shared::platform::secret::{Secret, SecretSetting};
use sqlx::PgPool;
use tokio::time::{Duration, Instant, sleep};
use tokio_util::task::TaskTracker;
use uuid::Uuid;

use crate::calls::{Calls, CallsConfig};
use crate::problem::Error;
use crate::receiver::Receiver;
use crate::registrations::{self, Begun, Hasher, Key, User};
use crate::server;

/// How long the variant `background` makes missing calls again.
const BACKGROUND_LIMIT: Duration = Duration::from_secs(60);
/// The pauses before the first and before each later retry. Half of each pause is random, so that
/// the registrations of an outage are not all retried together.
const BACKGROUND_PAUSES: [Duration; 2] = [Duration::from_secs(1), Duration::from_secs(5)];
/// Registrations that wait in memory at the same time: some 20 MB.
const BACKGROUND_MOST: usize = 10_000;
const DISPLAY_NAME_MAX: usize = 100;
const IDEMPOTENCY_KEY_MAX: usize = 255;

#[derive(clap::Args)]
pub struct Config {
    #[command(flatten)]
    database_url: Secret<DatabaseUrl>,
    #[command(flatten)]
    idempotency_secret: Secret<IdempotencySecret>,
    #[command(flatten)]
    calls: CallsConfig,
}

struct DatabaseUrl;

impl SecretSetting for DatabaseUrl {
    const NAME: &'static str = "USER_DATABASE_URL";
    const HELP: &'static str = "URL of this role's own database, with the login that owns its tables.";
}

struct IdempotencySecret;

impl SecretSetting for IdempotencySecret {
    const NAME: &'static str = "IDEMPOTENCY_SECRET";
    const HELP: &'static str = "The key of the hashes of idempotent requests: at least 32 random characters.";
}

#[derive(Clone)]
struct App {
    db: PgPool,
    hasher: Hasher,
    calls: Arc<Calls>,
    /// Registrations in progress. They continue when the caller hangs up.
    tasks: TaskTracker,
    /// The users whose missing calls are made again in the background.
    waiting: Arc<Mutex<HashSet<Uuid>>>,
}

pub async fn serve(addr: SocketAddr, config: Config) -> anyhow::Result<()> {
    let db = database::pool(database::options(config.database_url.expose())?);
    sqlx::migrate!("./migrations/user").run(&db).await?;
    let mut metrics = Registry::default();
    let calls = Arc::new(Calls::new(&config.calls, &mut metrics)?);
    let hasher = Hasher::new(config.idempotency_secret.expose())?;
    let app = App { db, hasher, calls, tasks: TaskTracker::new(), waiting: Arc::default() };
    let tasks = app.tasks.clone();
    let routes =
        Router::new().route("/users", routing::post(register)).route("/users/{id}", routing::get(show)).with_state(app);
    server::serve(addr, routes, metrics, tasks).await
}

#[derive(Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
struct Registration {
    email: String,
    display_name: String,
}

/// Inserts the user, makes the calls, and answers 201 with the receivers that it could not reach.
async fn register(
    State(app): State<App>,
    headers: HeaderMap,
    body: Result<Json<Registration>, JsonRejection>,
) -> Result<Response, Error> {
    let Json(registration) = body.map_err(Error::Malformed)?;
    let request = serde_json::to_vec(&registration).map_err(anyhow::Error::new)?;
    let email = valid_email(&registration.email)?;
    let display_name = valid_display_name(&registration.display_name)?;
    let key = idempotency_key(&headers)?.map(|text| Key { text, request });
    let tasks = app.tasks.clone();
    let work = async move {
        let begun = registrations::begin(&app.db, &app.hasher, key, email, display_name).await?;
        let missing = app.calls.make(&begun.user, &begun.missing).await;
        // The user exists and the calls were made. If this write fails, a repeated request repeats
        // them.
        if !begun.missing.is_empty()
            && let Err(error) = registrations::finish(&app.db, &begun, &missing).await
        {
            tracing::warn!(user.id = %begun.user.id, %error, "cannot store which calls were made");
        }
        let User { id, version, .. } = begun.user;
        if !missing.is_empty() && app.calls.continue_after_the_answer() && begin_waiting(&app, id) {
            app.tasks.spawn(keep_trying(app.clone(), begun, missing.clone()));
        }
        let missing: Vec<&str> = missing.iter().map(|receiver| receiver.name()).collect();
        let location = [(header::LOCATION, format!("/users/{id}"))];
        Ok((StatusCode::CREATED, location, Json(json!({ "id": id, "version": version, "missing": missing })))
            .into_response())
    };
    tasks.spawn(work).await.map_err(anyhow::Error::new)?
}

/// `false`: the calls of the user are already made again, after an earlier request, or too many
/// wait.
fn begin_waiting(app: &App, user: Uuid) -> bool {
    let mut waiting = app.waiting.lock().expect("no thread panics while it holds this lock");
    waiting.len() < BACKGROUND_MOST && waiting.insert(user)
}

/// Makes missing calls again, until there are none or the time is over. Crash while it waits: the
/// calls are made only if the caller repeats the request. Crash between the calls and their note:
/// as after [`registrations::finish`].
async fn keep_trying(app: App, begun: Begun, mut missing: Vec<Receiver>) {
    let end = Instant::now() + BACKGROUND_LIMIT;
    let [mut pause, later] = BACKGROUND_PAUSES;
    while !missing.is_empty() && Instant::now() < end {
        sleep(pause.mul_f64(0.5 + fastrand::f64() / 2.0)).await;
        pause = later;
        if app.calls.refuses(&missing) {
            continue;
        }
        match registrations::resume(&app.db, &begun).await {
            Ok(Some(still_missing)) => missing = still_missing,
            // Without a key no other request can make these calls.
            Ok(None) => {}
            Err(error) => {
                tracing::debug!(user.id = %begun.user.id, %error, "cannot make the missing calls now; will retry");
                continue;
            }
        }
        missing = app.calls.make(&begun.user, &missing).await;
        if let Err(error) = registrations::finish(&app.db, &begun, &missing).await {
            tracing::warn!(user.id = %begun.user.id, %error, "cannot store which calls were made");
        }
    }
    if !missing.is_empty() {
        tracing::warn!(user.id = %begun.user.id, missing = missing.len(), "gave up the missing calls of a registration");
    }
    app.waiting.lock().expect("no thread panics while it holds this lock").remove(&begun.user.id);
}

async fn show(State(app): State<App>, Path(id): Path<Uuid>) -> Result<Response, Error> {
    let User { id, version, email, display_name } = registrations::find(&mut *app.db.acquire().await?, id).await?;
    let user = json!({ "id": id, "version": version, "email": email, "display_name": display_name });
    Ok(Json(user).into_response())
}

fn idempotency_key(headers: &HeaderMap) -> Result<Option<String>, Error> {
    let Some(value) = headers.get("idempotency-key") else { return Ok(None) };
    let rule = "1 to 255 printable ASCII characters, for example a UUID";
    let invalid = Error::Invalid { field: "Idempotency-Key", rule };
    match value.to_str() {
        Ok(key) if (1..=IDEMPOTENCY_KEY_MAX).contains(&key.len()) => Ok(Some(key.to_owned())),
        _ => Err(invalid),
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
