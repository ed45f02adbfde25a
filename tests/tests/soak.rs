//! Two minutes of the soak, with a seed that stays the same. For more, `cargo xtask soak` and
//! `cargo xtask test --full` say so in the environment, and print what this has found.

#![allow(clippy::unwrap_used, clippy::disallowed_methods, reason = "a panic is how a test fails")]

use std::time::Duration;

const MINUTES: u64 = 2;
const SEED: u64 = 1;

/// T41, I1 to I14: the whole system under load while random faults strike.
#[tokio::test(flavor = "multi_thread")]
async fn random_faults_under_load_break_no_promise() {
    let wanted = |name, usual| std::env::var(name).map_or(usual, |number| number.parse().unwrap());
    let minutes = wanted("WAYBILL_SOAK_MINUTES", MINUTES);
    let seed = wanted("WAYBILL_SEED", SEED);
    let summary = tests::soak::run(Duration::from_secs(60 * minutes), seed).await;
    match std::env::var("WAYBILL_SOAK_SUMMARY") {
        Ok(file) => std::fs::write(file, summary.to_string()).unwrap(),
        Err(_) => testbed::say::say(&summary),
    }
    assert!(summary.violations.is_empty(), "{summary}");
}
