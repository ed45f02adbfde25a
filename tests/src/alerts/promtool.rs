//! promtool, Prometheus' program that checks rules and evaluates them on given series, if there is
//! one.

use std::path::{Path, PathBuf};
use std::process::Command;

use testbed::paths;

/// The program that the variable `PROMTOOL` names, or the one on the PATH. `None`, and a line that
/// says so, if there is none.
pub fn find() -> Option<PathBuf> {
    let found = std::env::var_os("PROMTOOL").map(PathBuf::from).or_else(|| paths::on_path(&["promtool"]));
    if found.is_none() {
        eprintln!("skipped: there is no promtool on the PATH, and PROMTOOL does not name one");
    }
    found
}

/// # Errors
/// promtool found something wrong: its output.
pub fn run(promtool: &Path, arguments: &[&str], file: &Path) -> Result<String, String> {
    let output = Command::new(promtool).args(arguments).arg(file).current_dir(paths::root()).output();
    let output = output.map_err(|error| format!("{}: {error}", promtool.display()))?;
    let text = format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    if output.status.success() { Ok(text) } else { Err(text) }
}
