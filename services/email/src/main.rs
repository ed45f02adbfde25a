//! The email service. Facts become intents to send a mail, states become recipients, and the sender
//! joins the two when it sends. So the relative order of the two topics does not matter. The
//! results are published on `email.events.v1`, through an outbox.

mod batches;
mod breaker;
mod deliveries;
mod handlers;
mod http;
mod mail;
mod metrics;
mod operator;
mod sender;
mod smtp;
#[cfg(test)]
mod testing;

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use breaker::Breaker;
use clap::{Parser, Subcommand};
use handlers::{Recipients, Welcome};
use metrics::DeliveryMetrics;
use operator::{RetryFailed, RetryUnknown, SendHeld};
use sender::Sender;
use shared::events::Topic;
use shared::messaging::{Handler, RelayConfig};
use shared::platform::database;
use shared::platform::health::healthcheck;
use shared::platform::secret::{Secret, SecretSetting};
use shared::platform::settings::{self, number};
use shared::service::{self, AdminCommand, DatabaseCommand, Service, ServiceConfig, create_topics};
use smtp::Server;
use sqlx::PgPool;
use sqlx::migrate::Migrator;

/// The part of SHUTDOWN_MS that a stopping sender needs to record how a mail ended. It waits for
/// the server's answer for the rest.
const RECORD_LIMIT: Duration = Duration::from_secs(2);

/// The topics that this service writes.
const TOPICS: &[Topic] = &[Topic::EMAIL_EVENTS];
const GROUPS: [&str; 2] = [Welcome::GROUP, Recipients::GROUP];

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
    Database(DatabaseCommand),
    #[command(flatten)]
    Admin(AdminCommand),
    /// Send mails that are held because their event is older than MAX_AGE_HOURS.
    SendHeld(SendHeld),
    /// Send mails again that the server refused permanently.
    RetryFailed(RetryFailed),
    /// Send mails again whose answer was lost so often that the service does not repeat them by
    /// itself.
    RetryUnknown(RetryUnknown),
}

#[derive(clap::Args)]
struct Config {
    /// Address of the public API.
    #[arg(long, env, default_value = "127.0.0.1:8083")]
    http_addr: SocketAddr,
    #[command(flatten)]
    database_url: Secret<DatabaseUrl>,
    #[command(flatten)]
    smtp: smtp::SmtpConfig,
    /// How many mails this process sends at the same time.
    #[arg(long, env, default_value_t = 2, value_parser = number::<u16>(1..=batches::MAX_SENDERS))]
    senders: u16,
    /// How long a mail waits after its sender has died, in milliseconds, before another sender
    /// takes it over. A sender that works renews this lease, however long the mail server takes.
    #[arg(long, env, default_value_t = 60_000, value_parser = number::<u64>(1_000..=3_600_000))]
    lease_ms: u64,
    /// The wait before the second attempt, in milliseconds. It doubles with each attempt, up to ten
    /// minutes.
    #[arg(long, env, default_value_t = 1_000, value_parser = number::<u64>(10..=600_000))]
    backoff_ms: u64,
    /// A mail whose event is older than this many hours is held, because the event most likely
    /// comes from a replayed history. `email send-held` sends held mails. At most ten years.
    #[arg(long, env, default_value_t = 72, value_parser = number::<u32>(1..=87_600))]
    max_age_hours: u32,
    #[command(flatten)]
    relay: RelayConfig,
    #[command(flatten)]
    service: ServiceConfig,
}

struct DatabaseUrl;

impl SecretSetting for DatabaseUrl {
    const NAME: &'static str = "EMAIL_DATABASE_URL";
    const HELP: &'static str = "The service's own database: postgres://waybill_email:password@host:port/waybill_email";
}

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    let Cli { config, command } = settings::parse();
    match command.unwrap_or(Command::Service(service::Command::Serve)) {
        Command::Service(service::Command::Serve) => serve(config).await,
        Command::Service(service::Command::Healthcheck) => healthcheck(config.service.admin_addr).await,
        Command::Service(service::Command::CreateTopics) => create_topics(&config.service.kafka, TOPICS, &GROUPS).await,
        Command::Database(DatabaseCommand::Migrate) => {
            database::migrate(config.database_url.expose(), &MIGRATIONS).await
        }
        Command::Admin(command) => command.run(config.service.admin_addr).await,
        Command::SendHeld(options) => operator::send_held(&config.database().await?, &options).await,
        Command::RetryFailed(options) => operator::retry_failed(&config.database().await?, &options).await,
        Command::RetryUnknown(options) => operator::retry_unknown(&config.database().await?, &options).await,
    }
}

async fn serve(config: Config) -> anyhow::Result<()> {
    let mut service = Service::start("email", &config.service).await?;
    let server = Arc::new(Server::new(&config.smtp)?);
    let db = service.database(config.database_url.expose(), &MIGRATIONS).await?;
    service.own_topics(TOPICS);
    let wake = service.relay(&db, &config.relay);
    let metrics = DeliveryMetrics::register(&service.metrics());
    service.consume(config.welcome(&db, &metrics));
    service.consume(Recipients { db: db.clone(), metrics: metrics.clone() });
    service.spawn("delivery metrics", metrics.clone().measure(db.clone()));
    let rules = deliveries::Rules {
        lease: Duration::from_millis(config.lease_ms),
        backoff: Duration::from_millis(config.backoff_ms),
        max_age: config.max_age(),
    };
    let (batches, waiting) = batches::batches();
    let planned = database::pool_with((*db.connect_options()).clone(), &batches::SESSION_SETTINGS);
    service.spawn_draining("statements of the senders", waiting.run(planned, rules));
    let sender = Sender {
        db: db.clone(),
        server,
        rules,
        batches,
        breaker: Breaker::new(service.health(), metrics.clone()),
        wake,
        metrics,
        stop: service.stopping(),
        last_answer: Duration::from_millis(config.service.shutdown_ms).saturating_sub(RECORD_LIMIT),
    };
    for number in 0..config.senders {
        service.spawn_draining(&format!("sender {number}"), sender.clone().run());
    }
    // The task that makes their statements ends with the last sender.
    drop(sender);
    service.http(config.http_addr, http::routes(db)).await?;
    service.run().await
}

impl Config {
    /// The database, for the subcommands.
    async fn database(&self) -> anyhow::Result<PgPool> {
        database::open(self.database_url.expose()).await
    }

    fn welcome(&self, db: &PgPool, metrics: &DeliveryMetrics) -> Welcome {
        Welcome { db: db.clone(), max_age: self.max_age(), metrics: metrics.clone() }
    }

    fn max_age(&self) -> Duration {
        Duration::from_secs(u64::from(self.max_age_hours) * 3600)
    }
}
