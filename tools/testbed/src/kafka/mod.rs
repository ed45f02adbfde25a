//! Apache Kafka: one broker that is also its controller, or three of them, see `cluster`.

mod acls;
mod cluster;
mod secured;

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitStatus};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use nix::sys::signal::Signal;

use crate::fetch::Fetched;
use crate::process::{self, Logs, Process};
use crate::{paths, ports};

const START_LIMIT: Duration = Duration::from_secs(120);
const STOP_LIMIT: Duration = Duration::from_secs(20);
/// Everybody may do everything that no rule forbids.
const RULES: &str = "authorizer.class.name=org.apache.kafka.metadata.authorizer.StandardAuthorizer
allow.everyone.if.no.acl.found=true";
/// Id of the cluster, stored in each data folder: 16 bytes in base64.
const CLUSTER_ID: &str = "d2F5YmlsbC1sb2NhbC0wMQ";

pub use acls::{Acls, Changes, HeldRule};
pub use cluster::start_cluster;
pub use secured::Listener;

/// The just-in-time compilers of a JVM.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Compilers {
    /// A program that runs for minutes starts faster with the first one (C1) alone.
    First,
    /// As in production.
    Both,
}

/// One broker.
pub struct Kafka {
    pub process: Process,
    /// The name in messages and of its log.
    pub name: String,
    pub id: i32,
    port: u16,
    heap: &'static str,
    compilers: Compilers,
    folder: PathBuf,
    fetched: Fetched,
    logs: Logs,
}

impl Kafka {
    /// Starts a broker on the data in `folder`, or on new data where there is none, and waits until
    /// it is ready. `settings` are further lines of server.properties. They override earlier lines
    /// of the same key.
    pub async fn start(fetched: &Fetched, folder: &Path, port: u16, settings: &str, logs: &Logs) -> Result<Self> {
        let node = Node { id: 1, port, controller: ports::free() };
        let settings = format!("{}{settings}", properties(folder, node, &[node]));
        start_node(fetched, folder, "kafka", node, "-Xmx512m", &Settings::without_users(settings), logs).await
    }

    /// As [`Kafka::start`], with a listener on which clients log in over TLS. A client may then do
    /// only what a rule allows. The plaintext listener on `port` is for operators on this machine
    /// and may be used for everything.
    pub async fn start_secured(
        fetched: &Fetched,
        folder: &Path,
        port: u16,
        listener: &Listener<'_>,
        logs: &Logs,
    ) -> Result<Self> {
        let node = Node { id: 1, port, controller: ports::free() };
        let properties = format!("{}{}", properties(folder, node, &[node]), listener.properties(port, node.controller));
        let settings = Settings { properties, users: listener.users.clone() };
        start_node(fetched, folder, "kafka", node, "-Xmx512m", &settings, logs).await
    }

    pub fn address(&self) -> String {
        format!("127.0.0.1:{}", self.port)
    }

    pub async fn stop(&mut self) {
        self.process.stop(Signal::SIGTERM, STOP_LIMIT).await;
    }

    /// Starts the broker again on the same port and data, after `stop` or `process.kill`.
    pub async fn restart(&mut self) -> Result<()> {
        self.spawn_again()?;
        self.until_ready().await
    }

    /// Restarts the broker as it runs in production: with both compilers of the JVM. It is faster
    /// after some minutes.
    pub async fn restart_with_both_compilers(&mut self) -> Result<()> {
        self.stop().await;
        self.compilers = Compilers::Both;
        self.restart().await
    }

    /// As [`Kafka::restart`], without waiting until the broker is ready. In a cluster of three, a
    /// broker may become ready only after another one runs.
    pub fn spawn_again(&mut self) -> Result<()> {
        self.process.kill();
        self.process = spawn(&self.fetched, &self.folder, &self.name, self.heap, self.compilers, &self.logs)?;
        Ok(())
    }

