//! The services as programs: built by cargo, started on given ports, waited for until they are
//! ready.

use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use credentials::compose::OPERATOR;
use nix::sys::signal::Signal;
use reqwest::Client;

use crate::fetch::Fetched;
use crate::kafka::Acls;
use crate::process::{self, Logs, Process};
use crate::say::say;
use crate::stack::Stack;
use crate::{paths, ports};

// All of it, so that a new service is declared in `topology` only.
pub use topology::*;

/// How long a service may take to become ready. Several start at once on a small machine, and each
/// waits for its topics, its migrations and the first assignment of partitions.
const READY_LIMIT: Duration = Duration::from_secs(120);
/// A service exits within 10 s of SIGTERM. The rest is for a slow machine.
const STOP_LIMIT: Duration = Duration::from_secs(12);
/// How long one request to `/status` may take.
const REQUEST_LIMIT: Duration = Duration::from_secs(2);

/// One instance of a service: the service and the ports that this instance listens on.
#[derive(Clone, Copy, Debug)]
pub struct Instance {
    pub service: Service,
    pub http: u16,
    pub admin: u16,
}

impl Instance {
    /// The instance on the ports that docker-compose.yml publishes too.
    pub fn on_published_ports(service: Service) -> Self {
        Self { service, http: service.http, admin: service.admin }
    }

    pub fn on_free_ports(service: Service) -> Self {
        Self { service, http: ports::free(), admin: ports::free() }
    }

    /// Fails when another program listens on one of the ports.
    pub fn require_free_ports(&self) -> Result<()> {
        let name = self.service.name;
        ports::require_free(self.http, &format!("the service {name}"))?;
        ports::require_free(self.admin, &format!("the admin port of the service {name}"))
    }

    pub fn url(&self) -> String {
        format!("http://127.0.0.1:{}", self.http)
    }

    pub fn admin_url(&self) -> String {
        format!("http://127.0.0.1:{}", self.admin)
    }

    /// Starts the program and returns at once, before it is ready. `programs` is the folder that
    /// `build` returns. `environment` holds the service's settings, see [`environment`].
    pub fn spawn(&self, programs: &Path, environment: &[(String, String)], logs: &Logs) -> Result<RunningService> {
        self.spawn_as(self.service.name, programs, environment, logs)
    }

    /// As [`Instance::spawn`], for a further process of the service. `name` is that of its log.
    pub fn spawn_as(
        &self,
        name: &str,
        programs: &Path,
        environment: &[(String, String)],
        logs: &Logs,
    ) -> Result<RunningService> {
        let mut command = process::command(programs.join(self.service.name));
        command.env("HTTP_ADDR", format!("127.0.0.1:{}", self.http));
        command.env("ADMIN_ADDR", format!("127.0.0.1:{}", self.admin));
        // No load balancer is in front of the service.
        command.env("DRAIN_MS", "0");
        command.envs(environment.iter().map(|(name, value)| (name, value)));
        if logs.on_terminal() && std::env::var_os("LOG_FORMAT").is_none() {
            command.env("LOG_FORMAT", "pretty");
        }
        let process = Process::spawn(name, command, logs)?;
        Ok(RunningService { instance: *self, name: name.to_owned(), is_frozen: false, process })
    }
}

/// An instance and its process.
pub struct RunningService {
    pub instance: Instance,
    /// The name of its log: that of the service, with a number if it is a further process.
    pub name: String,
    pub is_frozen: bool,
    pub process: Process,
}

impl RunningService {
    /// Waits until `/status` answers with success. On failure the error quotes the last answer,
    /// which names the component that the service waits for.
    pub async fn until_ready(&mut self) -> Result<()> {
        let client = Client::builder().timeout(REQUEST_LIMIT).build()?;
        let url = format!("{}/status", self.instance.admin_url());
        let is_ready = async || client.get(&url).send().await.is_ok_and(|answer| answer.status().is_success());
        let waited = self.process.until_ready(READY_LIMIT, is_ready).await;
        if waited.is_ok() || self.process.ended().is_some() {
            return waited;
        }
        let reason = async { client.get(&url).send().await?.text().await }.await.unwrap_or_default();
        waited.with_context(|| format!("{} is not ready; /status answers: {reason}", self.instance.service.name))
    }

