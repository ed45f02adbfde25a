//! `cargo xtask up`: the whole system on its published ports. The data is kept from run to run.

use std::fs;
use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::{Context, Result};
use clap::ValueEnum;
use testbed::fetch::fetch;
use testbed::paths;
use testbed::postgres::Durability;
use testbed::process::Logs;
use testbed::say::say;
use testbed::services::{self, Instance, SERVICES, USER};
use testbed::stack::Ports;
use testbed::system::{System, start_stack};

use crate::signals::termination_signal;

/// How many Kafka brokers run.
#[derive(ValueEnum, Clone, Copy, Default)]
pub enum Brokers {
    #[default]
    #[value(name = "1")]
    One,
    #[value(name = "3")]
    Three,
}

pub async fn run(fresh: bool, brokers: Brokers) -> Result<ExitCode> {
    let logs = Logs::to_files_and_terminal("up")?;
    let (mut system, programs) = tokio::select! {
        started = start(fresh, brokers, &logs) => started?,
        () = termination_signal() => return Ok(ExitCode::SUCCESS),
    };
    announce(&system, &logs);
    let outcome = tokio::select! {
        outcome = system.keep_running(&programs, &logs) => outcome,
        () = termination_signal() => Ok(()),
    };
    say("Stopping everything …");
    system.stop().await;
    outcome.map(|()| ExitCode::SUCCESS)
}

async fn start(fresh: bool, brokers: Brokers, logs: &Logs) -> Result<(System, PathBuf)> {
    // The databases record what has been published to Kafka, so each number of brokers has its own
    // data.
    let (ports, name) = match brokers {
        Brokers::One => (Ports::PUBLISHED, "up"),
        Brokers::Three => (Ports::PUBLISHED_THREE_BROKERS, "up-3-brokers"),
    };
    let instances = SERVICES.map(Instance::on_published_ports);
    // A port that is in use is reported before anything that takes long.
    ports.require_free()?;
    instances.iter().try_for_each(Instance::require_free_ports)?;
    let fetched = fetch().await?;
    let programs = services::build(logs).await?;
    let folder = paths::data()?.join(name);
    if fresh && folder.exists() {
        fs::remove_dir_all(&folder).with_context(|| format!("cannot remove {}", folder.display()))?;
    }
    let stack = start_stack(&fetched, &folder, ports, Durability::Disk, logs).await?;
    Ok((System::start(stack, &instances, &programs, logs).await?, programs))
}

fn announce(system: &System, logs: &Logs) {
    let stack = &system.stack;
    say("\nWaybill is ready. Ctrl-C stops it.\n");
    for instance in SERVICES.map(Instance::on_published_ports) {
        let name = instance.service.name;
        say(format_args!("  {name:<10} {}   /status and /metrics: {}", instance.url(), instance.admin_url()));
    }
    say(format_args!("  {:<10} http://127.0.0.1:{}/api/messages", "mails", stack.ports.mails));
    say(format_args!("  {:<10} {}", "kafka", stack.kafka_addresses()));
    say(format_args!("  {:<10} {}", "postgres", stack.postgres.url()));
    say(format_args!("  {:<10} {}", "redis", stack.redis.url()));
    say(format_args!("  {:<10} {}\n", "logs", logs.folder().display()));
    say(format_args!(
        "Register a user:\n\n  curl -i {}/users -H 'content-type: application/json' -H 'idempotency-key: first' \\\n       -d \
         '{{\"email\": \"ada@example.com\", \"display_name\": \"Ada Lovelace\"}}'\n",
        system.url(USER)
    ));
}
