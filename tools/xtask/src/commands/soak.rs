//! `cargo xtask soak`: load and random faults for as long as wanted, and whether a promise was broken.

use std::fs;
use std::process::ExitCode;

use anyhow::Result;
use testbed::process::Logs;
use testbed::say::say;

use super::test;

/// Runs the test of that name with these numbers. Its summary comes last.
pub async fn run(minutes: u64, seed: u64) -> Result<ExitCode> {
    let summary = Logs::fresh("soak", false)?.folder().join("summary.txt");
    let settings = [
        ("WAYBILL_SOAK_MINUTES", minutes.to_string()),
        ("WAYBILL_SEED", seed.to_string()),
        ("WAYBILL_SOAK_SUMMARY", summary.display().to_string()),
    ];
    let arguments = ["--test", "soak", "--", "--nocapture"].map(str::to_owned);
    let code = test::run_with(&arguments, &settings, None).await?;
    if let Ok(summary) = fs::read_to_string(&summary) {
        say(summary);
    }
    Ok(code)
}
