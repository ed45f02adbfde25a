//! The cache service: a materialised view of `user.state.v1` in Valkey, queried by user id. The
//! highest version wins. The position in the topic is stored with the data, so the service notices
//! an emptied Valkey and fills it again from the topic.

mod http;
mod readiness;
mod valkey;
mod view;

use std::net::SocketAddr;

use clap::{Parser, Subcommand};
use shared::messaging::{Handler, list_dead_letters, redrive};
use shared::platform::health::healthcheck;
use shared::service::{self, ConsumerCommand, Service, ServiceConfig};
use view::View;

/// Answers queries for the current profile of a user.
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
}

#[derive(clap::Args)]
struct Config {
    /// Address of the public API.
    #[arg(long, env, default_value = "127.0.0.1:8082")]
    http_addr: SocketAddr,
    /// Valkey, or another server with the protocol of Redis. It must not evict keys:
    /// maxmemory-policy noeviction.
    #[arg(long, env, default_value = "redis://localhost:6379")]
    valkey_url: String,
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
            list_dead_letters(&config.service.kafka, &[View::GROUP], options)
        }
        Command::Consumer(ConsumerCommand::Redrive(options)) => {
            let view = View::new(&config.valkey_url, &config.service.kafka.topic_prefix)?;
            redrive(&config.service.kafka, &view, &options).await
        }
    }
}

async fn serve(config: Config) -> anyhow::Result<()> {
    let view = View::new(&config.valkey_url, &config.service.kafka.topic_prefix)?;
    let mut service = Service::start("cache", &config.service).await?;
    service.consume(view.clone());
    service.spawn("readiness", readiness::watch(view.clone(), service.health()));
    service.http(config.http_addr, http::routes(view)).await?;
    service.run().await
}
