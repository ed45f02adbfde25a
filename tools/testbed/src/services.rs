//! The four services: built by cargo, started as programs, asked whether they are ready.

use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use nix::sys::signal::Signal;
use reqwest::Client;

use crate::process::{self, Logs, Process};
use crate::stack::Stack;
use crate::{paths, ports};

const READY_LIMIT: Duration = Duration::from_secs(120);
/// They promise to end within 10 s.
const STOP_LIMIT: Duration = Duration::from_secs(12);
const ASK_LIMIT: Duration = Duration::from_secs(2);

/// A service as a program: its name and the ports that docker-compose.yml publishes.
#[derive(Clone, Copy, Debug)]
pub struct Service {
    pub name: &'static str,
    pub http: u16,
    pub admin: u16,
}

pub const USER: Service = Service { name: "user", http: 8080, admin: 9080 };
pub const ANALYTICS: Service = Service { name: "analytics", http: 8081, admin: 9081 };
pub const CACHE: Service = Service { name: "cache", http: 8082, admin: 9082 };
pub const EMAIL: Service = Service { name: "email", http: 8083, admin: 9083 };
pub const ALL: [Service; 4] = [USER, ANALYTICS, CACHE, EMAIL];

impl Service {
    pub fn on_free_ports(self) -> Self {
        Self { http: ports::free(), admin: ports::free(), ..self }
    }

    pub fn require_free_ports(self) -> Result<()> {
        ports::require_free(self.http, &format!("the service {}", self.name))?;
        ports::require_free(self.admin, &format!("the admin port of the service {}", self.name))
    }

    pub fn url(self) -> String {
        format!("http://127.0.0.1:{}", self.http)
    }

    pub fn admin_url(self) -> String {
        format!("http://127.0.0.1:{}", self.admin)
    }

    /// Started, but not waited for. `environment` says where everything is, see `environment`.
    pub fn spawn(self, programs: &Path, environment: &[(String, String)], logs: &Logs) -> Result<Running> {
        let mut command = process::command(programs.join(self.name));
        command.env("HTTP_ADDR", format!("127.0.0.1:{}", self.http));
        command.env("ADMIN_ADDR", format!("127.0.0.1:{}", self.admin));
        command.envs(environment.iter().map(|(name, value)| (name, value)));
        if logs.on_terminal() && std::env::var_os("LOG_FORMAT").is_none() {
            command.env("LOG_FORMAT", "pretty");
        }
        Ok(Running { service: self, process: Process::spawn(self.name, command, logs)? })
    }
}

pub struct Running {
    pub service: Service,
    pub process: Process,
}

impl Running {
    pub async fn until_ready(&mut self) -> Result<()> {
        let client = Client::builder().timeout(ASK_LIMIT).build()?;
        let url = format!("{}/readyz", self.service.admin_url());
        let is_ready = async || client.get(&url).send().await.is_ok_and(|answer| answer.status().is_success());
        let waited = self.process.until_ready(READY_LIMIT, is_ready).await;
        if waited.is_ok() || self.process.ended().is_some() {
            return waited;
        }
        // What it waits for is in the answer.
        let reason = async { client.get(&url).send().await?.text().await }.await.unwrap_or_default();
        waited.with_context(|| format!("{} waits: {reason}", self.service.name))
    }

    pub async fn stop(&mut self) {
        self.process.stop(Signal::SIGTERM, STOP_LIMIT).await;
    }
}

/// What the services are told about a stack, by the names that their `--help` documents.
pub fn environment(stack: &Stack) -> Vec<(String, String)> {
    let smtp = stack.sink.address();
    let pairs = [
        ("KAFKA_BROKERS", stack.kafka_addresses()),
        ("USER_DATABASE_URL", stack.postgres.service_url("user")),
        ("EMAIL_DATABASE_URL", stack.postgres.service_url("email")),
        ("ANALYTICS_DATABASE_URL", stack.postgres.service_url("analytics")),
        ("VALKEY_URL", stack.redis.url()),
        ("SMTP_HOST", smtp.ip().to_string()),
        ("SMTP_PORT", smtp.port().to_string()),
        ("IDEMPOTENCY_SECRET", "a secret for the local stack alone".to_owned()),
    ];
    pairs.map(|(name, value)| (name.to_owned(), value)).into()
}

/// Builds the services, with cargo's own progress on the terminal; the folder with their programs.
pub async fn build(logs: &Logs) -> Result<PathBuf> {
    cargo_build(&[], logs).await?;
    Ok(target().join("debug"))
}

/// The same with fault points, in a folder of its own: `target/debug` is where everybody else builds.
pub async fn build_with_fault_points(logs: &Logs) -> Result<PathBuf> {
    cargo_build(&["--features", &fault_points()], logs).await?;
    let folder = target().join("fault-points");
    std::fs::create_dir_all(&folder)?;
    for service in ALL {
        // Renamed into place: a program that still runs cannot be written to.
        let copy = folder.join(format!("{}.new", service.name));
        std::fs::copy(target().join("debug").join(service.name), &copy)?;
        std::fs::rename(copy, folder.join(service.name))?;
    }
    Ok(folder)
}

/// For cargo's `--features`.
pub fn fault_points() -> String {
    ALL.map(|service| format!("{}/fault-points", service.name)).join(",")
}

fn target() -> PathBuf {
    paths::root().join("target")
}

async fn cargo_build(arguments: &[&str], logs: &Logs) -> Result<()> {
    for tool in ["gcc", "g++", "make"] {
        let advice = "install the C and C++ tools (on Debian: `apt install build-essential`) and run this again";
        paths::on_path(&[tool])
            .with_context(|| format!("the Kafka client is compiled and there is no `{tool}` on the PATH: {advice}"))?;
    }
    let mut command = cargo();
    // Named, because we look for the programs there, whatever the user has set.
    command.arg("build").arg("--target-dir").arg(target());
    for service in ALL {
        command.args(["-p", service.name]);
    }
    command.args(arguments);
    let status = Process::spawn_on_terminal("cargo", command, logs)?.wait().await;
    ensure!(status.success(), "the services do not compile: cargo's message is above");
    Ok(())
}

/// The cargo that runs us, so that the toolchain is the same; without what `cargo run` tells us about our own package. Some
/// build scripts look at that (ring's does), and crates would be compiled anew on every change between `cargo` and `cargo xtask`.
pub fn cargo() -> std::process::Command {
    cargo_in(paths::root())
}

/// The same in another checkout.
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
