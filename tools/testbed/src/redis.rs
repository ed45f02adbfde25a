//! A server that speaks the Redis protocol: Valkey or Redis. By itself it stores nothing on disk,
//! like the Valkey in docker-compose.yml.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use nix::sys::signal::Signal;

use crate::fetch::Fetched;
use crate::process::{self, Logs, Process};
use crate::secured::Secured;
use crate::{ports, tls};

/// How often a server is asked whether it loads its data. Each question may take a second.
const QUESTIONS: usize = 5;
const START_LIMIT: Duration = Duration::from_secs(20);
const STOP_LIMIT: Duration = Duration::from_secs(5);
/// Written by the command SAVE, and read by a server that starts.
const SNAPSHOT: &str = "dump.rdb";

pub struct Redis {
    pub process: Process,
    port: u16,
    flags: Vec<String>,
    /// The authority of the certificate, if the port has TLS and asks for a login.
    authority: Option<PathBuf>,
    folder: PathBuf,
    fetched: Fetched,
    logs: Logs,
}

impl Redis {
    /// Starts an empty server and waits until it answers.
    pub async fn start(fetched: &Fetched, folder: &Path, port: u16, logs: &Logs) -> Result<Self> {
        Self::start_with(fetched, folder, port, &[], logs).await
    }

    /// As [`Redis::start`], with further flags.
    pub async fn start_with(
        fetched: &Fetched,
        folder: &Path,
        port: u16,
        flags: &[String],
        logs: &Logs,
    ) -> Result<Self> {
        Self::start_on(fetched, folder, port, flags, None, logs).await
    }

    /// As [`Redis::start`], with TLS only and with users.
    pub async fn start_secured(
        fetched: &Fetched,
        folder: &Path,
        port: u16,
        secured: &Secured,
        logs: &Logs,
    ) -> Result<Self> {
        let flags = [
            ("--tls-cert-file", secured.certificate()),
            ("--tls-key-file", secured.key()),
            ("--tls-ca-cert-file", secured.authority()),
            ("--aclfile", secured.valkey_users()),
        ];
        let files = flags.into_iter().flat_map(|(flag, file)| [flag.to_owned(), file.display().to_string()]);
        let others = ["--port", "0", "--tls-port", &port.to_string(), "--tls-auth-clients", "no"].map(str::to_owned);
        let flags: Vec<String> = others.into_iter().chain(files).collect();
        Self::start_on(fetched, folder, port, &flags, Some(secured.authority()), logs).await
    }

    async fn start_on(
        fetched: &Fetched,
        folder: &Path,
        port: u16,
        flags: &[String],
        authority: Option<PathBuf>,
        logs: &Logs,
    ) -> Result<Self> {
        fs::create_dir_all(folder).with_context(|| format!("cannot create {}", folder.display()))?;
        let process = launch(fetched, folder, port, flags, authority.as_deref(), logs).await?;
        let flags = flags.to_vec();
        let folder = folder.to_owned();
        Ok(Self { process, port, flags, authority, folder, fetched: fetched.clone(), logs: logs.clone() })
    }

    /// Without a user.
    pub fn url(&self) -> String {
        let scheme = if self.authority.is_some() { "rediss" } else { "redis" };
        format!("{scheme}://127.0.0.1:{}", self.port)
    }

    pub async fn stop(&mut self) {
        self.process.stop(Signal::SIGTERM, STOP_LIMIT).await;
    }

    /// Starts the server again on the same port. It is empty then.
    pub async fn restart(&mut self) -> Result<()> {
        let _ = fs::remove_file(self.folder.join(SNAPSHOT));
        self.restore().await
    }

    /// Writes a snapshot to the disk.
    pub async fn save(&self) -> Result<()> {
        ensure!(ports::ask(self.port, b"SAVE\r\n", 5).await? == b"+OK\r\n", "Redis cannot write a snapshot");
        Ok(())
    }

    /// Starts the server again on the same port, with the data of the last snapshot.
    pub async fn restore(&mut self) -> Result<()> {
        self.process.kill();
        let authority = self.authority.as_deref();
        self.process = launch(&self.fetched, &self.folder, self.port, &self.flags, authority, &self.logs).await?;
        Ok(())
    }

    /// As [`Redis::restore`], but loading a key takes this time, and the call returns while the
    /// server loads. It refuses commands then (LOADING).
    pub async fn restore_slowly(&mut self, per_key: Duration) -> Result<()> {
        self.process.kill();
        let flags = [&["--key-load-delay".to_owned(), per_key.as_micros().to_string()], &self.flags[..]].concat();
        let port = self.port;
        self.process = spawn(&self.fetched, &self.folder, port, &flags, &self.logs)?;
        self.process.until_ready(START_LIMIT, async || is_loading(port).await).await
    }

    /// Whether the server loads its data and refuses commands.
    pub async fn is_loading(&self) -> bool {
        is_loading(self.port).await
    }

    /// Makes this server a replica of another one, or of nothing: then it is a master again.
    pub async fn replicate(&self, master: Option<u16>) -> Result<()> {
        let command =
            master.map_or("REPLICAOF NO ONE\r\n".to_owned(), |port| format!("REPLICAOF 127.0.0.1 {port}\r\n"));
        ensure!(ports::ask(self.port, command.as_bytes(), 3).await? == b"+OK", "Redis rejects `{command}`");
        Ok(())
    }

    pub fn port(&self) -> u16 {
        self.port
    }
}

async fn launch(
    fetched: &Fetched,
    folder: &Path,
    port: u16,
    flags: &[String],
    authority: Option<&Path>,
    logs: &Logs,
) -> Result<Process> {
    let mut process = spawn(fetched, folder, port, flags, logs)?;
    process.until_ready(START_LIMIT, async || answers(port, authority).await).await?;
    Ok(process)
}

fn spawn(fetched: &Fetched, folder: &Path, port: u16, flags: &[String], logs: &Logs) -> Result<Process> {
    let mut command = process::command(&fetched.redis_server);
    command.args(["--port", &port.to_string(), "--bind", "127.0.0.1"]);
    // A profile that was evicted would look like a user who does not exist.
    command.args(["--maxmemory-policy", "noeviction", "--save", "", "--appendonly", "no", "--loglevel", "warning"]);
    command.arg("--dir").arg(folder);
    command.args(flags);
    Process::spawn("redis", command, logs)
}

/// A server that loads its data looks for commands only from time to time, and on a busy machine
/// not before the question has timed out. So it is asked several times.
async fn is_loading(port: u16) -> bool {
    for _ in 0..QUESTIONS {
        if let Ok(answer) = ports::ask(port, b"PING\r\n", 8).await {
            return answer == b"-LOADING";
        }
    }
    false
}

async fn answers(port: u16, authority: Option<&Path>) -> bool {
    match authority {
        None => ports::ask(port, b"PING\r\n", 7).await.is_ok_and(|answer| answer == b"+PONG\r\n"),
        // A client that has not logged in gets no other answer.
        Some(authority) => tls::ask(port, authority, b"PING\r\n", 7).await.is_ok_and(|answer| answer == b"-NOAUTH"),
    }
}
