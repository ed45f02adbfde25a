//! The stack and the services on it: all of Waybill on one machine.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Result, ensure};
use futures::future::{join_all, try_join_all};
use nix::sys::signal::Signal;

use crate::fetch::Fetched;
use crate::kafka::Kafka;
use crate::postgres::Durability;
use crate::process::{Logs, Process};
use crate::say::{self, say};
use crate::services::{self, Instance, RunningService, Service};
use crate::stack::{Access, Ports, Stack};

/// How often `laboratory::run` looks for processes that have ended. It also limits how often a
/// process that ends at once is started again.
pub(crate) const CHECK_INTERVAL: Duration = Duration::from_secs(1);
/// Further processes of one service. Each needs about 30 MB.
const MAX_FURTHER: usize = 3;

/// Fields are dropped in this order: the services before the components that they use.
pub struct System {
    services: Vec<RunningService>,
    /// Further settings of every service.
    settings: Vec<(String, String)>,
    pub stack: Stack,
    programs: PathBuf,
    logs: Logs,
    /// The names of the processes and components that were ended on purpose. They are not
    /// restarted.
    down: BTreeSet<String>,
}

/// A component that the laboratory can stop.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Component {
    Kafka,
    Postgres,
    Valkey,
}

impl Component {
    pub const ALL: [Self; 3] = [Self::Kafka, Self::Postgres, Self::Valkey];

    pub fn name(self) -> &'static str {
        match self {
            Self::Kafka => "kafka",
            Self::Postgres => "postgres",
            Self::Valkey => "valkey",
        }
    }
}

