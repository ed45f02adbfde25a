//! Two minutes of the soak with a fixed seed, and one minute on three brokers. `cargo xtask soak`
//! and `cargo xtask test --full` set the duration and the seed of the first one in the environment,
//! and print its summary.

#![allow(clippy::unwrap_used, clippy::disallowed_methods, reason = "a panic is how a test fails")]

use std::time::Duration;

use tests::soak::Cluster;
use tokio::sync::Mutex;

const DEFAULT_MINUTES: u64 = 2;
const DEFAULT_SEED: u64 = 1;
const ON_THREE_BROKERS: Duration = Duration::from_secs(60);
/// Only one soak runs at a time: each puts the whole machine under load.
static TURN: Mutex<()> = Mutex::const_new(());

/// T41, I1 to I14: random faults happen while the whole system is under load.
#[tokio::test(flavor = "multi_thread")]
async fn random_faults_under_load_break_no_invariant() {
    let _turn = TURN.lock().await;
    let number = |variable, default| std::env::var(variable).map_or(default, |number| number.parse().unwrap());
    let minutes = number("WAYBILL_SOAK_MINUTES", DEFAULT_MINUTES);
    let seed = number("WAYBILL_SEED", DEFAULT_SEED);
    let summary = tests::soak::run(Duration::from_secs(60 * minutes), seed, Cluster::OneBroker).await;
    match std::env::var("WAYBILL_SOAK_SUMMARY") {
        Ok(file) => std::fs::write(file, summary.to_string()).unwrap(),
        Err(_) => testbed::say::say(&summary),
    }
    assert!(summary.violations.is_empty(), "{summary}");
}

/// T14, T41, I1 to I14: the same on three brokers, whose loss leaves partitions without a leader.
#[tokio::test(flavor = "multi_thread")]
async fn random_losses_of_brokers_under_load_break_no_invariant() {
    let _turn = TURN.lock().await;
    let summary = tests::soak::run(ON_THREE_BROKERS, DEFAULT_SEED, Cluster::ThreeBrokers).await;
    testbed::say::say(&summary);
    assert!(summary.violations.is_empty(), "{summary}");
}
