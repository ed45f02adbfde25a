//! The SQL statements of the services, as `services/*/.sqlx` has them. So a limit executes the very
//! statements that it is compared with.

use std::fs;

use anyhow::{Context, Result, ensure};
use serde_json::Value;
use testbed::paths::root;
use topology::Service;

/// The only statement of a service that contains this text.
pub fn of(service: Service, text: &str) -> Result<String> {
    let folder = root().join("services").join(service.name).join(".sqlx");
    let mut found = vec![];
    for entry in fs::read_dir(&folder).with_context(|| format!("cannot read {}", folder.display()))? {
        let described: Value = serde_json::from_slice(&fs::read(entry?.path())?)?;
        let statement = described["query"].as_str().context("a description has no statement")?;
        if statement.contains(text) {
            found.push(statement.to_owned());
        }
    }
    ensure!(found.len() == 1, "{} statements of {} contain {text:?}, not one", found.len(), service.name);
    Ok(found.remove(0))
}
