//! `cargo xtask metrics`: writes `docs/metrics.md`. Only a running service knows all of its
//! metrics, so the test that compares the page with the services writes it.

use std::process::ExitCode;

use anyhow::Result;

use super::test::run_with;

/// Makes the test write the page.
const WRITE: &str = "WAYBILL_WRITE_METRICS_PAGE";
const TEST: &str = "metrics_page::the_page_of_metrics_is_written_from_the_code";

pub async fn run() -> Result<ExitCode> {
    let arguments = ["--test", "end_to_end", "--", TEST].map(str::to_owned);
    run_with(&arguments, &[(WRITE, "true".to_owned())], None).await
}