/// What a process or a component does, apart from what it says itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Condition {
    Runs,
    Frozen,
    Down,
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
        let (programs, logs) = (programs.to_owned(), logs.clone());
        let mut system = Self { services, settings, stack, programs, logs, down: BTreeSet::new() };
        // All are started before any is waited for, because services wait for each other's topics.
        // The first failure ends the wait.
        let ready = try_join_all(system.services.iter_mut().map(RunningService::until_ready));
        say::timed("Starting the services (about 5 s) …", ready).await?;
        Ok(system)
    }

    /// The first process of each service.
    pub fn instances(&self) -> impl Iterator<Item = Instance> {
        let first = |running: &&RunningService| running.name == running.instance.service.name;
        self.services.iter().filter(first).map(|running| running.instance)
    }

    /// The URL of a service that `start` was given.
    pub fn url(&self, service: Service) -> String {
        let running = self.services.iter().find(|running| running.instance.service == service);
        running.expect("the service was started").instance.url()
    }

    /// The processes of the services, further ones included.
    pub fn processes(&self) -> impl Iterator<Item = (&RunningService, Condition)> {
        self.services.iter().map(|running| (running, self.condition(&running.name, running.is_frozen)))
    }

    pub fn component(&self, component: Component) -> Condition {
        self.condition(component.name(), false)
    }

    fn condition(&self, name: &str, is_frozen: bool) -> Condition {
        match self.down.contains(name) {
            true => Condition::Down,
            false if is_frozen => Condition::Frozen,
            false => Condition::Runs,
        }
    }

    /// Restarts every process that has ended, as Docker restarts containers, except those that were
    /// ended on purpose. So a user can kill any of them and watch the others wait and recover.
    ///
    /// # Errors
    /// A process cannot be started.
    pub async fn restart_ended(&mut self) -> Result<()> {
        let runs = |component: Component| !self.down.contains(component.name());
        let [kafka, postgres, valkey] = Component::ALL.map(runs);
        for broker in self.stack.brokers().filter(|_| kafka) {
            if has_ended(&broker.name, &mut broker.process) {
                broker.spawn_again()?;
            }
        }
        if postgres && has_ended("postgres", &mut self.stack.postgres.process) {
            self.stack.postgres.restart().await?;
        }
        if valkey && has_ended("redis", &mut self.stack.redis.process) {
            self.stack.redis.restart().await?;
        }
        for place in 0..self.services.len() {
            let running = &mut self.services[place];
            if !self.down.contains(&running.name) && has_ended(&running.name, &mut running.process) {
                self.spawn_again(place)?;
            }
        }
        Ok(())
    }

    /// Kills the first process of a service. It stays down until [`System::restart`].
    pub fn kill(&mut self, service: Service) {
        let place = self.place(service);
        let running = &mut self.services[place];
        running.process.kill();
        running.is_frozen = false;
        self.down.insert(running.name.clone());
    }

    /// Freezes the first process of a service: it keeps its connections and its partitions, and
    /// does nothing.
    ///
    /// # Errors
    /// The process does not run.
    pub fn freeze(&mut self, service: Service) -> Result<()> {
        let running = self.running(service)?;
        running.process.freeze();
        running.is_frozen = true;
        Ok(())
    }

    /// Ends a freeze.
    ///
    /// # Errors
    /// The process does not run.
    pub fn resume(&mut self, service: Service) -> Result<()> {
        let running = self.running(service)?;
        running.process.thaw();
        running.is_frozen = false;
        Ok(())
    }

    /// Stops the first process of a service, if it runs, and starts it again. Does not wait until
    /// it is ready.
    ///
    /// # Errors
    /// The process cannot be started.
    pub async fn restart(&mut self, service: Service) -> Result<()> {
        let place = self.place(service);
        self.services[place].stop().await;
        self.spawn_again(place)?;
        self.down.remove(&self.services[place].name);
        Ok(())
    }

    /// Starts one more process of a service, on free ports, and returns its name.
    ///
    /// # Errors
    /// The service has enough processes, or the process cannot be started.
    pub fn add_process(&mut self, service: Service) -> Result<String> {
        let mut names = (2..2 + MAX_FURTHER).map(|number| format!("{}-{number}", service.name));
        let name = names.find(|name| self.services.iter().all(|running| running.name != *name));
        ensure!(name.is_some(), "target: {} has {MAX_FURTHER} further processes, which is the limit", service.name);
        let name = name.unwrap_or_default();
        let environment = self.environment(service);
        let instance = Instance::on_free_ports(service);
        self.services.push(instance.spawn_as(&name, &self.programs, &environment, &self.logs)?);
        Ok(name)
    }

    /// Stops the newest further process of a service, and returns its name.
    ///
    /// # Errors
    /// There is none.
    pub async fn remove_process(&mut self, service: Service) -> Result<String> {
        let is_further = |running: &RunningService| running.instance.service == service && running.name != service.name;
        let place = self.services.iter().rposition(is_further);
        ensure!(place.is_some(), "target: {} has no further process", service.name);
        let mut running = self.services.remove(place.unwrap_or_default());
        running.stop().await;
        Ok(running.name.clone())
    }

    /// Stops a component. It stays down until [`System::start_component`].
    pub async fn stop_component(&mut self, component: Component) {
        self.down.insert(component.name().to_owned());
        match component {
            Component::Kafka => drop(join_all(self.stack.brokers().map(Kafka::stop)).await),
            Component::Postgres => self.stack.postgres.stop().await,
            Component::Valkey => self.stack.redis.stop().await,
        }
    }

    /// Starts a component again. Valkey is empty then.
    ///
    /// # Errors
    /// The component cannot be started.
    pub async fn start_component(&mut self, component: Component) -> Result<()> {
        if self.component(component) == Condition::Runs {
            return Ok(());
        }
        match component {
            // A broker of three may become ready only when another one runs.
            Component::Kafka => self.stack.brokers().try_for_each(Kafka::spawn_again)?,
            Component::Postgres => self.stack.postgres.restart().await?,
            Component::Valkey => self.stack.redis.restart().await?,
        }
        self.down.remove(component.name());
        Ok(())
    }

    fn environment(&self, service: Service) -> Vec<(String, String)> {
        [services::environment(&self.stack, service), self.settings.clone()].concat()
    }

    fn place(&self, service: Service) -> usize {
        let place = self.services.iter().position(|running| running.instance.service == service);
        place.expect("a system runs every service")
    }

    fn running(&mut self, service: Service) -> Result<&mut RunningService> {
        let place = self.place(service);
        let running = &mut self.services[place];
        ensure!(!self.down.contains(&running.name), "target: {} does not run; restart it first", service.name);
        Ok(running)
    }

    fn spawn_again(&mut self, place: usize) -> Result<()> {
        let RunningService { instance, name, .. } = &self.services[place];
        let environment = self.environment(instance.service);
        self.services[place] = instance.spawn_as(name, &self.programs, &environment, &self.logs)?;
        Ok(())
    }

    /// Stops the services, all at once, and then the stack.
    pub async fn stop(mut self) {
        for running in &mut self.services {
            running.process.signal(Signal::SIGTERM);
            // A frozen process handles the signal when it continues.
            running.process.thaw();
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
