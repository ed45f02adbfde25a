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
use testbed::secured::Secured;
use testbed::services::{self, CONSOLE, Instance, SERVICES, USER};
use testbed::stack::{Access, Ports};
use testbed::system::{System, start_stack};
use testbed::tools::RunningTool;

use crate::signals::termination_signal;

/// Which system runs.
#[derive(Clone, Copy)]
pub enum Variant {
    OneBroker,
    ThreeBrokers,
    /// One broker. Every component asks for TLS and a login.
    Secured,
}

impl Variant {
    pub fn of(brokers: Brokers, secure: bool) -> Self {
        match brokers {
            _ if secure => Self::Secured,
            Brokers::One => Self::OneBroker,
            Brokers::Three => Self::ThreeBrokers,
        }
    }
}

/// How many Kafka brokers run.
#[derive(ValueEnum, Clone, Copy, Default)]
pub enum Brokers {
    #[default]
    #[value(name = "1")]
    One,
    #[value(name = "3")]
    Three,
}

pub async fn run(fresh: bool, variant: Variant) -> Result<ExitCode> {
    let logs = Logs::to_files_and_terminal("up")?;
    let (mut system, mut console, programs) = tokio::select! {
        started = start(fresh, variant, &logs) => started?,
        () = termination_signal() => return Ok(ExitCode::SUCCESS),
    };
    announce(&system, &console, &logs);
    let outcome = tokio::select! {
        outcome = system.keep_running(&programs, &logs) => outcome,
        () = termination_signal() => Ok(()),
    };
    say("Stopping everything …");
    console.stop().await;
    system.stop().await;
    outcome.map(|()| ExitCode::SUCCESS)
}

async fn start(fresh: bool, variant: Variant, logs: &Logs) -> Result<(System, RunningTool, PathBuf)> {
    // The databases record what has been published to Kafka, so each variant has its own data.
    let (ports, name) = match variant {
        Variant::OneBroker => (Ports::PUBLISHED, "up"),
        Variant::ThreeBrokers => (Ports::PUBLISHED_THREE_BROKERS, "up-3-brokers"),
        Variant::Secured => (Ports::PUBLISHED, "up-secure"),
    };
    let instances = SERVICES.map(Instance::on_published_ports);
    // A port that is in use is reported before anything that takes long.
    ports.require_free()?;
    instances.iter().try_for_each(Instance::require_free_ports)?;
    RunningTool::require_free_ports(CONSOLE)?;
    let fetched = fetch().await?;
    let programs = services::build(logs).await?;
    let folder = paths::data()?.join(name);
    if fresh && folder.exists() {
        fs::remove_dir_all(&folder).with_context(|| format!("cannot remove {}", folder.display()))?;
    }
    let secured = match variant {
        Variant::Secured => Some(Secured::create(&folder.join("credentials"), ports, &[])?),
        Variant::OneBroker | Variant::ThreeBrokers => None,
    };
    let access = secured.as_ref().map_or(Access::Open, Access::Secured);
    let stack = start_stack(&fetched, &folder, ports, Durability::Disk, access, logs).await?;
    let system = System::start(stack, &fetched, &instances, services::traced(CONSOLE), &programs, logs).await?;
    let console =
        RunningTool::start(CONSOLE, &programs, &services::environment_of_console(&system.stack), logs).await?;
    Ok((system, console, programs))
}

fn announce(system: &System, console: &RunningTool, logs: &Logs) {
    let stack = &system.stack;
    say(format_args!("\nWaybill is ready. See it at {}   Ctrl-C stops it.\n", console.url()));
    for instance in SERVICES.map(Instance::on_published_ports) {
        let name = instance.service.name;
        say(format_args!("  {name:<10} {}   /status and /metrics: {}", instance.url(), instance.admin_url()));
    }
    say(format_args!("  {:<10} http://127.0.0.1:{}/api/messages", "mails", stack.ports.mails));
    say(format_args!("  {:<10} {}", "kafka", stack.kafka_addresses()));
    say(format_args!("  {:<10} {}", "postgres", stack.postgres.url()));
    say(format_args!("  {:<10} {}", "redis", stack.redis.url()));
    if let Some(secured) = &stack.secured {
        say(format_args!("  {:<10} {}   no login, for operators on this machine", "kafka", stack.kafka.address()));
        say(format_args!("  {:<10} {}   certificates and passwords", "files", secured.folder().display()));
    }
    say(format_args!("  {:<10} {}\n", "logs", logs.folder().display()));
    say(format_args!(
        "Register a user:\n\n  curl -i {}/users -H 'content-type: application/json' -H 'idempotency-key: first' \\\n       -d \
         '{{\"email\": \"ada@example.com\", \"display_name\": \"Ada Lovelace\"}}'\n",
        system.url(USER)
    ));
}
