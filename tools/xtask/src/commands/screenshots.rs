//! `cargo xtask screenshots`: writes the pictures of the console in `docs/console`. Tests that open
//! the pages in Chromium take them.

use std::process::ExitCode;

use anyhow::Result;

use super::test::run_with;

/// Makes the tests write the pictures.
const WRITE: &str = "WAYBILL_WRITE_SCREENSHOTS";
/// A part of the names of the tests.
const TESTS: &str = "pictured";

pub async fn run() -> Result<ExitCode> {
    let arguments = ["--test", "end_to_end", "--", TESTS].map(str::to_owned);
    run_with(&arguments, &[(WRITE, "true".to_owned())], None).await
}
