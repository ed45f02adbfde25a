//! docs/performance.md.

use std::path::PathBuf;

use anyhow::Result;

use super::{Machine, Report};

pub fn write(_machine: &Machine, _reports: &[Report]) -> Result<PathBuf> {
    Ok(testbed::paths::root().join("docs/performance.md"))
}
