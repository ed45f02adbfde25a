//! `cargo xtask up`: the whole system on its usual ports. The data is kept from run to run.

use std::fs;
use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::{Context, Result};
use testbed::fetch::fetch;
use testbed::paths;
use testbed::postgres::Durability;
use testbed::process::Logs;
use testbed::say::say;
use testbed::services::{self, ALL};
use testbed::stack::Ports;
use testbed::system::{System, start_stack};

use crate::told_to_end;

pub async fn run(fresh: bool, three_brokers: bool) -> Result<ExitCode> {
    let logs = Logs::fresh("up", true)?;
    let (mut system, programs) = tokio::select! {
        started = start(fresh, three_brokers, &logs) => started?,
        () = told_to_end() => return Ok(ExitCode::SUCCESS),
    };
    announce(&system, &logs);
    let kept = tokio::select! {
        kept = system.keep_running(&programs, &logs) => kept,
        () = told_to_end() => Ok(()),
    };
    say("stopping …");
    system.stop().await;
    kept.map(|()| ExitCode::SUCCESS)
}

async fn start(fresh: bool, three_brokers: bool, logs: &Logs) -> Result<(System, PathBuf)> {
    // The databases remember what has been published, so they belong to one cluster.
    let (ports, name) = if three_brokers { (Ports::PUBLISHED_THREE, "up-3-brokers") } else { (Ports::PUBLISHED, "up") };
    // Before anything that takes long.
    ports.require_free()?;
    ALL.into_iter().try_for_each(services::Service::require_free_ports)?;
    let fetched = fetch().await?;
    let programs = services::build(logs).await?;
    let folder = paths::data()?.join(name);
    if fresh && folder.exists() {
        fs::remove_dir_all(&folder).with_context(|| format!("cannot remove {}", folder.display()))?;
    }
    let stack = start_stack(&fetched, &folder, ports, Durability::Disk, logs).await?;
    say("starting the services …");
    Ok((System::start(stack, &ALL, &programs, logs).await?, programs))
}

fn announce(system: &System, logs: &Logs) {
    let stack = &system.stack;
    say("\nWaybill is ready; Ctrl-C stops it.\n");
    for service in ALL {
        say(format_args!("  {:<10} {}   /readyz and /metrics at {}", service.name, service.url(), service.admin_url()));
    }
    say(format_args!("  {:<10} http://127.0.0.1:{}/api/messages", "mails", stack.ports.mails));
    say(format_args!("  {:<10} {}", "kafka", stack.kafka_addresses()));
    say(format_args!("  {:<10} {}", "postgres", stack.postgres.url()));
    say(format_args!("  {:<10} {}", "redis", stack.redis.url()));
    say(format_args!("  {:<10} {}\n", "logs", logs.folder().display()));
    say(format_args!(
        "Register a user:\n\n  curl -i {}/users -H 'content-type: application/json' -H 'idempotency-key: first' \\\n       -d \
         '{{\"email\": \"ada@example.com\", \"display_name\": \"Ada\"}}'\n",
        services::USER.url()
    ));
}
