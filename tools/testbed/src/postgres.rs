//! A Postgres server with two roles and a database for each service that has one.

use std::fs;
use std::os::unix::fs::{PermissionsExt, chown};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use nix::sys::signal::Signal;
use nix::unistd::{User, geteuid};
use sqlx::migrate::Migrator;
use sqlx::{AssertSqlSafe, Connection, PgConnection};
use tokio::time::{Instant, sleep};
use topology::{Service, with_database};

use crate::fetch::Fetched;
use crate::paths;
use crate::process::{self, Logs, Process};

/// The password of the superuser `postgres` and of every role. It protects nothing: the server
/// listens on loopback and holds test data.
pub const PASSWORD: &str = "waybill-local";

/// What a service gets on a server. Docker runs the same files.
const ROLES: &str = include_str!("../../../deploy/postgres/service/roles.sql");
const DATABASE: &str = include_str!("../../../deploy/postgres/service/database.sql");
/// Names the layout of the data. Data of an older layout, with other owners of the tables, is
/// removed.
const MARKER: &str = "initialised-2";

/// SQLSTATE of `create role` and `create database` for what exists.
const EXISTS: [&str; 2] = ["42710", "42P04"];

const START_LIMIT: Duration = Duration::from_secs(60);
const STOP_LIMIT: Duration = Duration::from_secs(10);
/// How long a start is retried while the previous server on the same data is still exiting. After a
/// `kill -9` its child processes exit a moment later, and no other server starts before that.
const PREDECESSOR_LIMIT: Duration = Duration::from_secs(10);
const PREDECESSOR_POLL: Duration = Duration::from_millis(200);
/// How long a server may take to read changed files.
const RELOAD_LIMIT: Duration = Duration::from_secs(10);
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