    /// Sends SIGTERM and waits for the exit.
    pub async fn stop(&mut self) {
        self.process.stop(Signal::SIGTERM, STOP_LIMIT).await;
    }
}

/// Runs the subcommand `migrate` of every service that has a database, as the role that owns its
/// tables.
pub async fn migrate(programs: &Path, stack: &Stack, logs: &Logs) -> Result<()> {
    for service in with_database() {
        let mut command = process::command(programs.join(service.name));
        command.arg("migrate").envs(environment(stack, service));
        command.env(service.database_url_setting(), stack.database(service).owner_url);
        let mut migration = Process::spawn(&format!("{}-migrate", service.name), command, &logs.off_terminal())?;
        let status = migration.wait().await;
        ensure!(status.success(), "{} cannot migrate its database{}", service.name, migration.last_lines());
    }
    Ok(())
}

/// Lets each service do on a secured Kafka what its rules allow, and creates all topics as an
/// operator. Does nothing on an open stack, whose services create their topics.
pub async fn prepare_kafka(programs: &Path, stack: &Stack, fetched: &Fetched, logs: &Logs) -> Result<()> {
    let Some(secured) = &stack.secured else {
        return Ok(());
    };
    let rules = acls::all_rules(acls::Naming::default());
    let servers = stack.kafka.address();
    Acls { fetched, servers: &servers, client: None, logs }.apply(&rules).await?;
    for service in SERVICES {
        let mut command = process::command(programs.join(service.name));
        command.arg("create-topics").envs(environment(stack, service));
        command.envs(secured.kafka_login(OPERATOR));
        let name = format!("{}-create-topics", service.name);
        let mut creation = Process::spawn(&name, command, &logs.off_terminal())?;
        let status = creation.wait().await;
        ensure!(status.success(), "{} cannot create its topics{}", service.name, creation.last_lines());
    }
    Ok(())
}

/// The settings with which a service finds a stack, under the names that its `--help` documents. A
/// service gets more than its own and ignores the rest.
pub fn environment(stack: &Stack, service: Service) -> Vec<(String, String)> {
    let smtp = stack.sink.address();
    let mut settings = match &stack.secured {
        Some(secured) => secured.settings(service),
        None => vec![
            ("KAFKA_BROKERS", stack.kafka_addresses()),
            ("VALKEY_URL", stack.redis.url()),
            ("SMTP_HOST", smtp.ip().to_string()),
            ("SMTP_PORT", smtp.port().to_string()),
        ],
    };
    settings.push(("IDEMPOTENCY_SECRET", "a secret for the local stack alone".to_owned()));
    let settings = settings.into_iter().map(|(name, value)| (name.to_owned(), value));
    let databases = with_database().map(|service| (service.database_url_setting(), stack.database(service).url));
    settings.chain(databases).collect()
}

/// The settings with which the console finds a stack.
pub fn environment_of_console(console: Tool, stack: &Stack) -> Vec<(String, String)> {
    let settings = match &stack.secured {
        Some(secured) => secured.kafka_login(&console.kafka_user()),
        None => vec![("KAFKA_BROKERS", stack.kafka_addresses())],
    };
    settings.into_iter().map(|(name, value)| (name.to_owned(), value)).collect()
}

/// The settings with which services send all their traces to the console, without a delay that a
/// visitor would notice. Those of the user are not changed.
pub fn traced(console: Tool) -> Vec<(String, String)> {
    let settings = [
        ("OTEL_EXPORTER_OTLP_ENDPOINT", format!("http://127.0.0.1:{}", console.otlp)),
        ("OTEL_TRACES_SAMPLER_ARG", "1.0".to_owned()),
        ("OTEL_BSP_SCHEDULE_DELAY", "500".to_owned()),
    ];
    let not_given = settings.into_iter().filter(|(name, _)| std::env::var_os(name).is_none());
    not_given.map(|(name, value)| (name.to_owned(), value)).collect()
}

