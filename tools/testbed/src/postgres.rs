//! A Postgres server with a role and a database per service.

use std::fs;
use std::os::unix::fs::{PermissionsExt, chown};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use nix::sys::signal::Signal;
use nix::unistd::{User, geteuid};
use sqlx::{AssertSqlSafe, Connection, PgConnection};
use tokio::time::{Instant, sleep};

use crate::fetch::Fetched;
use crate::process::{self, Logs, Process};

/// The services that own a database, `waybill_<service>`, and a role of the same name.
pub const SERVICES: [&str; 3] = ["user", "email", "analytics"];

/// Of the superuser `postgres` and of every role. It guards nothing: the server listens on loopback and holds test data.
pub const PASSWORD: &str = "waybill-local";

const START_LIMIT: Duration = Duration::from_secs(60);
const STOP_LIMIT: Duration = Duration::from_secs(10);
/// After a `kill -9` of the server its children take a moment to notice, and the system a moment to forget its number; until then
/// no other server starts on its data.
const PREDECESSOR_LIMIT: Duration = Duration::from_secs(10);
/// Tests run many services against one server, each with a pool.
const MAX_CONNECTIONS: &str = "max_connections=300";

/// Whether an accepted commit outlives a power cut. A `kill -9` of the server it outlives in any case.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Durability {
    Disk,
    Process,
}

pub struct Postgres {
    pub process: Process,
    port: u16,
    folder: PathBuf,
    durability: Durability,
    fetched: Fetched,
    logs: Logs,
}

impl Postgres {
    /// Starts a server on the data in `folder`, or on new data where there is none, and waits until it answers and has the
    /// services' roles and databases.
    pub async fn start(
        fetched: &Fetched,
        folder: &Path,
        port: u16,
        durability: Durability,
        logs: &Logs,
    ) -> Result<Self> {
        fs::create_dir_all(folder).with_context(|| format!("cannot create {}", folder.display()))?;
        // An initdb that was interrupted is done again; `initialised` comes last.
        if !folder.join("initialised").exists() {
            let _ = fs::remove_dir_all(folder.join("data"));
            initialise(fetched, folder, logs).await?;
            fs::write(folder.join("initialised"), "")?;
        }
        let process = launch(fetched, folder, port, durability, logs).await?;
        let postgres =
            Self { process, port, folder: folder.to_owned(), durability, fetched: fetched.clone(), logs: logs.clone() };
        create_roles(&postgres.url()).await?;
        Ok(postgres)
    }

    /// As superuser.
    pub fn url(&self) -> String {
        superuser_url(self.port)
    }

    /// As the service's own role, in its own database.
    pub fn service_url(&self, service: &str) -> String {
        let name = role(service);
        database_url(&self.url(), &name, &name)
    }

    /// Creates an empty database owned by a service's role; its URL for that role.
    pub async fn create_database(&self, name: &str, owner: &str) -> Result<String> {
        create_database(&self.url(), name, owner).await
    }

    /// A fast shutdown: open transactions are rolled back, clients cut off.
    pub async fn stop(&mut self) {
        self.process.stop(Signal::SIGINT, STOP_LIMIT).await;
    }

    /// On the same port and data, after `stop` or `process.kill`.
    pub async fn restart(&mut self) -> Result<()> {
        self.process.kill();
        self.process = launch(&self.fetched, &self.folder, self.port, self.durability, &self.logs).await?;
        Ok(())
    }
}

pub fn role(service: &str) -> String {
    format!("waybill_{service}")
}

/// `superuser_url` is that of any server set up here.
pub async fn create_database(superuser_url: &str, name: &str, owner: &str) -> Result<String> {
    let mut connection = PgConnection::connect(superuser_url).await.context("cannot connect to Postgres")?;
    run(&mut connection, format!("create database {name} owner {owner}")).await?;
    // Otherwise each service's role could connect to every other service's database.
    run(&mut connection, format!("revoke connect on database {name} from public")).await?;
    connection.close().await?;
    Ok(database_url(superuser_url, name, owner))
}

async fn run(connection: &mut PgConnection, statement: String) -> Result<()> {
    // The names in it are ours, and SQL has no parameters for names.
    let outcome = sqlx::raw_sql(AssertSqlSafe(statement.as_str())).execute(connection).await;
    outcome.map(drop).with_context(|| format!("Postgres refuses `{statement}`"))
}

fn superuser_url(port: u16) -> String {
    format!("postgres://postgres:{PASSWORD}@127.0.0.1:{port}/postgres")
}

