//! The user service: the only one that changes users. A command changes a row and writes its events
//! in one transaction. The relay publishes the events to `user.events.v1` and `user.state.v1`.

mod commands;
mod heartbeat;
mod http;
mod idempotency;
mod problem;
mod republish;
mod turns;

use std::net::SocketAddr;
use std::time::Duration;

use clap::{Parser, Subcommand};
use republish::Republish;
use shared::events::Topic;
use shared::messaging::RelayConfig;
use shared::platform::access::Rates;
use shared::platform::database;
use shared::platform::health::healthcheck;
use shared::platform::secret::{Secret, SecretSetting};
use shared::platform::settings::{self, number};
use shared::service::{self, DatabaseCommand, Service, ServiceConfig, create_topics};
use sqlx::migrate::Migrator;
use turns::Turns;

/// The topics that this service writes.
const TOPICS: &[Topic] = &[Topic::USER_EVENTS, Topic::USER_STATE];

static MIGRATIONS: Migrator = sqlx::migrate!("../../migrations/user");

/// Registers, changes and erases users, and publishes an event for each change.
#[derive(Parser)]
struct Cli {
    #[command(flatten)]
    config: Config,
    #[command(subcommand)]
    command: Option<Command>,
}

#[derive(Subcommand, Clone)]
enum Command {
    #[command(flatten)]
    Service(service::Command),
    #[command(flatten)]
    Database(DatabaseCommand),
    /// Publish the current state of users again, to repair a damaged user.state.v1 or to fill a new
    /// one. A running service publishes the states. The command is safe to repeat and to run while
    /// the system runs.
    Republish(Republish),
}

#[derive(clap::Args)]
struct Config {
    /// Address of the public API.
    #[arg(long, env, default_value = "127.0.0.1:8080")]
    http_addr: SocketAddr,
    #[command(flatten)]
    database_url: Secret<DatabaseUrl>,
    #[command(flatten)]
    idempotency_secret: Secret<IdempotencySecret>,
    /// How often each partition of user.state.v1 gets a record, in milliseconds: at most a week.
    /// Kafka does not compact a partition without new records, so erased addresses would remain in
    /// it. Default: one day, which is also how long a segment stays open.
    #[arg(long, env, default_value_t = 86_400_000, value_parser = number::<u64>(100..=604_800_000))]
    heartbeat_interval_ms: u64,
    /// How many users one address may register per hour, with each process of the service. Each
    /// registration sends a mail. 0: no limit. If a proxy is in front of the service, set
    /// TRUSTED_PROXIES too.
    #[arg(long, env, default_value_t = 0, value_parser = number::<u32>(0..=1_000_000))]
    registrations_per_address: u32,
    /// The same, for the bearer of a token. 0: no limit. Administrators have none.
    #[arg(long, env, default_value_t = 20, value_parser = number::<u32>(0..=1_000_000))]
    registrations_per_principal: u32,
    #[command(flatten)]
    relay: RelayConfig,
    #[command(flatten)]
    service: ServiceConfig,
}

struct DatabaseUrl;

impl SecretSetting for DatabaseUrl {
    const NAME: &'static str = "USER_DATABASE_URL";
    const HELP: &'static str = "The service's own database: postgres://waybill_user:password@host:port/waybill_user";
}

struct IdempotencySecret;

impl SecretSetting for IdempotencySecret {
    const NAME: &'static str = "IDEMPOTENCY_SECRET";
    const HELP: &'static str = "The key of the hashes of idempotent requests: at least 32 random characters, the same on \
                                every replica. A new key invalidates all stored answers.";
}

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    let Cli { config, command } = settings::parse();
    match command.unwrap_or(Command::Service(service::Command::Serve)) {
        Command::Service(service::Command::Serve) => serve(config).await,
        Command::Service(service::Command::Healthcheck) => healthcheck(config.service.admin_addr).await,
        Command::Service(service::Command::CreateTopics) => create_topics(&config.service.kafka, TOPICS, &[]).await,
        Command::Database(DatabaseCommand::Migrate) => {
            database::migrate(config.database_url.expose(), &MIGRATIONS).await
        }
        Command::Republish(options) => {
            let db = database::open(config.database_url.expose()).await?;
            republish::republish(&db, &options).await
        }
    }
}

async fn serve(config: Config) -> anyhow::Result<()> {
    let idempotency = idempotency::Hasher::new(config.idempotency_secret.expose())?;
    let mut service = Service::start("user", &config.service).await?;
    let db = service.database(config.database_url.expose(), &MIGRATIONS).await?;
    service.own_topics(TOPICS);
    let wake = service.relay(&db, &config.relay);
    service.spawn("idempotency expiry", idempotency::expire(db.clone()));
    let interval = Duration::from_millis(config.heartbeat_interval_ms);
    service.spawn("heartbeat", heartbeat::run(db.clone(), wake.clone(), interval));
    let registrations = Rates::per_hour(
        "registrations",
        config.registrations_per_address,
        config.registrations_per_principal,
        &service.metrics(),
    );
    let turns = Turns::new(db.clone());
    service.http(config.http_addr, http::routes(http::App { db, wake, idempotency, registrations, turns })).await?;
    service.run().await
}
