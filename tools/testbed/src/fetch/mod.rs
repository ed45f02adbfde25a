//! Fetches what `deploy/local/pom.xml` pins, once. Later runs need no network.
//!
//! Each folder is filled under a temporary name and renamed when it is complete, so an interrupted
//! run leaves no folder that looks complete. A folder stores the text that it was made from. It is
//! made again when that text has changed or a jar is damaged.

mod unpack;

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use nix::unistd::geteuid;
use tokio::time::sleep;

use crate::paths;
use crate::process::{self, Logs, Process};
use crate::say::{Progress, say};

/// The oldest version of Java on which Kafka 4 runs.
const MIN_JAVA: u32 = 17;
/// The file in a folder that stores the text the folder was made from.
const STAMP: &str = "made-from";
const POLL: Duration = Duration::from_millis(200);

#[derive(Clone)]
pub struct Fetched {
    pub java: PathBuf,
    /// The value of `java -cp`.
    pub jars: String,
    /// The folder with `bin/postgres` and `bin/initdb`.
    pub postgres: PathBuf,
    pub redis_server: PathBuf,
}

/// Returns the paths of everything that the local stack runs. Downloads and unpacks only what is
/// missing.
pub async fn fetch() -> Result<Fetched> {
    let platform = Platform::this()?;
    let java = java()?;
    let local = paths::local();
    fs::create_dir_all(&local).with_context(|| format!("cannot create {}", local.display()))?;
    // Two runs that start at the same time fetch one after the other. Closing the file releases the
    // lock.
    let lock = File::create(local.join("lock"))?;
    if lock.try_lock().is_err() {
        say("Waiting for another run that fetches Kafka, Postgres and Redis …");
        while lock.try_lock().is_err() {
            sleep(POLL).await;
        }
    }

    let pom = fs::read_to_string(pom()).context("cannot read deploy/local/pom.xml")?;
    let stamp = format!("{}\n{pom}", platform.postgres);
    let jars = local.join("jars");
    if !is_made_from(&jars, &stamp) || unpack::damaged_jar(&jars)?.is_some() {
        fetch_jars(&platform, &jars, &stamp).await?;
    }
    let native = native_folder()?;
    if !is_made_from(&native, &stamp) {
        let _progress = Progress::start("Unpacking Postgres and Redis (about 10 s, once)");
        let jars = jars.clone();
        let native = native.clone();
        tokio::task::spawn_blocking(move || {
            fill(&native, &stamp, |folder| {
                unpack::postgres(&jars, &folder.join("postgres"))?;
                unpack::redis(&jars, platform.redis, &folder.join("redis-server"))
            })
        })
        .await??;
    }
    let installed = paths::on_path(&["valkey-server", "redis-server"]);
    Ok(Fetched {
        java,
        jars: jars.join("*").display().to_string(),
        postgres: native.join("postgres"),
        redis_server: installed.unwrap_or_else(|| native.join("redis-server")),
    })
}

/// The name of this platform in each of the two jars that hold native programs.
struct Platform {
    postgres: &'static str,
    redis: &'static str,
}

impl Platform {
    fn this() -> Result<Self> {
        let (postgres, redis) = match (std::env::consts::OS, std::env::consts::ARCH) {
            ("linux", "x86_64") => ("linux-amd64", "linux-amd64"),
            ("linux", "aarch64") => ("linux-arm64v8", "linux-arm64"),
            ("macos", "x86_64") => ("darwin-amd64", "darwin-amd64"),
            ("macos", "aarch64") => ("darwin-arm64v8", "darwin-arm64"),
            (os, arch) => {
                bail!("there are no Postgres binaries for {os} on {arch}: use `docker compose up --build` instead")
            }
        };
        Ok(Self { postgres, redis })
    }
}

fn pom() -> PathBuf {
    paths::root().join("deploy/local/pom.xml")
}

/// The folder of the native programs. For root it is next to the data, because Postgres then runs
/// as a user who may not be able to enter the checkout.
fn native_folder() -> Result<PathBuf> {
    let folder = if geteuid().is_root() { paths::data()? } else { paths::local() };
    Ok(folder.join("native"))
}

fn java() -> Result<PathBuf> {
    let advice = "install a Java runtime of version 17 or newer (on Debian: `apt install openjdk-17-jre-headless`) \
                  and run this again";
    let java = paths::on_path(&["java"])
        .with_context(|| format!("Kafka needs Java and there is no `java` on the PATH: {advice}"))?;
    let output = Command::new(&java).arg("-version").output().context("cannot run java")?;
    let output = String::from_utf8_lossy(&output.stderr).into_owned();
    let version = java_version(&output).with_context(|| format!("`java -version` prints no version: {advice}"))?;
    ensure!(version >= MIN_JAVA, "Kafka needs Java {MIN_JAVA} and `java` on the PATH is version {version}: {advice}");
    Ok(java)
}

/// The major version in a line such as `openjdk version "17.0.13" 2024-10-15`.
fn java_version(output: &str) -> Option<u32> {
    let version = output.split_once("version \"")?.1;
    version.split(|c: char| !c.is_ascii_digit()).next()?.parse().ok()
}

