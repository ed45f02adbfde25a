//! The analytics service: read models folded from `user.events.v1` and `email.events.v1`, and
//! queries on them over HTTP. An [`Inbox`] applies each event once, by its id. The [`Audit`] is its
//! own inbox. The service changes no data of another service and publishes no events.

mod audit;
mod http;
mod projections;
mod rebuild;

use std::net::SocketAddr;

use audit::Audit;
use clap::{Parser, Subcommand};
use projections::{Mailed, Registered};
use rebuild::Rebuild;
use shared::messaging::{Handler, Inbox, Projection};
use shared::platform::database;
use shared::platform::health::healthcheck;
use shared::platform::secret::{Secret, SecretSetting};
use shared::platform::settings;
use shared::service::{self, AdminCommand, DatabaseCommand, Service, ServiceConfig, create_topics};
use sqlx::migrate::Migrator;

const GROUPS: [&str; 3] = [Registered::GROUP, Mailed::GROUP, Audit::GROUP];

static MIGRATIONS: Migrator = sqlx::migrate!("../../migrations/analytics");

/// Counts registrations, and how many of the registered users were mailed. Keeps an audit of all
/// changes of users.
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
    #[command(flatten)]
    Admin(AdminCommand),
    /// Rebuild the read models from the log while the service runs, compare them with the live
    /// ones, and swap.
    Rebuild(Rebuild),
}

#[derive(clap::Args)]
struct Config {
    /// Address of the public API.
    #[arg(long, env, default_value = "127.0.0.1:8081")]
    http_addr: SocketAddr,
    #[command(flatten)]
    database_url: Secret<DatabaseUrl>,
    #[command(flatten)]
    service: ServiceConfig,
}

struct DatabaseUrl;

impl SecretSetting for DatabaseUrl {
    const NAME: &'static str = "ANALYTICS_DATABASE_URL";
    const HELP: &'static str =
        "The service's own database: postgres://waybill_analytics:password@host:port/waybill_analytics";
}

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    let Cli { config, command } = settings::parse();
    match command.unwrap_or(Command::Service(service::Command::Serve)) {
        Command::Service(service::Command::Serve) => serve(config).await,
        Command::Service(service::Command::Healthcheck) => healthcheck(config.service.admin_addr).await,
        Command::Service(service::Command::CreateTopics) => create_topics(&config.service.kafka, &[], &GROUPS).await,
        Command::Database(DatabaseCommand::Migrate) => {
            database::migrate(config.database_url.expose(), &MIGRATIONS).await
        }
        Command::Admin(command) => command.run(config.service.admin_addr).await,
        Command::Rebuild(options) => {
            rebuild::run(&config.service.kafka, config.database_url.expose(), &MIGRATIONS, &options).await
        }
    }
}

async fn serve(config: Config) -> anyhow::Result<()> {
    let mut service = Service::start("analytics", &config.service).await?;
    let db = service.database(config.database_url.expose(), &MIGRATIONS).await?;
    service.consume(Inbox::new(db.clone(), Registered));
    service.consume(Inbox::new(db.clone(), Mailed));
    service.consume(Audit { db: db.clone() });
    service.http(config.http_addr, http::routes(db)).await?;
    service.run().await
}