    /// Runs one of Kafka's own tools against this broker, as an operator does.
    pub async fn tool(&self, main_class: &str, arguments: &[&str]) -> Result<()> {
        let mut command = java(&self.fetched, "-Xmx128m", Compilers::First, main_class);
        command.args(["--bootstrap-server", &self.address()]).args(arguments);
        let name = format!("{}-tool", self.name);
        let mut tool = Process::spawn(&name, command, &self.logs.off_terminal())?;
        let status = tool.wait().await;
        ensure!(status.success(), "{main_class} failed{}", tool.last_lines());
        Ok(())
    }

    /// From now on the broker refuses to let anybody read this topic.
    pub async fn deny_reading(&self, topic: &str) -> Result<()> {
        self.change_rules(&["--add"], "Read", topic).await
    }

    /// Ends [`Kafka::deny_reading`].
    pub async fn allow_reading(&self, topic: &str) -> Result<()> {
        self.change_rules(&["--remove", "--force"], "Read", topic).await
    }

    /// From now on the broker refuses to let anybody write this topic. Everybody may describe it.
    pub async fn deny_writing(&self, topic: &str) -> Result<()> {
        self.change_rules(&["--add"], "Write", topic).await
    }

    /// Ends [`Kafka::deny_writing`].
    pub async fn allow_writing(&self, topic: &str) -> Result<()> {
        self.change_rules(&["--remove", "--force"], "Write", topic).await
    }

    /// From now on no client may write to any topic, so an idempotent producer gets no producer id.
    pub async fn deny_producing(&self) -> Result<()> {
        self.change_producing(&["--add"]).await
    }

    /// Ends [`Kafka::deny_producing`].
    pub async fn allow_producing(&self) -> Result<()> {
        self.change_producing(&["--remove", "--force"]).await
    }

    async fn change_producing(&self, change: &[&str]) -> Result<()> {
        self.change_rules(change, "Write", "*").await?;
        let all = ["--allow-principal", "User:*", "--operation", "All", "--cluster"];
        let but_one = ["--deny-principal", "User:*", "--operation", "IdempotentWrite", "--cluster"];
        let mut rules = [all, but_one];
        if change.contains(&"--remove") {
            // While only the denying rule is left, no client may change the rules.
            rules.reverse();
        }
        for rule in rules {
            let arguments: Vec<&str> = change.iter().chain(&rule).copied().collect();
            self.tool("org.apache.kafka.tools.AclCommand", &arguments).await?;
        }
        Ok(())
    }

    /// Adds or removes rules: everybody may do everything with the topic but this operation.
    async fn change_rules(&self, change: &[&str], denied: &str, topic: &str) -> Result<()> {
        let all = ["--allow-principal", "User:*", "--operation", "All", "--topic", topic];
        let but_one = ["--deny-principal", "User:*", "--operation", denied, "--topic", topic];
        for rule in [all, but_one] {
            let arguments: Vec<&str> = change.iter().chain(&rule).copied().collect();
            self.tool("org.apache.kafka.tools.AclCommand", &arguments).await?;
        }
        Ok(())
    }

    async fn until_ready(&mut self) -> Result<()> {
        let port = self.port;
        let id = self.id;
        self.process.until_ready(START_LIMIT, async || is_registered(port, id).await.unwrap_or(false)).await
    }
}

/// What the other brokers of the cluster know of a broker.
#[derive(Clone, Copy)]
struct Node {
    id: i32,
    port: u16,
    controller: u16,
}

/// Runs a program of Kafka's jars, and returns its exit status and what it printed. `name` is that
/// of its log.
pub async fn run_java(
    fetched: &Fetched,
    name: &str,
    main_class: &str,
    arguments: &[String],
    logs: &Logs,
) -> Result<(ExitStatus, String)> {
    let mut command = java(fetched, "-Xmx96m", Compilers::First, main_class);
    command.args(arguments);
    run_to_end(name, command, logs).await
}

