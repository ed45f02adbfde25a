//! `cargo xtask prepare`: lets the query macros of each service describe its queries to a real database and writes the answers
//! to `services/<service>/.sqlx`, from which they compile where there is no database.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::SystemTime;

use anyhow::{Context, Result, ensure};
use sqlx::migrate::Migrator;
use sqlx::{Connection, PgConnection};
use testbed::fetch::fetch;
use testbed::postgres::{Durability, Postgres, SERVICES};
use testbed::process::{Logs, Process, Scratch};
use testbed::say::say;
use testbed::services::cargo;
use testbed::{paths, ports};

pub async fn run(check: bool) -> Result<ExitCode> {
    let logs = Logs::fresh("prepare", false)?;
    let fetched = fetch().await?;
    let scratch = Scratch::create("prepare")?;
    let folder = scratch.path().join("postgres");
    let postgres = Postgres::start(&fetched, &folder, ports::free(), Durability::Process, &logs).await?;
    for service in SERVICES {
        let url = postgres.service_url(service);
        migrate(service, &url).await?;
        let described = scratch.path().join(service);
        fs::create_dir(&described)?;
        describe(service, &url, &described, &logs).await?;
        let (new, committed) = (queries(&described)?, queries(&committed(service))?);
        ensure!(
            !check || new == committed,
            "services/{service}/.sqlx is not current: run `cargo xtask prepare` and commit what it changes"
        );
        if new != committed {
            replace(&self::committed(service), &new)?;
        }
        say(format_args!("services/{service}/.sqlx: {} queries", new.len()));
    }
    Ok(ExitCode::SUCCESS)
}

fn committed(service: &str) -> PathBuf {
    paths::root().join("services").join(service).join(".sqlx")
}

async fn migrate(service: &str, url: &str) -> Result<()> {
    let migrations = paths::root().join("migrations").join(service);
    let migrator =
        Migrator::new(migrations.as_path()).await.with_context(|| format!("cannot read migrations/{service}"))?;
    let mut connection = PgConnection::connect(url).await?;
    migrator.run(&mut connection).await.with_context(|| format!("migrations/{service} fail"))?;
    Ok(connection.close().await?)
}

/// With a database at hand each macro writes what the database says about its query to SQLX_OFFLINE_DIR.
async fn describe(service: &str, url: &str, to: &Path, logs: &Logs) -> Result<()> {
    // The macros run only when the crate is compiled, so make cargo think that it changed.
    let main = paths::root().join("services").join(service).join("src/main.rs");
    File::options().append(true).open(&main)?.set_modified(SystemTime::now())?;
    let mut command = cargo();
    command.args(["check", "--quiet", "--all-targets", "-p", service]);
    command.env(format!("{}_DATABASE_URL", service.to_uppercase()), url);
    command.env("SQLX_OFFLINE", "false").env("SQLX_OFFLINE_DIR", to);
    let status = Process::spawn_on_terminal("cargo", command, logs)?.wait().await;
    ensure!(status.success(), "the service {service} does not compile: cargo's message is above");
    Ok(())
}

/// The files of a folder by name; none when there is no folder.
fn queries(folder: &Path) -> Result<BTreeMap<String, String>> {
    if !folder.exists() {
        return Ok(BTreeMap::new());
    }
    let read = |path: PathBuf| -> Result<(String, String)> {
        let name = path.file_name().and_then(|name| name.to_str()).context("a file without a name")?;
        Ok((name.to_owned(), fs::read_to_string(&path)?))
    };
    fs::read_dir(folder)?.map(|entry| read(entry?.path())).collect()
}

fn replace(folder: &Path, queries: &BTreeMap<String, String>) -> Result<()> {
    let _ = fs::remove_dir_all(folder);
    fs::create_dir_all(folder)?;
    for (name, text) in queries {
        fs::write(folder.join(name), text)?;
    }
    Ok(())
}
