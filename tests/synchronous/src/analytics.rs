//! The role `analytics`: counts registrations, each once.

use std::net::SocketAddr;

use axum::extract::{Path, State};
use axum::http::StatusCode;
use axum::{Json, Router, routing};
use prometheus_client::registry::Registry;
use serde_json::{Value, json};
use shared::platform::database;
use shared::platform::secret::{Secret, SecretSetting};
use sqlx::PgPool;
use tokio_util::task::TaskTracker;
use uuid::Uuid;

use crate::problem::Error;
use crate::server;

/// Rows of an hour. Each call locks one of them until its commit.
const SHARDS: i32 = 16;

#[derive(clap::Args)]
pub struct Config {
    #[command(flatten)]
    database_url: Secret<DatabaseUrl>,
}

struct DatabaseUrl;

impl SecretSetting for DatabaseUrl {
    const NAME: &'static str = "ANALYTICS_DATABASE_URL";
    const HELP: &'static str = "URL of this role's own database, with the login that owns its tables.";
}

pub async fn serve(addr: SocketAddr, config: Config) -> anyhow::Result<()> {
    let db = database::pool(database::options(config.database_url.expose())?);
    sqlx::migrate!("./migrations/analytics").run(&db).await?;
    let routes = Router::new()
        .route("/registrations/{id}", routing::put(count))
        .route("/funnel", routing::get(funnel))
        .with_state(db);
    server::serve(addr, routes, Registry::default(), TaskTracker::new()).await
}

/// One transaction. Crash before its commit: nothing is counted. Crash after it: the caller repeats
/// the call, which counts nothing.
async fn count(State(db): State<PgPool>, Path(user): Path<Uuid>) -> Result<StatusCode, Error> {
    let mut tx = db.begin().await?;
    let insert = sqlx::query("insert into counted (user_id) values ($1) on conflict do nothing").bind(user);
    if insert.execute(&mut *tx).await?.rows_affected() == 1 {
        let shard = fastrand::i32(0..SHARDS);
        let raise = "insert into registrations as stored (hour, shard, registrations) values (date_trunc('hour', now(), 'UTC'), $1, 1)
                     on conflict (hour, shard) do update set registrations = stored.registrations + 1";
        sqlx::query(raise).bind(shard).execute(&mut *tx).await?;
        tx.commit().await?;
    }
    Ok(StatusCode::NO_CONTENT)
}

async fn funnel(State(db): State<PgPool>) -> Result<Json<Value>, Error> {
    let sum = sqlx::query_scalar("select coalesce(sum(registrations), 0)::bigint from registrations");
    let registered: i64 = sum.fetch_one(&db).await?;
    Ok(Json(json!({ "registered": registered })))
}
