//! The tools of operators as programs.

use std::path::Path;
use std::time::Duration;

use anyhow::Result;
use nix::sys::signal::Signal;
use reqwest::Client;
use topology::Tool;

use crate::process::{self, Logs, Process};
use crate::{ports, services::Instance};

/// How long a tool may take until it serves. It waits for no service and no component.
const READY_LIMIT: Duration = Duration::from_secs(30);
/// A tool exits within 3 s of SIGTERM. The rest is for a slow machine.
const STOP_LIMIT: Duration = Duration::from_secs(8);

/// A running tool. It is killed when it is dropped.
pub struct RunningTool {
    http: u16,
    admin: u16,
    otlp: u16,
    pub process: Process,
}

impl RunningTool {
    /// Fails when another program listens on one of the published ports.
    pub fn require_free_ports(tool: Tool) -> Result<()> {
        ports::require_free(tool.http, &format!("the tool {}", tool.name))?;
        ports::require_free(tool.admin, &format!("the admin port of the tool {}", tool.name))?;
        ports::require_free(tool.otlp, &format!("the receiver of traces of the tool {}", tool.name))
    }

    /// Starts a tool on its ports. `programs` is the folder that `services::build` returns.
    pub async fn start(tool: Tool, programs: &Path, environment: &[(String, String)], logs: &Logs) -> Result<Self> {
        let Tool { http, admin, otlp, .. } = tool;
        let mut command = process::command(programs.join(tool.name));
        command.env("HTTP_ADDR", format!("127.0.0.1:{http}"));
        command.env("ADMIN_ADDR", format!("127.0.0.1:{admin}"));
        command.env("OTLP_ADDR", format!("127.0.0.1:{otlp}"));
        command.envs(environment.iter().map(|(name, value)| (name, value)));
        if logs.on_terminal() && std::env::var_os("LOG_FORMAT").is_none() {
            command.env("LOG_FORMAT", "pretty");
        }
        let mut tool = Self { http, admin, otlp, process: Process::spawn(tool.name, command, logs)? };
        let client = Client::new();
        let url = format!("{}/livez", tool.admin_url());
        let serves = async || client.get(&url).send().await.is_ok_and(|answer| answer.status().is_success());
        tool.process.until_ready(READY_LIMIT, serves).await?;
        Ok(tool)
    }

    /// As [`RunningTool::start`], on free ports.
    pub async fn start_on_free_ports(
        tool: Tool,
        programs: &Path,
        environment: &[(String, String)],
        logs: &Logs,
    ) -> Result<Self> {
        Self::start(on_free_ports(tool), programs, environment, logs).await
    }

    pub fn url(&self) -> String {
        format!("http://127.0.0.1:{}", self.http)
    }

    pub fn admin_url(&self) -> String {
        format!("http://127.0.0.1:{}", self.admin)
    }

    /// Where it receives traces without TLS.
    pub fn otlp_url(&self) -> String {
        format!("http://127.0.0.1:{}", self.otlp)
    }

    /// Sends SIGTERM and waits for the exit.
    pub async fn stop(&mut self) {
        self.process.stop(Signal::SIGTERM, STOP_LIMIT).await;
    }
}

/// The tool on other ports, which no program uses.
pub fn on_free_ports(tool: Tool) -> Tool {
    Tool { http: ports::free(), admin: ports::free(), otlp: ports::free(), ..tool }
}

/// ADMIN_ADDRESSES and PUBLIC_ADDRESSES for services on these instances.
pub fn addresses<'a>(instances: impl Iterator<Item = &'a Instance> + Clone) -> [(String, String); 2] {
    let list = |port: fn(&Instance) -> u16| {
        let addresses =
            instances.clone().map(|instance| format!("{}=127.0.0.1:{}", instance.service.name, port(instance)));
        addresses.collect::<Vec<_>>().join(",")
    };
    [
        ("ADMIN_ADDRESSES".to_owned(), list(|instance| instance.admin)),
        ("PUBLIC_ADDRESSES".to_owned(), list(|instance| instance.http)),
    ]
}