/// The certificate of a server, in PEM format.
#[derive(Clone, Copy)]
pub struct Tls<'a> {
    pub certificate: &'a str,
    pub key: &'a str,
    /// The authority that signs the certificates of clients.
    pub client_authority: &'a str,
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
        // The marker is written last, so an interrupted initdb is repeated from scratch.
        if !folder.join(MARKER).exists() {
            let _ = fs::remove_dir_all(folder.join("data"));
            initialise(fetched, folder, logs).await?;
            fs::write(folder.join(MARKER), "")?;
        }
        let process = launch(fetched, folder, port, durability, logs).await?;
        let postgres =
            Self { process, port, folder: folder.to_owned(), durability, fetched: fetched.clone(), logs: logs.clone() };
        create_services(&postgres.url()).await?;
        Ok(postgres)
    }

    /// The superuser's URL.
    pub fn url(&self) -> String {
        superuser_url(self.port)
    }

    /// A service's own database.
    pub fn database(&self, service: Service) -> Database {
        Database::of(service, &self.url(), &service.database())
    }

    /// Makes all sessions read-only, or writable again.
    pub async fn set_read_only(&self, read_only: bool) -> Result<()> {
        let mut connection = PgConnection::connect(&self.url()).await.context("cannot connect to Postgres")?;
        let value = if read_only { "on" } else { "off" };
        let statement = format!("alter system set default_transaction_read_only = {value}");
        // `alter system` itself is allowed in a read-only transaction.
        sqlx::raw_sql(AssertSqlSafe(statement)).execute(&mut connection).await?;
        sqlx::raw_sql("select pg_reload_conf()").execute(&mut connection).await?;
        Ok(connection.close().await?)
    }

    /// From now on the server offers TLS with this certificate to new sessions, or no TLS.
    pub async fn set_tls(&self, tls: Option<Tls<'_>>) -> Result<()> {
        if let Some(Tls { certificate, key, client_authority }) = tls {
            self.write("server.crt", certificate)?;
            self.write("server.key", key)?;
            self.write("clients.crt", client_authority)?;
        }
        let ssl = if tls.is_some() { "on" } else { "off" };
        self.alter(&[&format!("ssl = {ssl}"), "ssl_ca_file = 'clients.crt'"]).await
    }

    /// From now on new sessions are accepted by these lines of pg_hba.conf. The superuser may
    /// always connect.
    pub async fn set_rules(&self, rules: &str) -> Result<()> {
        self.write("pg_hba.conf", &format!("host all postgres 127.0.0.1/32 scram-sha-256\n{rules}\n"))?;
        self.alter(&[]).await
    }

    /// Changes settings and waits until new sessions have them.
    async fn alter(&self, settings: &[&str]) -> Result<()> {
        let mut connection = PgConnection::connect(&self.url()).await.context("cannot connect to Postgres")?;
        for setting in settings {
            sqlx::raw_sql(AssertSqlSafe(format!("alter system set {setting}"))).execute(&mut connection).await?;
        }
        let before: String = sqlx::query_scalar("select pg_conf_load_time()::text").fetch_one(&mut connection).await?;
        sqlx::raw_sql("select pg_reload_conf()").execute(&mut connection).await?;
        connection.close().await?;
        let deadline = Instant::now() + RELOAD_LIMIT;
        loop {
            let mut connection = PgConnection::connect(&self.url()).await.context("cannot connect to Postgres")?;
            let loaded: String =
                sqlx::query_scalar("select pg_conf_load_time()::text").fetch_one(&mut connection).await?;
            connection.close().await?;
            if loaded != before {
                return Ok(());
            }
            ensure!(Instant::now() < deadline, "Postgres does not read its changed files");
            sleep(PREDECESSOR_POLL).await;
        }
    }

    /// Writes a file that only the server may read.
    fn write(&self, name: &str, text: &str) -> Result<()> {
        let file = self.folder.join("data").join(name);
        fs::write(&file, text).with_context(|| format!("cannot write {}", file.display()))?;
        fs::set_permissions(&file, fs::Permissions::from_mode(0o600))?;
        give_to_server(&file)
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

/// The URLs of one database for the two roles of its service.
#[derive(Clone, Debug)]
pub struct Database {
    /// For the role with which the service reads and writes rows.
    pub url: String,
    /// For the role that owns the tables and migrates them.
    pub owner_url: String,
}

impl Database {
    fn of(service: Service, superuser_url: &str, name: &str) -> Self {
        let url = |role: &str| database_url(superuser_url, name, role);
        Self { url: url(&service.database()), owner_url: url(&service.owner()) }
    }

    /// Applies the migrations of a service, as its subcommand `migrate` does.
    pub async fn migrate(&self, service: Service) -> Result<()> {
        let name = service.name;
        let migrations = paths::root().join("migrations").join(name);
        let migrator =
            Migrator::new(migrations.as_path()).await.with_context(|| format!("cannot read migrations/{name}"))?;
        let mut connection = PgConnection::connect(&self.owner_url).await?;
        migrator.run(&mut connection).await.with_context(|| format!("migrations/{name} fail"))?;
        Ok(connection.close().await?)
    }
}

/// Creates an empty database for a service, on any server that this module has set up.
pub async fn create_database(superuser_url: &str, name: &str, service: Service) -> Result<Database> {
    let (database, connected) = DATABASE.split_once("\\connect :\"database\"\n").expect("database.sql connects once");
    let mut connection = PgConnection::connect(superuser_url).await.context("cannot connect to Postgres")?;
    run(&mut connection, database, name, service).await?;
    connection.close().await?;
    let (server, _) = superuser_url.rsplit_once('/').expect("superuser_url writes a database");
    let mut connection = PgConnection::connect(&format!("{server}/{name}")).await?;
    run(&mut connection, connected, name, service).await?;
    connection.close().await?;
    Ok(Database::of(service, superuser_url, name))
}

/// Runs a part of a file in deploy/postgres/service. Sets the variables of psql, and sends each
/// statement by itself, as psql does: `create database` cannot run together with others.
async fn run(connection: &mut PgConnection, script: &str, database: &str, service: Service) -> Result<()> {
    let lines = script.lines().filter(|line| !line.starts_with("--"));
    let script = lines.collect::<Vec<_>>().join("\n");
    for statement in script.split_inclusive(';').filter(|statement| !statement.trim().is_empty()) {
        let statement = statement.replace(":\"database\"", database);
        let statement = statement.replace(":\"owner\"", &service.owner()).replace(":\"service\"", &service.database());
        let statement = statement.replace(":'owner_password'", &format!("'{PASSWORD}'"));
        let statement = statement.replace(":'password'", &format!("'{PASSWORD}'"));
        // Safe: the names in the statement are ours. SQL has no parameters for names.
        match sqlx::raw_sql(AssertSqlSafe(statement.as_str())).execute(&mut *connection).await {
            // The role or the database exists. All other statements may be repeated.
            Err(sqlx::Error::Database(error)) if error.code().is_some_and(|code| EXISTS.contains(&&*code)) => {}
            outcome => {
                outcome.with_context(|| format!("Postgres rejects `{}`", statement.trim()))?;
            }
        }
    }
    Ok(())
}

fn superuser_url(port: u16) -> String {
    format!("postgres://postgres:{PASSWORD}@127.0.0.1:{port}/postgres")
}

fn database_url(superuser_url: &str, database: &str, role: &str) -> String {
    let (_, address) = superuser_url.split_once('@').expect("superuser_url writes a password");
    let (address, _) = address.split_once('/').expect("superuser_url writes a database");
    format!("postgres://{role}:{PASSWORD}@{address}/{database}")
}

/// Creates the roles and the database of every service that does not have them yet, as
/// deploy/postgres/init.sql does.
async fn create_services(superuser_url: &str) -> Result<()> {
    let mut connection = PgConnection::connect(superuser_url).await.context("cannot connect to Postgres")?;
    sqlx::raw_sql("revoke connect on database postgres, template1 from public").execute(&mut connection).await?;
    for service in with_database() {
        run(&mut connection, ROLES, &service.database(), service).await?;
        create_database(superuser_url, &service.database(), service).await?;
    }
    Ok(connection.close().await?)
}

/// A command that runs a program of Postgres. Postgres refuses to run as root, so for root the
/// program runs as the user `nobody`, and the folder is given to that user.
fn program(fetched: &Fetched, name: &str, folder: &Path) -> Result<Command> {
    let mut command = process::command(fetched.postgres.join("bin").join(name));
    command.current_dir(folder);
    if let Some(nobody) = substitute()? {
        give_to_server(folder)?;
        command.uid(nobody.uid.as_raw()).gid(nobody.gid.as_raw());
    }
    Ok(command)
}

/// The user as whom the server runs, if this process is root.
pub fn substitute() -> Result<Option<User>> {
    if !geteuid().is_root() {
        return Ok(None);
    }
    let nobody = User::from_name("nobody")?
        .context("Postgres does not run as root and there is no user `nobody`: run this as another user")?;
    Ok(Some(nobody))
}

fn give_to_server(path: &Path) -> Result<()> {
    if let Some(nobody) = substitute()? {
        chown(path, Some(nobody.uid.as_raw()), Some(nobody.gid.as_raw()))?;
    }
    Ok(())
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
    // In the data folder, which is deleted with it. By default a server that is killed leaves its
    // shared memory in /dev/shm until the next boot.
    command.args(["-c", "dynamic_shared_memory_type=mmap"]);
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
