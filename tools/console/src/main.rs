//! The console: a live page for operators and learners. It shows where events are, what waits, and
//! the records as they arrive.
//!
//! It is not a service of the domain. No service knows it, calls it or needs it. It asks the admin
//! ports of the services, asks Kafka for the offsets of the consumer groups, and reads the topics
//! without joining a group. It writes to no topic.

mod config;
mod kafka;
mod laboratory;
mod pages;
mod safety;
mod server;
mod sessions;
mod source;
mod system;
mod traces;

use config::{Cli, Command};
use shared::platform::health::healthcheck;
use shared::platform::settings;

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    let Cli { config, command } = settings::parse();
    match command.unwrap_or(Command::Serve) {
        Command::Serve => server::run(config).await,
        Command::Healthcheck => healthcheck(config.admin_addr).await,
    }
}
