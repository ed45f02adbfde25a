//! `cargo xtask screenshots`: writes the pictures of the console in `docs/console`. A test that opens
//! the pages in Chromium takes them.

use std::process::ExitCode;

use anyhow::Result;

use super::test::run_with;

/// Makes the test write the pictures.
const WRITE: &str = "WAYBILL_WRITE_SCREENSHOTS";
const TEST: &str = "console_browser::the_pages_are_pictured";

pub async fn run() -> Result<ExitCode> {
    let arguments = ["--test", "end_to_end", "--", TEST].map(str::to_owned);
    run_with(&arguments, &[(WRITE, "true".to_owned())], None).await
}