/// As [`run_java`], and the program reads this file.
pub async fn run_java_on(
    fetched: &Fetched,
    name: &str,
    main_class: &str,
    arguments: &[String],
    input: &Path,
    logs: &Logs,
) -> Result<(ExitStatus, String)> {
    // The gate of `process::command` reads standard input, so a second shell opens the file.
    let mut command = process::command("/bin/sh");
    command.args(["-c", r#"exec "$0" "$@" <"$INPUT""#]).env("INPUT", input).arg(&fetched.java);
    add_java_arguments(&mut command, fetched, "-Xmx96m", Compilers::First, main_class);
    command.args(arguments);
    run_to_end(name, command, logs).await
}

async fn run_to_end(name: &str, command: Command, logs: &Logs) -> Result<(ExitStatus, String)> {
    let logs = logs.off_terminal();
    // Processes append to their log.
    let _ = fs::remove_file(logs.file(name));
    let status = Process::spawn(name, command, &logs)?.wait().await;
    Ok((status, fs::read_to_string(logs.file(name)).unwrap_or_default()))
}

/// What a broker is started with.
struct Settings {
    /// The lines of server.properties.
    properties: String,
    /// The users that can log in, with their passwords. They are created with the data folder.
    users: Vec<(String, String)>,
}

impl Settings {
    fn without_users(properties: String) -> Self {
        Self { properties, users: vec![] }
    }
}

/// The lines of server.properties.
///
/// - Few internal partitions and no delay before the first rebalance, so that the broker starts in
///   seconds.
/// - Compaction checks for work every second, so that tests can force it.
/// - A killed broker may register again when its previous session has expired, after 5 s.
/// - Everybody may do everything. On a single broker a test can add rules. Brokers of a cluster would
///   refuse each other's requests while they start.
/// - Topics are not created automatically, as in production: services must not rely on it.
/// - In a cluster of three, every broker has a copy of every record, and a record is acknowledged
///   when two brokers have it. So the loss of one broker loses nothing. A single broker has the
///   only copy.
fn properties(folder: &Path, node: Node, cluster: &[Node]) -> String {
    let Node { id, port, controller } = node;
    let voters: Vec<_> = cluster.iter().map(|node| format!("{}@127.0.0.1:{}", node.id, node.controller)).collect();
    let copies = cluster.len();
    let in_sync = cluster.len() / 2 + 1;
    format!(
        "process.roles=broker,controller
node.id={id}
controller.quorum.voters={}
controller.listener.names=CONTROLLER
listeners=PLAINTEXT://127.0.0.1:{port},CONTROLLER://127.0.0.1:{controller}
advertised.listeners=PLAINTEXT://127.0.0.1:{port}
log.dirs={}
auto.create.topics.enable=false
default.replication.factor={copies}
min.insync.replicas={in_sync}
offsets.topic.replication.factor={copies}
offsets.topic.num.partitions=4
transaction.state.log.replication.factor={copies}
transaction.state.log.min.isr={in_sync}
transaction.state.log.num.partitions=4
share.coordinator.state.topic.replication.factor={copies}
share.coordinator.state.topic.min.isr={in_sync}
group.initial.rebalance.delay.ms=0
broker.session.timeout.ms=5000
broker.heartbeat.interval.ms=500
log.cleaner.backoff.ms=1000
{}
",
        voters.join(","),
        folder.join("data").display(),
        if copies == 1 { RULES } else { "" }
    )
}

async fn start_node(
    fetched: &Fetched,
    folder: &Path,
    name: &str,
    node: Node,
    heap: &'static str,
    settings: &Settings,
    logs: &Logs,
) -> Result<Kafka> {
    fs::create_dir_all(folder).with_context(|| format!("cannot create {}", folder.display()))?;
    fs::write(folder.join("server.properties"), &settings.properties)?;
    // The marker `formatted` is written last, so interrupted formatting is repeated from scratch.
    if !folder.join("formatted").exists() {
        let _ = fs::remove_dir_all(folder.join("data"));
        format(fetched, folder, name, &settings.users, logs).await?;
        fs::write(folder.join("formatted"), "")?;
    }
    let mut kafka = Kafka {
        process: spawn(fetched, folder, name, heap, Compilers::First, logs)?,
        name: name.to_owned(),
        id: node.id,
        port: node.port,
        heap,
        compilers: Compilers::First,
        folder: folder.to_owned(),
        fetched: fetched.clone(),
        logs: logs.clone(),
    };
    kafka.until_ready().await?;
    Ok(kafka)
}

fn java(fetched: &Fetched, heap: &str, compilers: Compilers, main_class: &str) -> Command {
    let mut command = process::command(&fetched.java);
    add_java_arguments(&mut command, fetched, heap, compilers, main_class);
    command
}

fn add_java_arguments(command: &mut Command, fetched: &Fetched, heap: &str, compilers: Compilers, main_class: &str) {
    command.arg(heap);
    if compilers == Compilers::First {
        command.arg("-XX:TieredStopAtLevel=1");
    }
    command.args(["-cp", &fetched.jars]);
    command
        .arg(format!("-Dlog4j2.configurationFile={}", paths::root().join("deploy/local/log4j2.properties").display()));
    command.arg(main_class);
}

/// Creates the data folder, and the users that log in with a password.
async fn format(fetched: &Fetched, folder: &Path, name: &str, users: &[(String, String)], logs: &Logs) -> Result<()> {
    // The tool reads arguments from a file, so that `ps` does not show the passwords. It prints
    // what it stores of them, so what it prints is kept only if it fails.
    let arguments = folder.join("format-arguments");
    let mut command = java(fetched, "-Xmx256m", Compilers::First, "kafka.tools.StorageTool");
    command.args(["format", "--cluster-id", CLUSTER_ID, "--config"]).arg(folder.join("server.properties"));
    if !users.is_empty() {
        secured::write_arguments(&arguments, users)?;
        command.arg(format!("@{}", arguments.display()));
    }
    let name = format!("{name}-format");
    let logs = logs.off_terminal();
    let mut tool = Process::spawn(&name, command, &logs)?;
    let status = tool.wait().await;
    let _ = fs::remove_file(&arguments);
    ensure!(status.success(), "Kafka cannot format its data folder{}", tool.last_lines());
    match fs::remove_file(logs.file(&name)) {
        // Another run of the same command has emptied the folder of logs when it started.
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error.into()),
        _ => Ok(()),
    }
}

fn spawn(
    fetched: &Fetched,
    folder: &Path,
    name: &str,
    heap: &str,
    compilers: Compilers,
    logs: &Logs,
) -> Result<Process> {
    let mut command = java(fetched, heap, compilers, "kafka.Kafka");
    command.arg(folder.join("server.properties"));
    Process::spawn(name, command, logs)
}

/// Requests the cluster's metadata from the broker, as a client does. A broker answers before it is
/// ready. It is listed in the metadata once it is registered and can lead partitions.
async fn is_registered(port: u16, id: i32) -> Result<bool> {
    // Length 14, API key Metadata (3), version 1, correlation id 7, no client id (-1), no topics.
    const REQUEST: [u8; 18] = [0, 0, 0, 14, 0, 3, 0, 1, 0, 0, 0, 7, 0xff, 0xff, 0, 0, 0, 0];
    // Length, correlation id, number of brokers: four bytes each.
    const HEAD: usize = 12;
    // For each broker: id (4 bytes), host (2 for the length, 9 for 127.0.0.1), port (4), no rack
    // (2).
    const BROKER: usize = 21;
    let head = ports::ask(port, &REQUEST, HEAD).await?;
    ensure!(head[4..8] == [0, 0, 0, 7], "the answer belongs to another request");
    // There are at most three brokers, so the last byte of their number is enough.
    let listed = usize::from(head[HEAD - 1]);
    let answer = ports::ask(port, &REQUEST, HEAD + listed * BROKER).await?;
    Ok(answer[HEAD..].chunks_exact(BROKER).any(|broker| broker[..4] == id.to_be_bytes()))
}
