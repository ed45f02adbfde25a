//! `cargo xtask prepare`: updates `services/<service>/.sqlx`. The query macros of sqlx describe
//! each query against a real database, and the descriptions let the service compile where there is
//! no database.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::SystemTime;

use anyhow::{Context, Result, ensure};
use testbed::fetch::fetch;
use testbed::postgres::{Durability, Postgres};
use testbed::process::{Logs, Process, Scratch};
use testbed::say::{say, timed};
use testbed::services::{Service, cargo};
use testbed::{paths, ports};

/// What happens to the descriptions.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Mode {
    Update,
    /// Nothing is changed. The command fails if a description is out of date.
    Check,
}

pub async fn run(mode: Mode) -> Result<ExitCode> {
    let logs = Logs::to_files("prepare")?;
    let fetched = fetch().await?;
    let scratch = Scratch::create("prepare")?;
    let folder = scratch.path().join("postgres");
    let start = Postgres::start(&fetched, &folder, ports::free(), Durability::Process, &logs);
    let postgres = timed("Starting Postgres (about 3 s) …", start).await?;
    for service in topology::with_database() {
        let name = service.name;
        say(format_args!("Compiling the service {name} against its database …"));
        let database = postgres.database(service);
        database.migrate(service).await?;
        let output = scratch.path().join(name);
        fs::create_dir(&output)?;
        describe(service, &database.url, &output, &logs).await?;
        let committed = folder_of(service).join(".sqlx");
        let old = read_files(&committed)?;
        let new = read_files(&output)?;
        ensure!(
            mode == Mode::Update || new == old,
            "services/{name}/.sqlx is out of date: run `cargo xtask prepare` and commit the changes"
        );
        if new != old {
            replace(&committed, &new)?;
        }
        let change = if new == old { "up to date" } else { "updated" };
        say(format_args!("  services/{name}/.sqlx is {change}: {} queries", new.len()));
    }
    Ok(ExitCode::SUCCESS)
}

fn folder_of(service: Service) -> PathBuf {
    paths::root().join("services").join(service.name)
}

/// Compiles the service with a database. Each query macro then writes a description of its query to
/// `SQLX_OFFLINE_DIR`.
async fn describe(service: Service, url: &str, output: &Path, logs: &Logs) -> Result<()> {
    // The macros run only when the crate is compiled, so cargo must find a changed file.
    let main = folder_of(service).join("src/main.rs");
    File::options().append(true).open(&main)?.set_modified(SystemTime::now())?;
    let mut command = cargo();
    command.args(["check", "--quiet", "--all-targets", "-p", service.name]);
    command.env(service.database_url_setting(), url);
    command.env("SQLX_OFFLINE", "false").env("SQLX_OFFLINE_DIR", output);
    let status = Process::spawn_on_terminal("cargo", command, logs)?.wait().await;
    ensure!(status.success(), "the service {} does not compile: see cargo's messages above", service.name);
    Ok(())
}

/// The files of a folder by name. Empty if the folder does not exist.
fn read_files(folder: &Path) -> Result<BTreeMap<String, String>> {
    if !folder.exists() {
        return Ok(BTreeMap::new());
    }
    let read = |path: PathBuf| -> Result<(String, String)> {
        let name = path.file_name().and_then(|name| name.to_str()).context("the name of a file is not UTF-8")?;
        Ok((name.to_owned(), fs::read_to_string(&path)?))
    };
    fs::read_dir(folder)?.map(|entry| read(entry?.path())).collect()
}

fn replace(folder: &Path, files: &BTreeMap<String, String>) -> Result<()> {
    let _ = fs::remove_dir_all(folder);
    fs::create_dir_all(folder)?;
    for (name, text) in files {
        fs::write(folder.join(name), text)?;
    }
    Ok(())
}
