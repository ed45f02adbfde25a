//! `cargo xtask test --full`: runs every test with more repetitions and a longer soak, and writes
//! the results to docs/last-run.md.

use std::fs;
use std::process::ExitCode;

use anyhow::Result;
use testbed::process::Logs;
use testbed::say::say;

use super::{report, test};

const SOAK_MINUTES: &str = "10";

pub async fn run() -> Result<ExitCode> {
    let logs = Logs::to_files_and_terminal("full")?;
    let summary = logs.folder().join("soak.txt");
    let settings = [
        ("WAYBILL_FULL", "1".to_owned()),
        ("WAYBILL_SOAK_MINUTES", SOAK_MINUTES.to_owned()),
        ("WAYBILL_SOAK_SUMMARY", summary.display().to_string()),
    ];
    let code = test::run_with(&["--no-fail-fast".to_owned()], &settings, Some(&logs)).await?;
    let soak = fs::read_to_string(summary).unwrap_or_else(|_| "The soak did not finish.".to_owned());
    let page = report::write(&fs::read_to_string(logs.file("cargo"))?, &soak)?;
    say(format_args!("Wrote {}", page.display()));
    Ok(code)
}
