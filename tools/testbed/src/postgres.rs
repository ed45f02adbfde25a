//! A Postgres server with a role and a database for each service that has one.

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
use topology::{Service, with_database};

use crate::fetch::Fetched;
use crate::process::{self, Logs, Process};

/// The password of the superuser `postgres` and of every role. It protects nothing: the server
/// listens on loopback and holds test data.
pub const PASSWORD: &str = "waybill-local";

const START_LIMIT: Duration = Duration::from_secs(60);
const STOP_LIMIT: Duration = Duration::from_secs(10);
/// How long a start is retried while the previous server on the same data is still exiting. After a
/// `kill -9` its child processes exit a moment later, and no other server starts before that.
const PREDECESSOR_LIMIT: Duration = Duration::from_secs(10);
const PREDECESSOR_POLL: Duration = Duration::from_millis(200);
/// Tests run many services against one server, each with a pool of connections.
const MAX_CONNECTIONS: &str = "max_connections=300";

/// What an accepted commit survives.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Durability {
    /// A power failure, and a `kill -9` of the server.
    Disk,
    /// Only a `kill -9` of the server: `fsync` is off, which is faster.
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
    /// Starts a server on the data in `folder`, or on new data where there is none. Returns when
    /// the server accepts connections and the services' roles and databases exist.
    pub async fn start(
        fetched: &Fetched,
        folder: &Path,
        port: u16,
        durability: Durability,
        logs: &Logs,
    ) -> Result<Self> {
        fs::create_dir_all(folder).with_context(|| format!("cannot create {}", folder.display()))?;
        // The marker `initialised` is written last, so an interrupted initdb is repeated from
        // scratch.
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

    /// The superuser's URL.
    pub fn url(&self) -> String {
        superuser_url(self.port)
    }

    /// The URL of a service's own database, for the service's own role.
    pub fn service_url(&self, service: Service) -> String {
        let name = service.database();
        database_url(&self.url(), &name, &name)
    }

    /// For each service with a database: the setting that holds the database's URL, and the URL.
    pub fn database_urls(&self) -> impl Iterator<Item = (String, String)> {
        with_database().map(|service| (service.database_url_setting(), self.service_url(service)))
    }

    /// Creates an empty database owned by a role. Returns its URL for that role.
    pub async fn create_database(&self, name: &str, owner: &str) -> Result<String> {
        create_database(&self.url(), name, owner).await
    }

    /// A fast shutdown: the server disconnects its clients and rolls open transactions back.
    pub async fn stop(&mut self) {
        self.process.stop(Signal::SIGINT, STOP_LIMIT).await;
    }

    /// Starts the server again on the same port and data, after `stop` or `process.kill`.
    pub async fn restart(&mut self) -> Result<()> {
        self.process.kill();
        self.process = launch(&self.fetched, &self.folder, self.port, self.durability, &self.logs).await?;
        Ok(())
    }
}

/// Creates an empty database owned by a role, on any server that this module has set up. Returns
/// its URL for that role.
pub async fn create_database(superuser_url: &str, name: &str, owner: &str) -> Result<String> {
    let mut connection = PgConnection::connect(superuser_url).await.context("cannot connect to Postgres")?;
    run(&mut connection, format!("create database {name} owner {owner}")).await?;
    // By default every role may connect to every database.
    run(&mut connection, format!("revoke connect on database {name} from public")).await?;
    connection.close().await?;
    Ok(database_url(superuser_url, name, owner))
}

async fn run(connection: &mut PgConnection, statement: String) -> Result<()> {
    // Safe: the names in the statement are ours. SQL has no parameters for names.
    let outcome = sqlx::raw_sql(AssertSqlSafe(statement.as_str())).execute(connection).await;
    outcome.map(drop).with_context(|| format!("Postgres rejects `{statement}`"))
}

fn superuser_url(port: u16) -> String {
    format!("postgres://postgres:{PASSWORD}@127.0.0.1:{port}/postgres")
}

fn database_url(superuser_url: &str, database: &str, role: &str) -> String {
    let (_, address) = superuser_url.split_once('@').expect("superuser_url writes a password");
    let (address, _) = address.split_once('/').expect("superuser_url writes a database");
    format!("postgres://{role}:{PASSWORD}@{address}/{database}")
}

/// Creates the roles and databases that do not exist yet.
async fn create_roles(superuser_url: &str) -> Result<()> {
    let mut connection = PgConnection::connect(superuser_url).await.context("cannot connect to Postgres")?;
    for service in with_database() {
        let name = service.database();
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

/// A command that runs a program of Postgres. Postgres refuses to run as root, so for root the
/// program runs as the user `nobody`, and the folder is given to that user.
fn program(fetched: &Fetched, name: &str, folder: &Path) -> Result<Command> {
    let mut command = process::command(fetched.postgres.join("bin").join(name));
    command.current_dir(folder);
    if geteuid().is_root() {
        let nobody = User::from_name("nobody")?
            .context("Postgres does not run as root and there is no user `nobody`: run this as another user")?;
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
    // The built-in locale, so that upper and lower case are the same on every machine.
    command.args(["--locale=C", "--locale-provider=builtin", "--builtin-locale=C.UTF-8"]);
    let mut initdb = Process::spawn("postgres", command, &logs.off_terminal())?;
    let status = initdb.wait().await;
    ensure!(status.success(), "Postgres cannot create its data folder{}", initdb.last_lines());
    Ok(())
}

/// Starts the server and waits until it accepts connections.
async fn launch(fetched: &Fetched, folder: &Path, port: u16, durability: Durability, logs: &Logs) -> Result<Process> {
    let deadline = Instant::now() + PREDECESSOR_LIMIT;
    let log = logs.file("postgres");
    loop {
        let logged_before = fs::read(&log).map_or(0, |text| text.len());
        let mut process = Process::spawn("postgres", server(fetched, folder, port, durability)?, logs)?;
        match process.until_ready(START_LIMIT, async || accepts_connections(port).await).await {
            Ok(()) => return Ok(process),
            Err(_) if reports_predecessor(&log, logged_before) && Instant::now() < deadline => {
                sleep(PREDECESSOR_POLL).await;
            }
            Err(error) => return Err(error),
        }
    }
}

/// Whether the server has logged, after the first `logged_before` bytes, that another server still
/// uses its data. All of that text is searched, because each session of the previous server may
/// write further lines after the message.
fn reports_predecessor(log: &Path, logged_before: usize) -> bool {
    let text = fs::read(log).unwrap_or_default();
    let text = String::from_utf8_lossy(text.get(logged_before..).unwrap_or_default());
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

async fn accepts_connections(port: u16) -> bool {
    match PgConnection::connect(&superuser_url(port)).await {
        Ok(connection) => connection.close().await.is_ok(),
        Err(_) => false,
    }
}
