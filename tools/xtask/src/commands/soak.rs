//! `cargo xtask soak`: load and random faults for a given time, and a report of violated
//! guarantees.

use std::fs;
use std::process::ExitCode;

use anyhow::Result;
use testbed::process::Logs;
use testbed::say::say;

use super::test;

/// Runs the test of the same name for that time and with that seed, and prints its summary at the
/// end.
pub async fn run(minutes: u64, seed: u64) -> Result<ExitCode> {
    say(format_args!(
        "The soak runs for {minutes} minutes with seed {seed}, after the services and the test are built."
    ));
    let summary = Logs::to_files("soak")?.folder().join("summary.txt");
    let settings = [
        ("WAYBILL_SOAK_MINUTES", minutes.to_string()),
        ("WAYBILL_SEED", seed.to_string()),
        ("WAYBILL_SOAK_SUMMARY", summary.display().to_string()),
    ];
    let arguments = ["--test", "soak", "--", "--nocapture", "random_faults_under_load"].map(str::to_owned);
    let code = test::run_with(&arguments, &settings, None).await?;
    if let Ok(summary) = fs::read_to_string(&summary) {
        say(summary);
    }
    Ok(code)
}