fn database_url(superuser_url: &str, database: &str, role: &str) -> String {
    let (_, address) = superuser_url.split_once('@').expect("our own URL holds a password");
    let (address, _) = address.split_once('/').expect("our own URL holds a database");
    format!("postgres://{role}:{PASSWORD}@{address}/{database}")
}

async fn create_roles(superuser_url: &str) -> Result<()> {
    let mut connection = PgConnection::connect(superuser_url).await.context("cannot connect to Postgres")?;
    for name in SERVICES.map(role) {
        let role: Option<i32> = sqlx::query_scalar("select 1 from pg_roles where rolname = $1")
            .bind(&name)
            .fetch_optional(&mut connection)
            .await?;
        if role.is_none() {
            run(&mut connection, format!("create role {name} login password '{PASSWORD}'")).await?;
        }
        let database: Option<i32> = sqlx::query_scalar("select 1 from pg_database where datname = $1")
            .bind(&name)
            .fetch_optional(&mut connection)
            .await?;
        if database.is_none() {
            create_database(superuser_url, &name, &name).await?;
        }
    }
    Ok(connection.close().await?)
}

/// A program of Postgres, which refuses to run as root: then it runs as `nobody`, who must own the folder.
fn program(fetched: &Fetched, name: &str, folder: &Path) -> Result<Command> {
    let mut command = process::command(fetched.postgres.join("bin").join(name));
    command.current_dir(folder);
    if geteuid().is_root() {
        let nobody = User::from_name("nobody")?
            .context("Postgres does not run as root and there is no user `nobody`: use another user")?;
        chown(folder, Some(nobody.uid.as_raw()), Some(nobody.gid.as_raw()))?;
        command.uid(nobody.uid.as_raw()).gid(nobody.gid.as_raw());
    }
    Ok(command)
}

async fn initialise(fetched: &Fetched, folder: &Path, logs: &Logs) -> Result<()> {
    let password = folder.join("password");
    fs::write(&password, PASSWORD)?;
    fs::set_permissions(&password, fs::Permissions::from_mode(0o644))?;
    let mut command = program(fetched, "initdb", folder)?;
    command.arg("--pgdata").arg(folder.join("data")).arg("--pwfile").arg(&password);
    command.args(["--username=postgres", "--auth=scram-sha-256", "--encoding=UTF8", "--no-sync"]);
    // Built in, so that upper and lower case are the same on every machine.
    command.args(["--locale=C", "--locale-provider=builtin", "--builtin-locale=C.UTF-8"]);
    let mut initdb = Process::spawn("postgres", command, &logs.off_terminal())?;
    let status = initdb.wait().await;
    ensure!(status.success(), "Postgres cannot create its data folder{}", initdb.last_lines());
    Ok(())
}

async fn launch(fetched: &Fetched, folder: &Path, port: u16, durability: Durability, logs: &Logs) -> Result<Process> {
    let (deadline, log) = (Instant::now() + PREDECESSOR_LIMIT, logs.file("postgres"));
    loop {
        let logged = fs::read(&log).map_or(0, |text| text.len());
        let mut process = Process::spawn("postgres", server(fetched, folder, port, durability)?, logs)?;
        match process.until_ready(START_LIMIT, async || answers(port).await).await {
            Ok(()) => return Ok(process),
            Err(_) if has_predecessor(&log, logged) && Instant::now() < deadline => {
                sleep(Duration::from_millis(200)).await;
            }
            Err(error) => return Err(error),
        }
    }
}

/// Told by what was logged since: every session of the predecessor may have written its last words behind it.
fn has_predecessor(log: &Path, logged: usize) -> bool {
    let text = fs::read(log).unwrap_or_default();
    let text = String::from_utf8_lossy(text.get(logged..).unwrap_or_default());
    text.contains("shared memory block") || text.contains("\"postmaster.pid\" already exists")
}

fn server(fetched: &Fetched, folder: &Path, port: u16, durability: Durability) -> Result<Command> {
    let mut command = program(fetched, "postgres", folder)?;
    command.arg("-D").arg(folder.join("data")).args(["-p", &port.to_string()]);
    command.args(["-c", "listen_addresses=127.0.0.1", "-c", "unix_socket_directories=", "-c", MAX_CONNECTIONS]);
    if durability == Durability::Process {
        command.args(["-c", "fsync=off"]);
    }
    Ok(command)
}

async fn answers(port: u16) -> bool {
    match PgConnection::connect(&superuser_url(port)).await {
        Ok(connection) => connection.close().await.is_ok(),
        Err(_) => false,
    }
}
