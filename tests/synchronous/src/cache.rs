//! The role `cache`: serves profiles from a store. If the store lacks a profile, the role `cache`
//! reads it from the role `user`. So a lost call makes one read slower, but loses no profile.

use std::net::SocketAddr;
use std::sync::Arc;

use axum::extract::{Path, Query, State};
use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};
use axum::{Json, Router, routing};
use prometheus_client::registry::Registry;
use redis::Script;
use reqwest::Client;
use serde::{Deserialize, Serialize};
use serde_json::Value;
use tokio::time::Duration;
use tokio_util::task::TaskTracker;
use uuid::Uuid;

use crate::server;
use crate::waybill::valkey::{Valkey, ValkeyConfig};

/// Writes a profile unless the store has the same version or a newer one.
const WRITE: &str = "
    local stored = redis.call('HGET', KEYS[1], 'version')
    if not stored or tonumber(stored) < tonumber(ARGV[1]) then
        redis.call('HSET', KEYS[1], 'version', ARGV[1], 'profile', ARGV[2])
    end";
/// How long the role `user` may take to answer.
const SOURCE_LIMIT: Duration = Duration::from_secs(2);

#[derive(clap::Args)]
pub struct Config {
    #[command(flatten)]
    valkey: ValkeyConfig,
    /// Prefix of every key, so that several systems can share a server.
    #[arg(long, env, default_value = "")]
    key_prefix: String,
    /// URL of the role `user`.
    #[arg(long, env)]
    user_url: String,
}

#[derive(Clone)]
struct App {
    valkey: Arc<Valkey>,
    write: Arc<Script>,
    prefix: String,
    source: Client,
    user_url: String,
}

#[derive(Serialize, Deserialize)]
struct Profile {
    version: i64,
    email: String,
    display_name: String,
}

pub async fn serve(addr: SocketAddr, config: Config) -> anyhow::Result<()> {
    let app = App {
        valkey: Arc::new(Valkey::new(config.valkey.client()?)),
        write: Arc::new(Script::new(WRITE)),
        prefix: config.key_prefix,
        source: Client::builder().no_proxy().timeout(SOURCE_LIMIT).build()?,
        user_url: config.user_url,
    };
    let routes = Router::new().route("/profiles/{id}", routing::get(show).put(put)).with_state(app);
    server::serve(addr, routes, Registry::default(), TaskTracker::new()).await
}

async fn put(State(app): State<App>, Path(id): Path<Uuid>, Json(profile): Json<Profile>) -> StatusCode {
    if app.store(id, &profile).await { StatusCode::NO_CONTENT } else { StatusCode::SERVICE_UNAVAILABLE }
}

#[derive(Deserialize)]
struct Freshness {
    #[serde(default)]
    min_version: i64,
}

/// The profile, from the store or else from the role `user`.
async fn show(State(app): State<App>, Path(id): Path<Uuid>, Query(freshness): Query<Freshness>) -> Response {
    let key = app.key(id);
    let read = async |mut server: crate::waybill::valkey::Server| -> redis::RedisResult<Option<String>> {
        redis::cmd("HGET").arg(key).arg("profile").query_async(&mut server.connection).await
    };
    let stored = app.valkey.request(read).await.ok().flatten();
    let stored = stored.and_then(|json| serde_json::from_str::<Profile>(&json).ok());
    if let Some(profile) = stored.filter(|profile| profile.version >= freshness.min_version) {
        return found(id, &profile);
    }
    let answer = app.source.get(format!("{}/users/{id}", app.user_url)).send().await;
    let Ok(answer) = answer else { return StatusCode::SERVICE_UNAVAILABLE.into_response() };
    if answer.status() == StatusCode::NOT_FOUND {
        return StatusCode::NOT_FOUND.into_response();
    }
    // The answer also contains the id, which serde ignores.
    match answer.json::<Profile>().await {
        Ok(profile) => {
            app.store(id, &profile).await;
            found(id, &profile)
        }
        Err(_) => StatusCode::SERVICE_UNAVAILABLE.into_response(),
    }
}

fn found(id: Uuid, profile: &Profile) -> Response {
    let Profile { version, email, display_name } = profile;
    let body: Value = serde_json::json!({ "id": id, "version": version, "email": email, "display_name": display_name });
    Json(body).into_response()
}

impl App {
    /// Returns whether the store has this version or a newer one.
    async fn store(&self, id: Uuid, profile: &Profile) -> bool {
        let Ok(json) = serde_json::to_string(profile) else { return false };
        let mut call = self.write.key(self.key(id));
        call.arg(profile.version).arg(json);
        let write = async |mut server: crate::waybill::valkey::Server| -> redis::RedisResult<()> {
            call.invoke_async(&mut server.connection).await
        };
        match self.valkey.request(write).await {
            Ok(()) => true,
            Err(error) => {
                tracing::warn!(user.id = %id, error = ?error.kind(), "cannot write a profile to the store");
                false
            }
        }
    }

    fn key(&self, id: Uuid) -> String {
        format!("{}synchronous:profile:{id}", self.prefix)
    }
}
