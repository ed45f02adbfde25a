//! Two minutes of the soak with a fixed seed. `cargo xtask soak` and `cargo xtask test --full` set
//! the duration and the seed in the environment, and print the summary.

#![allow(clippy::unwrap_used, clippy::disallowed_methods, reason = "a panic is how a test fails")]

use std::time::Duration;

const DEFAULT_MINUTES: u64 = 2;
const DEFAULT_SEED: u64 = 1;

/// T41, I1 to I14: random faults happen while the whole system is under load.
#[tokio::test(flavor = "multi_thread")]
async fn random_faults_under_load_break_no_invariant() {
    let number = |variable, default| std::env::var(variable).map_or(default, |number| number.parse().unwrap());
    let minutes = number("WAYBILL_SOAK_MINUTES", DEFAULT_MINUTES);
    let seed = number("WAYBILL_SEED", DEFAULT_SEED);
    let summary = tests::soak::run(Duration::from_secs(60 * minutes), seed).await;
    match std::env::var("WAYBILL_SOAK_SUMMARY") {
        Ok(file) => std::fs::write(file, summary.to_string()).unwrap(),
        Err(_) => testbed::say::say(&summary),
    }
    assert!(summary.violations.is_empty(), "{summary}");
}
