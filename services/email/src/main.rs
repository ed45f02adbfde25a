//! The email service. Facts become intents to send a mail, states become recipients, and the sender
//! joins the two when it sends. So the relative order of the two topics does not matter. The
//! results are published on `email.events.v1`, through an outbox.

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
use metrics::DeliveryMetrics;
use secrecy::{ExposeSecret, SecretString};
use sender::Sender;
use shared::events::Topic;
use shared::messaging::{Handler, Redrive, RelayConfig, list_dead_letters, redrive};
use shared::platform::database;
use shared::platform::health::healthcheck;
use shared::service::{self, ConsumerCommand, Service, ServiceConfig};
use sqlx::migrate::Migrator;

static MIGRATIONS: Migrator = sqlx::migrate!("../../migrations/email");

/// Sends mails to users, and publishes an event when a mail is sent or has failed.
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
    Consumer(ConsumerCommand),
    /// Send mails that are held because their cause is older than MAX_AGE_HOURS.
    SendHeld(SendHeld),
}

#[derive(clap::Args)]
struct Config {
    /// Address of the public API.
    #[arg(long, env, default_value = "127.0.0.1:8083")]
    http_addr: SocketAddr,
    /// The service's own database: postgres://waybill_email:password@host:port/waybill_email
    #[arg(long, env, hide_env_values = true)]
    email_database_url: SecretString,
    #[command(flatten)]
    smtp: smtp::SmtpConfig,
    /// How many mails this process sends at the same time.
    #[arg(long, env, default_value_t = 2, value_parser = clap::value_parser!(u16).range(1..=64))]
    senders: u16,
    /// How long a sender may take for one mail, in milliseconds, before another sender may take the
    /// mail over. It must be longer than the time-outs of all steps together, 130 seconds: a
    /// shorter lease causes duplicate mails when the mail server is slow.
    #[arg(long, env, default_value_t = 180_000)]
    lease_ms: u64,
    /// The wait before the second attempt, in milliseconds. It doubles with each attempt, up to ten
    /// minutes.
    #[arg(long, env, default_value_t = 1_000)]
    backoff_ms: u64,
    /// A mail whose cause is older is held: it comes from a replayed history and not from a user
    /// who waits. `email send-held` sends held mails.
    #[arg(long, env, default_value_t = 72)]
    max_age_hours: u32,
    #[command(flatten)]
    relay: RelayConfig,
    #[command(flatten)]
    service: ServiceConfig,
}

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    let Cli { config, command } = Cli::parse();
    match command.unwrap_or(Command::Service(service::Command::Serve)) {
        Command::Service(service::Command::Serve) => serve(config).await,
        Command::Service(service::Command::Healthcheck) => healthcheck(config.service.admin_addr).await,
        Command::Consumer(ConsumerCommand::DeadLetters(options)) => {
            list_dead_letters(&config.service.kafka, &[Welcome::GROUP, Recipients::GROUP], options)
        }
        Command::Consumer(ConsumerCommand::Redrive(options)) => redrive_all(config, options).await,
        Command::SendHeld(options) => {
            held::send(&database::pool(config.email_database_url.expose_secret().parse()?), &options).await
        }
    }
}

async fn serve(config: Config) -> anyhow::Result<()> {
    let mut service = Service::start("email", &config.service).await?;
    let db = service.database(config.email_database_url.expose_secret(), &MIGRATIONS).await?;
    service.own_topics(&[Topic::EMAIL_EVENTS]);
    let wake = service.relay(&db, &config.relay);
    service.consume(Welcome { db: db.clone() });
    service.consume(Recipients { db: db.clone() });
    let metrics = DeliveryMetrics::register(&service.metrics());
    service.spawn("delivery metrics", metrics.clone().measure(db.clone()));
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

async fn redrive_all(config: Config, options: Redrive) -> anyhow::Result<()> {
    let db = database::pool(config.email_database_url.expose_secret().parse()?);
    let kafka = &config.service.kafka;
    redrive(kafka, &Welcome { db: db.clone() }, &options).await?;
    redrive(kafka, &Recipients { db }, &options).await
}
