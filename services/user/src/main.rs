//! The user service: the only one that changes users. A command changes a row and writes the events that tell of it, in one
//! transaction; the relay takes them to `user.events.v1` and `user.state.v1`, and from there to whoever listens.

mod commands;
mod heartbeat;
mod http;
mod idempotency;
mod problem;
mod republish;

use std::net::SocketAddr;
use std::time::Duration;

use clap::{Parser, Subcommand};
use republish::Republish;
use secrecy::{ExposeSecret, SecretString};
use shared::events::Topic;
use shared::service::{self, Service, ServiceConfig};
use sqlx::migrate::Migrator;

static MIGRATIONS: Migrator = sqlx::migrate!("../../migrations/user");

/// Registers users, changes them, erases them, and tells of it.
#[derive(Parser)]
struct Cli {
    #[command(flatten)]
    config: Config,
    #[command(subcommand)]
    command: Option<Command>,
}

#[derive(Subcommand, Clone)]
enum Command {
    /// Run the service (the default).
    Serve,
    /// Ask the running service whether it is ready; exit 0 if so.
    Healthcheck,
    /// Tell the current states once more, to repair a damaged user.state.v1 or to fill a new one. A running service publishes
    /// them. Doing it twice, or beside everything else, is harmless.
    Republish(Republish),
}

#[derive(clap::Args)]
struct Config {
    /// Where the public API is answered.
    #[arg(long, env, default_value = "127.0.0.1:8080")]
    http_addr: SocketAddr,
    /// The service's own database: postgres://waybill_user:password@host:port/waybill_user
    #[arg(long, env, hide_env_values = true)]
    user_database_url: SecretString,
    /// At least 32 random characters, the same on every replica: keys the hashes of idempotent requests. Changing it forgets
    /// the answers stored so far.
    #[arg(long, env, hide_env_values = true)]
    idempotency_secret: SecretString,
    /// How often each partition of user.state.v1 gets a record, without which Kafka would not compact a quiet one and erased
    /// addresses would stay in it. A day, as long as a segment is open.
    #[arg(long, env, default_value_t = 86_400_000, value_parser = clap::value_parser!(u64).range(1..))]
    heartbeat_interval_ms: u64,
    #[command(flatten)]
    service: ServiceConfig,
}

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    let cli = Cli::parse();
    match cli.command.unwrap_or(Command::Serve) {
        Command::Serve => serve(cli.config).await,
        Command::Healthcheck => service::healthcheck(&cli.config.service).await,
        Command::Republish(options) => {
            let db = service::pool(cli.config.user_database_url.expose_secret().parse()?);
            republish::republish(&db, &options).await
        }
    }
}

async fn serve(config: Config) -> anyhow::Result<()> {
    let idempotency = idempotency::Hasher::new(&config.idempotency_secret)?;
    let mut service = Service::start("user", &config.service).await?;
    let db = service.database(config.user_database_url.expose_secret(), &MIGRATIONS).await?;
    service.own_topics(&[Topic::USER_EVENTS, Topic::USER_STATE]);
    let wake = service.relay(&db);
    service.spawn("idempotency expiry", idempotency::expire(db.clone()));
    let interval = Duration::from_millis(config.heartbeat_interval_ms);
    service.spawn("heartbeat", heartbeat::run(db.clone(), wake.clone(), interval));
    service.http(config.http_addr, http::routes(http::App { db, wake, idempotency })).await?;
    service.run().await
}
