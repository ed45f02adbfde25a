//! `cargo xtask up`: the whole system on its published ports. The data is kept from run to run.

use std::fs;
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;

use anyhow::{Context, Result};
use clap::ValueEnum;
use testbed::fetch::{Fetched, fetch};
use testbed::laboratory::{self, Control, Orders, Parts, Records};
use testbed::paths;
use testbed::postgres::Durability;
use testbed::process::{Logs, Scratch};
use testbed::say::say;
use testbed::secured::Secured;
use testbed::services::{self, CONSOLE, Instance, SERVICES, Tool, USER};
use testbed::stack::{Access, Ports};
use testbed::system::{System, start_stack};
use testbed::tools::{RunningTool, addresses, on_free_ports};

use crate::signals::termination_signal;

/// Which system runs.
#[derive(Clone, Copy)]
pub enum Variant {
    OneBroker,
    ThreeBrokers,
    /// One broker. Every component asks for TLS and a login.
    Secured,
    /// One broker. All ports are free ones, and the data is deleted at the end.
    Temporary,
}

impl Variant {
    pub fn of(brokers: Brokers, secure: bool, temporary: bool) -> Self {
        match brokers {
            _ if temporary => Self::Temporary,
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

/// Everything that runs. Fields are dropped in this order.
struct Running {
    console: Option<RunningTool>,
    orders: Orders,
    _control: Control,
    system: System,
    /// Of a temporary system.
    _scratch: Option<Scratch>,
}

pub async fn run(fresh: bool, variant: Variant) -> Result<ExitCode> {
    let logs = Logs::to_files_and_terminal(&match variant {
        // Several may run at the same time.
        Variant::Temporary => format!("up-temporary-{}", std::process::id()),
        _ => "up".to_owned(),
    })?;
    let mut running = tokio::select! {
        started = start(fresh, variant, &logs) => started?,
        () = termination_signal() => return Ok(ExitCode::SUCCESS),
    };
    announce(&running.system, running.console.as_ref(), &logs);
    let outcome = tokio::select! {
        outcome = laboratory::run(&mut running.system, &mut running.orders) => outcome,
        () = termination_signal() => Ok(()),
    };
    say("Stopping everything …");
    if let Some(console) = &mut running.console {
        console.stop().await;
    }
    running.system.stop().await;
    outcome.map(|()| ExitCode::SUCCESS)
}

async fn start(fresh: bool, variant: Variant, logs: &Logs) -> Result<Running> {
    // The databases record what has been published to Kafka, so each variant has its own data.
    let (ports, name) = match variant {
        Variant::OneBroker => (Ports::PUBLISHED, "up"),
        Variant::ThreeBrokers => (Ports::PUBLISHED_THREE_BROKERS, "up-3-brokers"),
        Variant::Secured => (Ports::PUBLISHED, "up-secure"),
        Variant::Temporary => (Ports::free(), ""),
    };
    let is_temporary = matches!(variant, Variant::Temporary);
    let instance = if is_temporary { Instance::on_free_ports } else { Instance::on_published_ports };
    let instances = SERVICES.map(instance);
    // A port that is in use is reported before anything that takes long.
    ports.require_free()?;
    instances.iter().try_for_each(Instance::require_free_ports)?;
    let console = if is_temporary { CONSOLE.map(on_free_ports) } else { CONSOLE };
    console.map_or(Ok(()), RunningTool::require_free_ports)?;
    let fetched = fetch().await?;
    let programs = services::build(logs).await?;
    let scratch = is_temporary.then(|| Scratch::create("up")).transpose()?;
    let folder = match &scratch {
        Some(scratch) => scratch.path().to_owned(),
        None => data_folder(name, fresh)?,
    };
    let secured = match variant {
        Variant::Secured => Some(Secured::create(&folder.join("credentials"), ports, &[])?),
        Variant::OneBroker | Variant::ThreeBrokers | Variant::Temporary => None,
    };
    let access = secured.as_ref().map_or(Access::Open, Access::Secured);
    let stack = start_stack(&fetched, &folder, ports, Durability::Disk, access, logs).await?;
    let traced = console.map(services::traced).unwrap_or_default();
    let system = System::start(stack, &fetched, &instances, traced, &programs, logs).await?;
    let (control, orders) = open_control(&system, &fetched, logs).await?;
    let console = match console {
        Some(console) => {
            let environment = environment_of_console(console, &system, &control);
            Some(RunningTool::start(console, &programs, &environment, logs).await?)
        }
        None => None,
    };
    Ok(Running { console, orders, _control: control, system, _scratch: scratch })
}

fn data_folder(name: &str, fresh: bool) -> Result<PathBuf> {
    let folder = paths::data()?.join(name);
    if fresh && folder.exists() {
        fs::remove_dir_all(&folder).with_context(|| format!("cannot remove {}", folder.display()))?;
    }
    Ok(folder)
}

/// The control port, through which the console's laboratory breaks things.
async fn open_control(system: &System, fetched: &Fetched, logs: &Logs) -> Result<(Control, Orders)> {
    let stack = &system.stack;
    // Of a secured stack this is the listener for operators on this machine.
    let brokers = [&stack.kafka].into_iter().chain(&stack.further_brokers);
    let servers = brokers.map(|broker| broker.address()).collect::<Vec<_>>().join(",");
    let records = Arc::new(Records::new(fetched, servers, logs)?);
    Control::open(Parts { sink: stack.sink.clone(), records }).await
}

fn environment_of_console(console: Tool, system: &System, control: &Control) -> Vec<(String, String)> {
    let instances: Vec<Instance> = system.instances().collect();
    let mut environment = services::environment_of_console(console, &system.stack);
    environment.extend(control.environment());
    environment.extend(addresses(instances.iter()));
    environment.push(("LABORATORY".to_owned(), "true".to_owned()));
    environment
}

fn announce(system: &System, console: Option<&RunningTool>, logs: &Logs) {
    let stack = &system.stack;
    let place = console.map_or(String::new(), |console| format!(" See it at {}  ", console.url()));
    say(format_args!("\nWaybill is ready.{place} Ctrl-C stops it.\n"));
    for instance in system.instances() {
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