/// Fetches through the user's own Maven repository. If a jar in it is damaged, fetches again
/// through an empty repository of our own.
async fn fetch_jars(platform: &Platform, jars: &Path, stamp: &str) -> Result<()> {
    let mvn = paths::on_path(&["mvn"]).context(
        "Maven downloads Kafka, Postgres and Redis and there is no `mvn` on the PATH: install it (on Debian: \
         `apt install maven`) and run this again",
    )?;
    let partial = partial(jars)?;
    copy_dependencies(&mvn, platform, &partial, None).await?;
    if unpack::damaged_jar(&partial)?.is_some() {
        fs::remove_dir_all(&partial)?;
        let repository = paths::local().join("maven");
        let _ = fs::remove_dir_all(&repository);
        copy_dependencies(&mvn, platform, &partial, Some(&repository)).await?;
        fs::remove_dir_all(&repository)?;
    }
    if let Some(jar) = unpack::damaged_jar(&partial)? {
        bail!("{jar} was not downloaded completely: check the connection (perhaps a proxy) and run this again");
    }
    finish(&partial, jars, stamp)
}

async fn copy_dependencies(mvn: &Path, platform: &Platform, to: &Path, repository: Option<&Path>) -> Result<()> {
    let progress = Progress::start("Downloading Kafka, Postgres and Redis with Maven (about 90 MB, once)");
    let mut command = process::command(mvn);
    command.args(["--batch-mode", "--file"]).arg(pom());
    command.arg("dependency:copy-dependencies");
    command.arg(format!("-Dpostgres.platform={}", platform.postgres));
    command.arg(format!("-DoutputDirectory={}", to.display()));
    if let Some(repository) = repository {
        command.arg(format!("-Dmaven.repo.local={}", repository.display()));
    }
    let logs = Logs::to_files("fetch")?;
    let mut maven = Process::spawn("maven", command, &logs)?;
    let status = loop {
        tokio::select! {
            status = maven.wait() => break status,
            () = sleep(POLL) => progress.detail(&last_download(&logs)),
        }
    };
    let log = logs.file("maven");
    ensure!(
        status.success(),
        "Maven could not download Kafka, Postgres and Redis: check the connection and run this again. Its log is {}. \
         Its first error: {}",
        log.display(),
        lines_with("[ERROR]", &log).first().map_or("", String::as_str)
    );
    Ok(())
}

/// The file that Maven is downloading.
fn last_download(logs: &Logs) -> String {
    let lines = lines_with("Download", &logs.file("maven"));
    lines.last().and_then(|line| line.rsplit('/').next()).unwrap_or_default().to_owned()
}

fn lines_with(word: &str, log: &Path) -> Vec<String> {
    let text = fs::read_to_string(log).unwrap_or_default();
    text.lines().filter(|line| line.contains(word)).map(str::to_owned).collect()
}

fn is_made_from(folder: &Path, stamp: &str) -> bool {
    fs::read_to_string(folder.join(STAMP)).is_ok_and(|text| text == stamp)
}

fn fill(folder: &Path, stamp: &str, make: impl FnOnce(&Path) -> Result<()>) -> Result<()> {
    let partial = partial(folder)?;
    make(&partial)?;
    finish(&partial, folder, stamp)
}

/// Creates an empty folder next to the one that is to be made.
fn partial(folder: &Path) -> Result<PathBuf> {
    let partial = folder.with_extension("partial");
    let _ = fs::remove_dir_all(&partial);
    fs::create_dir_all(&partial).with_context(|| format!("cannot create {}", partial.display()))?;
    Ok(partial)
}

/// Renames the complete folder to its final name.
fn finish(partial: &Path, folder: &Path, stamp: &str) -> Result<()> {
    fs::write(partial.join(STAMP), stamp)?;
    let _ = fs::remove_dir_all(folder);
    fs::rename(partial, folder).with_context(|| format!("cannot create {}", folder.display()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::process::Scratch;

    #[test]
    fn the_major_version_of_java_is_parsed() {
        assert_eq!(java_version("openjdk version \"17.0.13\" 2024-10-15"), Some(17));
        assert_eq!(java_version("openjdk version \"26-ea\""), Some(26));
        assert_eq!(java_version("java version \"1.8.0_392\""), Some(1));
        assert_eq!(java_version("no such thing"), None);
    }

    #[test]
    fn an_interrupted_or_outdated_folder_is_made_again() {
        let scratch = Scratch::create("fetch").unwrap();
        let folder = scratch.path().join("made");
        assert!(fill(&folder, "1", |_| bail!("interrupted")).is_err());
        assert!(!is_made_from(&folder, "1"));
        fill(&folder, "1", |partial| Ok(fs::write(partial.join("file"), "old")?)).unwrap();
        assert!(is_made_from(&folder, "1") && !is_made_from(&folder, "2"));
        fill(&folder, "2", |partial| Ok(fs::write(partial.join("other"), "new")?)).unwrap();
        assert!(is_made_from(&folder, "2") && !folder.join("file").exists());
    }
}
