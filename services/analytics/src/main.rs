//! The analytics service: read models folded from `user.events.v1` and `email.events.v1`, each event once by its id
//! ([`Inbox`]), and queries on them over HTTP. It changes nothing that another service owns, and tells nobody.

mod http;
mod projections;
mod rebuild;

use std::net::SocketAddr;

use clap::{Parser, Subcommand};
use projections::{Mailed, Registered};
use rebuild::Rebuild;
use secrecy::{ExposeSecret, SecretString};
use shared::messaging::{Inbox, ListDeadLetters, Redrive, list_dead_letters, redrive};
use shared::service::{self, Service, ServiceConfig};
use sqlx::migrate::Migrator;

static MIGRATIONS: Migrator = sqlx::migrate!("../../migrations/analytics");

/// The consumer groups, each with an inbox of the same name.
const USERS: &str = "analytics.users";
const EMAILS: &str = "analytics.emails";

/// Counts registrations, and how many of them were mailed.
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
    /// List the open dead letters.
    DeadLetters(ListDeadLetters),
    /// Try the open dead letters again.
    Redrive(Redrive),
    /// Fold the whole log anew beside the running service, compare, and swap.
    Rebuild(Rebuild),
}

#[derive(clap::Args)]
struct Config {
    /// Where the public API is answered.
    #[arg(long, env, default_value = "127.0.0.1:8081")]
    http_addr: SocketAddr,
    /// The service's own database: postgres://waybill_analytics:password@host:port/waybill_analytics
    #[arg(long, env, hide_env_values = true)]
    analytics_database_url: SecretString,
    #[command(flatten)]
    service: ServiceConfig,
}

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    let cli = Cli::parse();
    match cli.command.unwrap_or(Command::Serve) {
        Command::Serve => serve(cli.config).await,
        Command::Healthcheck => service::healthcheck(&cli.config.service).await,
        Command::DeadLetters(options) => list_dead_letters(&cli.config.service.kafka, &[USERS, EMAILS], options),
        Command::Redrive(options) => settle(cli.config, options).await,
        Command::Rebuild(options) => rebuild::run(cli.config, options).await,
    }
}

async fn serve(config: Config) -> anyhow::Result<()> {
    let mut service = Service::start("analytics", &config.service).await?;
    let db = service.database(config.analytics_database_url.expose_secret(), &MIGRATIONS).await?;
    service.consume(USERS, Inbox::new(USERS, db.clone(), Registered));
    service.consume(EMAILS, Inbox::new(EMAILS, db.clone(), Mailed));
    service.http(config.http_addr, http::routes(db)).await?;
    service.run().await
}

async fn settle(config: Config, options: Redrive) -> anyhow::Result<()> {
    let db = service::pool(config.analytics_database_url.expose_secret().parse()?);
    let kafka = &config.service.kafka;
    redrive(kafka, USERS, &Inbox::new(USERS, db.clone(), Registered), &options).await?;
    redrive(kafka, EMAILS, &Inbox::new(EMAILS, db, Mailed), &options).await
}
