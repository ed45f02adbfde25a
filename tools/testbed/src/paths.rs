//! Where files are stored. Downloads and logs are below `target/`. Data is outside the checkout:
//! when we are root, Postgres runs as another user, who may not be able to enter the home directory
//! around the checkout.

use std::fs;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use nix::unistd::geteuid;

/// The root of the checkout that this program was built from.
pub fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR")).ancestors().nth(2).expect("the crate is in tools/ of the workspace")
}

/// Downloads and logs.
pub fn local() -> PathBuf {
    root().join("target/local")
}

/// One folder per user and checkout. It survives a reboot.
pub fn data() -> Result<PathBuf> {
    let mut hasher = DefaultHasher::new();
    root().hash(&mut hasher);
    let persistent = Path::new("/var/tmp");
    let base = if persistent.is_dir() { persistent.to_owned() } else { std::env::temp_dir() };
    let folder = base.join(format!("waybill-{}-{:016x}", geteuid(), hasher.finish()));
    fs::create_dir_all(&folder).with_context(|| format!("cannot create {}", folder.display()))?;
    // Every user may write to the parent, so another user may have created a folder of this name.
    ensure!(
        fs::symlink_metadata(&folder)?.uid() == geteuid().as_raw(),
        "{} belongs to another user: remove it and run this again",
        folder.display()
    );
    Ok(folder)
}

/// The path of the first of these programs that is on the PATH.
pub fn on_path(names: &[&str]) -> Option<PathBuf> {
    let path = std::env::var_os("PATH")?;
    names
        .iter()
        .find_map(|name| std::env::split_paths(&path).map(|folder| folder.join(name)).find(|file| file.is_file()))
}
