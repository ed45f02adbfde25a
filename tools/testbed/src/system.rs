//! The stack and the four services on it: the whole of Waybill.

use std::path::Path;
use std::time::Duration;

use anyhow::Result;
use futures::future::try_join_all;
use nix::sys::signal::Signal;
use tokio::time::sleep;

use crate::fetch::Fetched;
use crate::postgres::Durability;
use crate::process::{Logs, Process};
use crate::say::say;
use crate::services::{self, Running, Service};
use crate::stack::{Ports, Stack};

/// How soon a process that has ended is noticed, and so how often one that keeps ending is started.
const LOOK_EVERY: Duration = Duration::from_secs(1);

/// Dropped in this order: the services before what they use.
pub struct System {
    services: Vec<Running>,
    pub stack: Stack,
}

impl System {
    pub async fn start(stack: Stack, services: &[Service], programs: &Path, logs: &Logs) -> Result<Self> {
        let environment = services::environment(&stack);
        let spawn = |service: &Service| service.spawn(programs, &environment, logs);
        let mut system = Self { services: services.iter().map(spawn).collect::<Result<_>>()?, stack };
        // They wait for each other's topics, so all are started before one is waited for; the first to fail ends the wait.
        try_join_all(system.services.iter_mut().map(Running::until_ready)).await?;
        Ok(system)
    }

    /// Starts again what ends, as containers would be: kill any of them and watch the others wait and recover.
    pub async fn keep_running(&mut self, programs: &Path, logs: &Logs) -> Result<()> {
        let environment = services::environment(&self.stack);
        loop {
            sleep(LOOK_EVERY).await;
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
                if has_ended(running.service.name, &mut running.process) {
                    *running = running.service.spawn(programs, &environment, logs)?;
                }
            }
        }
    }

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

/// Says so, because it takes some seconds.
pub async fn start_stack(
    fetched: &Fetched,
    folder: &Path,
    ports: Ports,
    durability: Durability,
    logs: &Logs,
) -> Result<Stack> {
    say("starting Kafka, Postgres, Redis and the SMTP sink …");
    Stack::start(fetched, folder, ports, durability, logs).await
}

fn has_ended(name: &str, process: &mut Process) -> bool {
    let Some(status) = process.ended() else {
        return false;
    };
    say(format_args!("{name} ended ({status}): starting it again"));
    true
}
