//! Unpacks native programs from jars.

use std::fs::{self, File};
use std::io::{self, BufReader};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use liblzma::read::XzDecoder;
use zip::ZipArchive;

/// The name of a jar that cannot be opened, if there is one. A zip has its directory at its end, so
/// opening detects a truncated file.
pub fn damaged_jar(folder: &Path) -> Result<Option<String>> {
    let jars = jars(folder)?;
    let damaged = jars.into_iter().find(|jar| open(jar).is_err());
    Ok(damaged.map(|jar| file_name(&jar).to_owned()))
}

/// The jar contains one `.txz`, which contains the programs.
pub fn postgres(jars: &Path, to: &Path) -> Result<()> {
    let mut jar = open(&jar(jars, "embedded-postgres-binaries")?)?;
    let name = entry(&jar, |name| name.ends_with(".txz"))?;
    let packed = XzDecoder::new(BufReader::new(jar.by_name(&name)?));
    tar::Archive::new(packed).unpack(to).with_context(|| format!("cannot unpack {name}"))
}

/// The jar contains one program per platform: `redis-server-<version>-<platform>`.
pub fn redis(jars: &Path, platform: &str, to: &Path) -> Result<()> {
    let mut jar = open(&jar(jars, "embedded-redis")?)?;
    let name = entry(&jar, |name| name.starts_with("redis-server-") && name.ends_with(platform))?;
    io::copy(&mut jar.by_name(&name)?, &mut File::create(to)?).with_context(|| format!("cannot unpack {name}"))?;
    Ok(fs::set_permissions(to, fs::Permissions::from_mode(0o755))?)
}

fn jars(folder: &Path) -> Result<Vec<PathBuf>> {
    let entries = fs::read_dir(folder).with_context(|| format!("cannot read {}", folder.display()))?;
    let paths = entries.map(|entry| Ok(entry?.path())).collect::<Result<Vec<_>>>()?;
    Ok(paths.into_iter().filter(|path| path.extension().is_some_and(|end| end == "jar")).collect())
}

fn jar(folder: &Path, name: &str) -> Result<PathBuf> {
    let found = jars(folder)?.into_iter().find(|jar| file_name(jar).starts_with(name));
    found.with_context(|| format!("no jar named {name}…: deploy/local/pom.xml must list it"))
}

fn file_name(path: &Path) -> &str {
    path.file_name().and_then(|name| name.to_str()).unwrap_or_default()
}

fn open(jar: &Path) -> Result<ZipArchive<File>> {
    ZipArchive::new(File::open(jar)?).with_context(|| format!("cannot read {}", jar.display()))
}

fn entry(jar: &ZipArchive<File>, wanted: impl Fn(&str) -> bool) -> Result<String> {
    let name = jar.file_names().find(|name| wanted(name));
    name.map(str::to_owned).context("the jar does not contain a program for this platform")
}
