//! `cargo xtask test --full`: every test with its long repeats, a longer soak, and the page that says what that showed.

use std::fs;
use std::process::ExitCode;

use anyhow::Result;
use testbed::process::Logs;

use super::{report, test};

const SOAK_MINUTES: &str = "10";

pub async fn run() -> Result<ExitCode> {
    let logs = Logs::fresh("full", true)?;
    let summary = logs.folder().join("soak.txt");
    let settings = [
        ("WAYBILL_FULL", "1".to_owned()),
        ("WAYBILL_SOAK_MINUTES", SOAK_MINUTES.to_owned()),
        ("WAYBILL_SOAK_SUMMARY", summary.display().to_string()),
    ];
    let code = test::run_with(&["--no-fail-fast".to_owned()], &settings, Some(&logs)).await?;
    let soak = fs::read_to_string(summary).unwrap_or_else(|_| "did not come to its end".to_owned());
    report::write(&fs::read_to_string(logs.file("cargo"))?, &soak)?;
    Ok(code)
}