/// The program and the package of the synchronous version in `tests/synchronous`.
pub const SYNCHRONOUS: &str = "synchronous";

/// Builds the services and the console and returns the folder with their programs. Cargo shows its
/// progress on the terminal.
pub async fn build(logs: &Logs) -> Result<PathBuf> {
    cargo_build(&[], logs).await?;
    Ok(target().join("debug"))
}

/// As [`build`], as release programs.
pub async fn build_release(logs: &Logs) -> Result<PathBuf> {
    cargo_build(&["--release"], logs).await?;
    Ok(target().join("release"))
}

/// As [`build_release`], with the synchronous version.
pub async fn build_release_with_synchronous(logs: &Logs) -> Result<PathBuf> {
    cargo_build(&["--release", "-p", SYNCHRONOUS], logs).await?;
    Ok(target().join("release"))
}

/// As [`build`], with fault points and with the synchronous version. The programs are copied to a
/// folder of their own, because any other `cargo build` replaces those in `target/debug`.
pub async fn build_with_fault_points(logs: &Logs) -> Result<PathBuf> {
    cargo_build(&["-p", SYNCHRONOUS, "--features", &fault_points()], logs).await?;
    let folder = target().join("fault-points");
    std::fs::create_dir_all(&folder)?;
    let services = SERVICES.iter().map(|service| service.name);
    for name in services.chain(CONSOLE.iter().map(|console| console.name)).chain([SYNCHRONOUS]) {
        // Copied under another name and then renamed: the file of a running program cannot be
        // written.
        let copy = folder.join(format!("{name}.new"));
        std::fs::copy(target().join("debug").join(name), &copy)?;
        std::fs::rename(copy, folder.join(name))?;
    }
    Ok(folder)
}

/// The value of cargo's `--features` that enables the fault points of every service.
pub fn fault_points() -> String {
    SERVICES.map(|service| format!("{}/fault-points", service.name)).join(",")
}

fn target() -> PathBuf {
    paths::root().join("target")
}

async fn cargo_build(arguments: &[&str], logs: &Logs) -> Result<()> {
    for tool in ["gcc", "g++", "make"] {
        let advice = "install the C and C++ tools (on Debian: `apt install build-essential`) and run this again";
        paths::on_path(&[tool])
            .with_context(|| format!("no `{tool}` on the PATH, and the Kafka client is compiled from C: {advice}"))?;
    }
    say("Building the services (some minutes the first time, seconds afterwards) …");
    let mut command = cargo();
    // Given explicitly, because the programs are read from there. The user's configuration may
    // differ.
    command.arg("build").arg("--target-dir").arg(target());
    for service in SERVICES {
        command.args(["-p", service.name]);
    }
    if let Some(console) = CONSOLE {
        command.args(["-p", &console.package()]);
    }
    command.args(arguments);
    let status = Process::spawn_on_terminal("cargo", command, logs)?.wait().await;
    ensure!(status.success(), "the services do not compile: see cargo's messages above");
    Ok(())
}

/// The cargo that runs this program, so that the toolchain is the same.
///
/// `cargo run` sets variables that describe the package it runs. They are removed: some build
/// scripts (that of ring, for example) depend on them, and crates would be compiled again after
/// each change between `cargo` and `cargo xtask`.
pub fn cargo() -> std::process::Command {
    cargo_in(paths::root())
}

/// As [`cargo`], in another checkout.
pub fn cargo_in(root: &Path) -> std::process::Command {
    let mut command = process::command(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    command.current_dir(root);
    for (name, _) in std::env::vars_os() {
        if name.to_str().is_some_and(|name| name.starts_with("CARGO_PKG_") || name.starts_with("CARGO_MANIFEST_")) {
            command.env_remove(name);
        }
    }
    command
}
