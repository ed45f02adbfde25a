//! One Apache Kafka broker that is its own controller.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use nix::sys::signal::Signal;

use crate::fetch::Fetched;
use crate::process::{self, Logs, Process};
use crate::{paths, ports};

const START_LIMIT: Duration = Duration::from_secs(120);
const STOP_LIMIT: Duration = Duration::from_secs(20);
/// A name for life of the one cluster a data folder belongs to; 16 bytes in base64.
const CLUSTER: &str = "d2F5YmlsbC1sb2NhbC0wMQ";

pub struct Kafka {
    pub process: Process,
    port: u16,
    folder: PathBuf,
    fetched: Fetched,
    logs: Logs,
}

impl Kafka {
    /// Starts a broker on the data in `folder`, or a new one where there is none, and waits until it answers.
    /// `settings` are further lines of server.properties; the last of two that say the same counts.
    pub async fn start(fetched: &Fetched, folder: &Path, port: u16, settings: &str, logs: &Logs) -> Result<Self> {
        fs::create_dir_all(folder).with_context(|| format!("cannot create {}", folder.display()))?;
        fs::write(folder.join("server.properties"), properties(folder, port, settings))?;
        // Formatting that was interrupted is done again; `formatted` comes last.
        if !folder.join("formatted").exists() {
            let _ = fs::remove_dir_all(folder.join("data"));
            format(fetched, folder, logs).await?;
            fs::write(folder.join("formatted"), "")?;
        }
        let process = launch(fetched, folder, port, logs).await?;
        Ok(Self { process, port, folder: folder.to_owned(), fetched: fetched.clone(), logs: logs.clone() })
    }

    pub fn address(&self) -> String {
        format!("127.0.0.1:{}", self.port)
    }

    pub async fn stop(&mut self) {
        self.process.stop(Signal::SIGTERM, STOP_LIMIT).await;
    }

    /// On the same port and data, after `stop` or `process.kill`.
    pub async fn restart(&mut self) -> Result<()> {
        self.process.kill();
        self.process = launch(&self.fetched, &self.folder, self.port, &self.logs).await?;
        Ok(())
    }
}

/// Small numbers of internal partitions and no delay before the first rebalance, so that it starts in seconds. Compaction looks for
/// work each second, so that tests can force it. A broker that was killed is let in again when the session of its predecessor has
/// passed: 5 s. What services must not rely on (automatic topics) is off, as in production.
fn properties(folder: &Path, port: u16, settings: &str) -> String {
    let controller = ports::free();
    let data = folder.join("data");
    format!(
        "process.roles=broker,controller
node.id=1
controller.quorum.voters=1@127.0.0.1:{controller}
controller.listener.names=CONTROLLER
listeners=PLAINTEXT://127.0.0.1:{port},CONTROLLER://127.0.0.1:{controller}
advertised.listeners=PLAINTEXT://127.0.0.1:{port}
log.dirs={}
auto.create.topics.enable=false
offsets.topic.replication.factor=1
offsets.topic.num.partitions=4
transaction.state.log.replication.factor=1
transaction.state.log.min.isr=1
transaction.state.log.num.partitions=4
share.coordinator.state.topic.replication.factor=1
share.coordinator.state.topic.min.isr=1
group.initial.rebalance.delay.ms=0
broker.session.timeout.ms=5000
broker.heartbeat.interval.ms=500
log.cleaner.backoff.ms=1000
{settings}
",
        data.display()
    )
}

fn java(fetched: &Fetched, main_class: &str) -> Command {
    let mut command = process::command(&fetched.java);
    // The quick compiler alone: a broker that lives for minutes starts and warms up faster with it.
    command.args(["-Xmx512m", "-XX:TieredStopAtLevel=1", "-cp", &fetched.jars]);
    command
        .arg(format!("-Dlog4j2.configurationFile={}", paths::root().join("deploy/local/log4j2.properties").display()));
    command.arg(main_class);
    command
}

async fn format(fetched: &Fetched, folder: &Path, logs: &Logs) -> Result<()> {
    let mut command = java(fetched, "kafka.tools.StorageTool");
    command.args(["format", "--cluster-id", CLUSTER, "--config"]).arg(folder.join("server.properties"));
    let mut tool = Process::spawn("kafka", command, &logs.off_terminal())?;
    let status = tool.wait().await;
    ensure!(status.success(), "Kafka's storage cannot be formatted{}", tool.last_lines());
    Ok(())
}

async fn launch(fetched: &Fetched, folder: &Path, port: u16, logs: &Logs) -> Result<Process> {
    let mut command = java(fetched, "kafka.Kafka");
    command.arg(folder.join("server.properties"));
    let mut process = Process::spawn("kafka", command, logs)?;
    process.until_ready(START_LIMIT, async || knows_a_broker(port).await.unwrap_or(false)).await?;
    Ok(process)
}

/// Asks for the cluster's metadata, as a client would. The broker is listed once it may lead partitions, not as soon as it answers.
async fn knows_a_broker(port: u16) -> Result<bool> {
    // Length 14; Metadata (3) in version 1; correlation id 7; no client id (-1); an empty list of topics.
    const REQUEST: [u8; 18] = [0, 0, 0, 14, 0, 3, 0, 1, 0, 0, 0, 7, 0xff, 0xff, 0, 0, 0, 0];
    // Length, correlation id, number of brokers: four bytes each.
    let answer = ports::ask(port, &REQUEST, 12).await?;
    Ok(answer[4..8] == [0, 0, 0, 7] && answer[8..12] != [0, 0, 0, 0])
}
