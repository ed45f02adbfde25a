//! The cache service: a materialised view of `user.state.v1` in Valkey, answered by id. The highest version wins, and the
//! position in the topic is kept beside the data, so that an emptied Valkey is noticed and filled again from the topic.

mod http;
mod valkey;
mod view;

use std::net::SocketAddr;

use clap::{Parser, Subcommand};
use shared::messaging::{ListDeadLetters, Redrive, list_dead_letters, redrive};
use shared::service::{self, Service, ServiceConfig};
use view::View;

/// The consumer group.
const PROFILES: &str = "cache.profiles";

/// Answers who a user is now.
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
}

#[derive(clap::Args)]
struct Config {
    /// Where the public API is answered.
    #[arg(long, env, default_value = "127.0.0.1:8082")]
    http_addr: SocketAddr,
    /// Valkey, or another server that speaks Redis' protocol. It must not evict: maxmemory-policy noeviction.
    #[arg(long, env, default_value = "redis://localhost:6379")]
    valkey_url: String,
    #[command(flatten)]
    service: ServiceConfig,
}

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    let cli = Cli::parse();
    match cli.command.unwrap_or(Command::Serve) {
        Command::Serve => serve(cli.config).await,
        Command::Healthcheck => service::healthcheck(&cli.config.service).await,
        Command::DeadLetters(options) => list_dead_letters(&cli.config.service.kafka, &[PROFILES], options),
        Command::Redrive(options) => {
            let view = View::new(&cli.config.valkey_url, &cli.config.service.kafka.topic_prefix)?;
            redrive(&cli.config.service.kafka, PROFILES, &view, &options).await
        }
    }
}

async fn serve(config: Config) -> anyhow::Result<()> {
    let view = View::new(&config.valkey_url, &config.service.kafka.topic_prefix)?;
    let mut service = Service::start("cache", &config.service).await?;
    service.consume(PROFILES, view.clone());
    service.http(config.http_addr, http::routes(view)).await?;
    service.run().await
}
