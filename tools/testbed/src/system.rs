//! The stack and the services on it: all of Waybill on one machine.

use std::path::Path;
use std::time::Duration;

use anyhow::Result;
use futures::future::try_join_all;
use nix::sys::signal::Signal;
use tokio::time::sleep;

use crate::fetch::Fetched;
use crate::postgres::Durability;
use crate::process::{Logs, Process};
use crate::say::{self, say};
use crate::services::{self, Instance, RunningService, Service};
use crate::stack::{Access, Ports, Stack};

/// How often `keep_running` looks for processes that have ended. It also limits how often a process
/// that ends at once is started again.
const CHECK_INTERVAL: Duration = Duration::from_secs(1);

/// Fields are dropped in this order: the services before the components that they use.
pub struct System {
    services: Vec<RunningService>,
    /// Further settings of every service.
    settings: Vec<(String, String)>,
    pub stack: Stack,
}

impl System {
    /// Migrates the databases, starts the instances and waits until all are ready.
    pub async fn start(
        stack: Stack,
        fetched: &Fetched,
        instances: &[Instance],
        settings: Vec<(String, String)>,
        programs: &Path,
        logs: &Logs,
    ) -> Result<Self> {
        services::migrate(programs, &stack, logs).await?;
        services::prepare_kafka(programs, &stack, fetched, logs).await?;
        let spawn = |instance: &Instance| {
            let environment = [services::environment(&stack, instance.service), settings.clone()].concat();
            instance.spawn(programs, &environment, logs)
        };
        let services = instances.iter().map(spawn).collect::<Result<_>>()?;
        let mut system = Self { services, settings, stack };
        // All are started before any is waited for, because services wait for each other's topics.
        // The first failure ends the wait.
        let ready = try_join_all(system.services.iter_mut().map(RunningService::until_ready));
        say::timed("Starting the services (about 5 s) …", ready).await?;
        Ok(system)
    }

    /// The URL of a service that `start` was given.
    pub fn url(&self, service: Service) -> String {
        let running = self.services.iter().find(|running| running.instance.service == service);
        running.expect("the service was started").instance.url()
    }

    /// Restarts every process that ends, as Docker restarts containers. So a user can kill any of
    /// them and watch the others wait and recover. Returns only when a process cannot be restarted.
    pub async fn keep_running(&mut self, programs: &Path, logs: &Logs) -> Result<()> {
        loop {
            sleep(CHECK_INTERVAL).await;
            for broker in self.stack.brokers() {
                if has_ended(&broker.name, &mut broker.process) {
                    broker.spawn_again()?;
                }
            }
            if has_ended("postgres", &mut self.stack.postgres.process) {
                self.stack.postgres.restart().await?;
            }
            if has_ended("redis", &mut self.stack.redis.process) {
                self.stack.redis.restart().await?;
            }
            for running in &mut self.services {
                if has_ended(running.instance.service.name, &mut running.process) {
                    let environment = services::environment(&self.stack, running.instance.service);
                    let environment = [environment, self.settings.clone()].concat();
                    *running = running.instance.spawn(programs, &environment, logs)?;
                }
            }
        }
    }

    /// Stops the services, all at once, and then the stack.
    pub async fn stop(mut self) {
        for running in &mut self.services {
            running.process.signal(Signal::SIGTERM);
        }
        for running in &mut self.services {
            running.stop().await;
        }
        self.stack.stop().await;
    }
}

/// Starts the stack and reports it on the terminal.
pub async fn start_stack(
    fetched: &Fetched,
    folder: &Path,
    ports: Ports,
    durability: Durability,
    access: Access<'_>,
    logs: &Logs,
) -> Result<Stack> {
    let start = Stack::start(fetched, folder, ports, durability, access, logs);
    say::timed("Starting Kafka, Postgres, Redis and an SMTP sink (about 10 s) …", start).await
}

/// Whether the process has ended. Reports it on the terminal.
fn has_ended(name: &str, process: &mut Process) -> bool {
    let Some(status) = process.ended() else {
        return false;
    };
    say(format_args!("{name} ended ({status}); restarting it"));
    true
}
