//! PgBouncer, a pooler of database sessions, if it is installed.

use std::fs;
use std::os::unix::fs::chown;
use std::path::PathBuf;
use std::time::Duration;

use sqlx::{Connection, PgConnection};
use testbed::paths;
use testbed::postgres::Database;
use testbed::process::{self, Logs, Process, Scratch};
use testbed::testing::{free_port, prefix};

const START_LIMIT: Duration = Duration::from_secs(10);

/// A running pooler in front of one role of a database.
pub struct Pooler {
    process: Process,
    settings: PathBuf,
    port: u16,
    database: Database,
    _scratch: Scratch,
}

impl Pooler {
    /// `None`, and a line that says so, if PgBouncer is not installed.
    pub async fn start(database: &Database, mode: &str) -> Option<Self> {
        let Some(program) = paths::on_path(&["pgbouncer"]) else {
            eprintln!("skipped: there is no pgbouncer on the PATH");
            return None;
        };
        let scratch = Scratch::create("pooler").unwrap();
        let settings = scratch.path().join("pgbouncer.ini");
        let port = free_port();
        fs::write(&settings, ini(database, port, mode)).unwrap();
        let mut command = process::command(program);
        // As root PgBouncer only starts with this flag. It then reads its settings as this user.
        if let Some(nobody) = nobody() {
            chown(scratch.path(), Some(nobody.0), Some(nobody.1)).unwrap();
            chown(&settings, Some(nobody.0), Some(nobody.1)).unwrap();
            command.args(["-u", "nobody"]);
        }
        command.arg(&settings);
        let logs = Logs::to_files(&format!("tests/pooler-{}", prefix())).unwrap();
        let mut process = Process::spawn("pgbouncer", command, &logs).unwrap();
        let url = through(&database.url, port);
        let answers = async || match PgConnection::connect(&url).await {
            Ok(session) => session.close().await.is_ok(),
            Err(error) => error.as_database_error().is_some(),
        };
        process.until_ready(START_LIMIT, answers).await.unwrap();
        Some(Self { process, settings, port, database: database.clone(), _scratch: scratch })
    }

    /// The URL of the service's role through the pooler.
    pub fn url(&self) -> String {
        through(&self.database.url, self.port)
    }

    /// Switches the pooler to another mode while it runs.
    pub fn set_mode(&mut self, mode: &str) {
        fs::write(&self.settings, ini(&self.database, self.port, mode)).unwrap();
        self.process.signal_reload();
    }
}

fn nobody() -> Option<(u32, u32)> {
    testbed::postgres::substitute().unwrap().map(|user| (user.uid.as_raw(), user.gid.as_raw()))
}

/// PgBouncer's defaults, except addresses, and without a login: the pooler logs in for its clients.
fn ini(database: &Database, port: u16, mode: &str) -> String {
    let (login, rest) = database.url.trim_start_matches("postgres://").split_once('@').unwrap();
    let (user, password) = login.split_once(':').unwrap();
    let (host, server_port) = rest.split('/').next().unwrap().split_once(':').unwrap();
    format!(
        "[databases]
* = host={host} port={server_port} user={user} password={password}
[pgbouncer]
listen_addr = 127.0.0.1
listen_port = {port}
unix_socket_dir =
auth_type = any
pool_mode = {mode}
default_pool_size = 50
"
    )
}

fn through(url: &str, port: u16) -> String {
    let (login, rest) = url.split_once('@').unwrap();
    let (_, name) = rest.split_once('/').unwrap();
    format!("{login}@127.0.0.1:{port}/{name}")
}
