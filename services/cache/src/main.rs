//! The cache service: a materialised view of `user.state.v1` in Valkey, queried by user id. The
//! highest version wins. The position in the topic is stored with the data, so the service notices
//! an emptied Valkey and fills it again from the topic.

mod http;
mod reads;
mod readiness;
mod valkey;
mod view;
mod waiters;

use std::net::SocketAddr;

use anyhow::ensure;
use clap::{Parser, Subcommand};
use shared::messaging::Handler;
use shared::platform::health::healthcheck;
use shared::platform::settings::{self, number};
use shared::service::{self, AdminCommand, Service, ServiceConfig, create_topics};
use valkey::ValkeyConfig;
use view::View;
use waiters::{Waiters, Waking};

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
    Admin(AdminCommand),
}

#[derive(clap::Args)]
struct Config {
    /// Address of the public API.
    #[arg(long, env, default_value = "127.0.0.1:8082")]
    http_addr: SocketAddr,
    #[command(flatten)]
    valkey: ValkeyConfig,
    /// How many requests may wait for their `min_version` at the same time. Further ones are
    /// answered with 503. Must be below HTTP_REQUESTS, so that other requests are still answered.
    #[arg(long, env, default_value_t = 128, value_parser = number::<u32>(1..=65_535))]
    max_waiters: u32,
    #[command(flatten)]
    service: ServiceConfig,
}

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    let Cli { config, command } = settings::parse();
    match command.unwrap_or(Command::Service(service::Command::Serve)) {
        Command::Service(service::Command::Serve) => serve(config).await,
        Command::Service(service::Command::Healthcheck) => healthcheck(config.service.admin_addr).await,
        Command::Service(service::Command::CreateTopics) => {
            create_topics(&config.service.kafka, &[], &[View::GROUP]).await
        }
        Command::Admin(command) => command.run(config.service.admin_addr).await,
    }
}

async fn serve(config: Config) -> anyhow::Result<()> {
    ensure!(
        config.max_waiters < config.service.http.http_requests,
        "MAX_WAITERS is {} and HTTP_REQUESTS {}: lower MAX_WAITERS, so that requests that do not wait are still answered",
        config.max_waiters,
        config.service.http.http_requests
    );
    let view = View::new(config.valkey.client()?, &config.service.kafka.topic_prefix);
    let mut service = Service::start("cache", &config.service).await?;
    let waiters = Waiters::new(config.max_waiters);
    service.consume(Waking::new(view.clone(), waiters.clone()));
    service.spawn("waiters", waiters.clone().run(view.clone()));
    service.spawn("readiness", readiness::watch(view.clone(), service.health()));
    let (reads, waiting) = reads::reads();
    service.spawn_draining("reads", waiting.run(view));
    service.http(config.http_addr, http::routes(http::App { reads, waiters })).await?;
    service.run().await
}
