//! The components that the jobs share, and for each job its own databases and names on them.

use std::collections::BTreeMap;
use std::path::PathBuf;

use anyhow::{Context, Result, ensure};
use sqlx::{Connection, PgConnection, PgPool};
use testbed::fetch::fetch;
use testbed::postgres::{self, Database, Durability};
use testbed::process::{Logs, Process, Scratch, command};
use testbed::services::{self, Instance, RunningService, SERVICES};
use testbed::stack::{Access, Ports, Stack};
use testbed::system::start_stack;
use testbed::tools::RunningTool;
use topology::{CONSOLE, Service};

use crate::disk::DiskProbe;
use crate::meter::Meter;
use crate::{Programs, Size};

/// Fields are dropped in this order.
pub struct Bed {
    pub stack: Stack,
    pub disk: DiskProbe,
    services: PathBuf,
    /// The program of the benchmark itself.
    pub program: PathBuf,
    size: Size,
    logs: Logs,
    _scratch: Scratch,
}

impl Bed {
    /// Starts the components. Postgres stores each commit on the disk, as in production.
    pub async fn start(programs: Programs<'_>, size: Size) -> Result<Self> {
        let logs = Logs::to_files("bench")?;
        let fetched = fetch().await?;
        let scratch = Scratch::create("bench")?;
        let ports = Ports::free();
        let mut stack = start_stack(&fetched, scratch.path(), ports, Durability::Disk, Access::Open, &logs).await?;
        if size != Size::Smoke {
            stack.kafka.restart_with_both_compilers().await?;
        }
        let disk = DiskProbe::start(scratch.path())?;
        let (services, program) = (programs.services.to_owned(), programs.bench.to_owned());
        Ok(Self { stack, disk, services, program, size, logs, _scratch: scratch })
    }

    pub fn size(&self) -> Size {
        self.size
    }

    /// The pids of Postgres, Kafka and Redis.
    pub fn components(&self) -> [u32; 3] {
        [self.stack.postgres.process.pid(), self.stack.kafka.process.pid(), self.stack.redis.process.pid()]
    }

    /// Begins a slice.
    pub fn meter(&self, services: &[&RunningService]) -> Result<Meter> {
        let pids: Vec<u32> = services.iter().map(|service| service.process.pid()).collect();
        Meter::start(self.components(), &pids)
    }

    /// As [`Bed::meter`], with another program in place of the services.
    pub fn meter_of(&self, program: u32) -> Result<Meter> {
        Meter::start(self.components(), &[program])
    }

    /// Whether each side gets a slice that does not count.
    pub fn warms_up(&self) -> bool {
        self.size == Size::Full
    }

    /// Whether a slice counts although other programs were running.
    pub fn tolerates_others(&self) -> bool {
        self.size == Size::Smoke
    }

    /// Databases, topics and keys of one job's own.
    pub async fn lab(&self, job: &'static str) -> Result<Lab<'_>> {
        let mut databases = BTreeMap::new();
        for service in topology::with_database() {
            let name = format!("bench_{job}_{}", service.name);
            let database = postgres::create_database(&self.stack.postgres.url(), &name, service).await?;
            database.migrate(service).await?;
            databases.insert(service.name, database);
        }
        Ok(Lab { bed: self, job, databases })
    }

    pub async fn stop(self) {
        self.stack.stop().await;
    }
}

/// What one job has to itself.
pub struct Lab<'a> {
    pub bed: &'a Bed,
    job: &'static str,
    databases: BTreeMap<&'static str, Database>,
}

impl Lab<'_> {
    /// The name of a topic or group on the broker, or the prefix of keys in Redis.
    pub fn prefixed(&self, name: &str) -> String {
        format!("{}.{name}", self.job)
    }

    /// Starts a service with further settings and waits until it is ready.
    pub async fn start(&self, service: Service, settings: &[(&str, &str)]) -> Result<RunningService> {
        let mut running = self.spawn(service, settings)?;
        running.until_ready().await?;
        Ok(running)
    }

    /// Starts a service and returns at once.
    pub fn spawn(&self, service: Service, settings: &[(&str, &str)]) -> Result<RunningService> {
        let mut environment = self.environment(service);
        environment.extend(settings.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())));
        Instance::on_free_ports(service).spawn(&self.bed.services, &environment, &self.bed.logs)
    }

    /// Starts the console and waits until it serves.
    pub async fn start_console(&self) -> Result<RunningTool> {
        let console = CONSOLE.context("the topology has no console")?;
        let mut environment = services::environment_of_console(console, &self.bed.stack);
        environment.push(("TOPIC_PREFIX".to_owned(), self.prefixed("")));
        RunningTool::start_on_free_ports(console, &self.bed.services, &environment, &self.bed.logs).await
    }

    /// Creates the topics of all services, of which most do not run.
    pub async fn create_topics(&self) -> Result<()> {
        for service in SERVICES {
            let mut creation = command(self.bed.services.join(service.name));
            creation.arg("create-topics").envs(self.environment(service));
            let name = format!("{}-create-topics", service.name);
            let mut creation = Process::spawn(&name, creation, &self.bed.logs)?;
            let status = creation.wait().await;
            ensure!(status.success(), "{} cannot create its topics{}", service.name, creation.last_lines());
        }
        Ok(())
    }

    fn environment(&self, service: Service) -> Vec<(String, String)> {
        let mut environment = services::environment(&self.bed.stack, service);
        let own = topology::with_database();
        environment.extend(own.map(|of| (of.database_url_setting(), self.databases[of.name].url.clone())));
        environment.push(("TOPIC_PREFIX".to_owned(), self.prefixed("")));
        environment
    }

    /// A connection with the rights of the service.
    pub async fn connect(&self, service: Service) -> Result<PgConnection> {
        Ok(PgConnection::connect(&self.databases[service.name].url).await?)
    }

    /// Connections with the rights of the role that owns the tables.
    pub async fn owner(&self, service: Service) -> Result<PgPool> {
        Ok(PgPool::connect(&self.databases[service.name].owner_url).await?)
    }
}
