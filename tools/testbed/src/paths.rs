//! Where things lie. Downloads and logs are under `target/`; data lies outside the checkout, because Postgres runs as another
//! user when we are root, and that user cannot enter a closed home.

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

pub fn local() -> PathBuf {
    root().join("target/local")
}

/// One folder per user and checkout, kept over a reboot.
pub fn data() -> Result<PathBuf> {
    let mut hasher = DefaultHasher::new();
    root().hash(&mut hasher);
    let kept = Path::new("/var/tmp");
    let base = if kept.is_dir() { kept.to_owned() } else { std::env::temp_dir() };
    let folder = base.join(format!("waybill-{}-{:016x}", geteuid(), hasher.finish()));
    fs::create_dir_all(&folder).with_context(|| format!("cannot create {}", folder.display()))?;
    // The parent is open to all: what somebody else has put there under our name is not ours to use.
    ensure!(
        fs::symlink_metadata(&folder)?.uid() == geteuid().as_raw(),
        "{} belongs to another user: remove it and run this again",
        folder.display()
    );
    Ok(folder)
}

/// The first program of these names that the PATH holds.
pub fn on_path(names: &[&str]) -> Option<PathBuf> {
    let path = std::env::var_os("PATH")?;
    names
        .iter()
        .find_map(|name| std::env::split_paths(&path).map(|folder| folder.join(name)).find(|file| file.is_file()))
}
