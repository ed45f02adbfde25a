//! `cargo xtask credentials`: the files that compose.secure.yaml mounts.

use std::process::ExitCode;

use anyhow::Result;
use testbed::paths;
use testbed::say::say;

pub fn run() -> Result<ExitCode> {
    let folder = paths::root().join("target/secure");
    credentials::compose::write(&folder)?;
    say(format_args!("The certificates and passwords for compose.secure.yaml are in {}.", folder.display()));
    Ok(ExitCode::SUCCESS)
}
