//! The email service: facts become intents to send, states become recipients, and the sender joins the two when it sends. So
//! the order of the two topics does not matter. What became of a mail is told on `email.events.v1`, through an outbox.

mod deliveries;
mod handlers;
mod held;
mod http;
mod mail;
mod metrics;
mod sender;
mod smtp;

use std::net::SocketAddr;
use std::time::Duration;

use clap::{Parser, Subcommand};
use handlers::{Recipients, Welcome};
use held::SendHeld;
use secrecy::{ExposeSecret, SecretString};
use sender::Sender;
use shared::events::Topic;
use shared::messaging::{ListDeadLetters, Redrive, list_dead_letters, redrive};
use shared::service::{self, Service, ServiceConfig};
use sqlx::migrate::Migrator;

static MIGRATIONS: Migrator = sqlx::migrate!("../../migrations/email");

/// The consumer groups.
const WELCOME: &str = "email.welcome";
const RECIPIENTS: &str = "email.recipients";

/// Sends mails to users, and tells what became of them.
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
    /// Send mails that are held back because their cause is older than MAX_AGE_HOURS.
    SendHeld(SendHeld),
}

#[derive(clap::Args)]
struct Config {
    /// Where the public API is answered.
    #[arg(long, env, default_value = "127.0.0.1:8083")]
    http_addr: SocketAddr,
    /// The service's own database: postgres://waybill_email:password@host:port/waybill_email
    #[arg(long, env, hide_env_values = true)]
    email_database_url: SecretString,
    #[command(flatten)]
    smtp: smtp::SmtpConfig,
    /// Mails sent at the same time by this process.
    #[arg(long, env, default_value_t = 2, value_parser = clap::value_parser!(u16).range(1..=64))]
    senders: u16,
    /// How long a sender may take over one mail before another may take it over. It must be longer than the time-outs of all steps
    /// together, 130 seconds; a shorter one sends copies when the mail server is slow.
    #[arg(long, env, default_value_t = 180_000)]
    lease_ms: u64,
    /// The wait before the second attempt; it doubles with each, up to ten minutes.
    #[arg(long, env, default_value_t = 1_000)]
    backoff_ms: u64,
    /// A mail whose cause is older is held back: it comes from a history read again, not from a user who waits. `email send-held`
    /// sends what is held.
    #[arg(long, env, default_value_t = 72)]
    max_age_hours: u32,
    #[command(flatten)]
    service: ServiceConfig,
}

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    let cli = Cli::parse();
    match cli.command.unwrap_or(Command::Serve) {
        Command::Serve => serve(cli.config).await,
        Command::Healthcheck => service::healthcheck(&cli.config.service).await,
        Command::DeadLetters(options) => list_dead_letters(&cli.config.service.kafka, &[WELCOME, RECIPIENTS], options),
        Command::Redrive(options) => settle(cli.config, options).await,
        Command::SendHeld(options) => {
            held::send(&service::pool(cli.config.email_database_url.expose_secret().parse()?), &options).await
        }
    }
}

async fn serve(config: Config) -> anyhow::Result<()> {
    let mut service = Service::start("email", &config.service).await?;
    let db = service.database(config.email_database_url.expose_secret(), &MIGRATIONS).await?;
    service.own_topics(&[Topic::EMAIL_EVENTS]);
    let wake = service.relay(&db);
    service.consume(WELCOME, Welcome { db: db.clone() });
    service.consume(RECIPIENTS, Recipients { db: db.clone() });
    let metrics = metrics::Metrics::register(&service.metrics());
    service.spawn("deliveries' metrics", metrics.clone().measure(db.clone()));
    let max_age = Duration::from_secs(u64::from(config.max_age_hours) * 3600);
    service.spawn("held deliveries", held::watch(db.clone(), max_age, metrics.clone()));
    for number in 0..config.senders {
        let sender = Sender {
            db: db.clone(),
            smtp: config.smtp.clone(),
            rules: deliveries::Rules {
                lease: Duration::from_millis(config.lease_ms),
                backoff: Duration::from_millis(config.backoff_ms),
                max_age,
            },
            wake: wake.clone(),
            metrics: metrics.clone(),
        };
        service.spawn_draining(&format!("sender {number}"), sender.run(service.stopping()));
    }
    service.http(config.http_addr, http::routes(db)).await?;
    service.run().await
}

async fn settle(config: Config, options: Redrive) -> anyhow::Result<()> {
    let db = service::pool(config.email_database_url.expose_secret().parse()?);
    let kafka = &config.service.kafka;
    redrive(kafka, WELCOME, &Welcome { db: db.clone() }, &options).await?;
    redrive(kafka, RECIPIENTS, &Recipients { db }, &options).await
}
