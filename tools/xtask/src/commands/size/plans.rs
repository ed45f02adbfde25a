//! The plans that Postgres has logged.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{BufRead, BufReader, Seek, SeekFrom};
use std::path::Path;

use anyhow::{Context, Result};
use serde_json::Value;
use topology::with_database;

/// What follows a plan's line in the log. The lines of the plan begin with a tab.
const PLAN: &str = " plan:";

#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Statement {
    pub database: String,
    /// In one line.
    pub text: String,
}

/// The executions of a statement.
#[derive(Clone, Copy, Debug, Default)]
pub struct Cost {
    pub runs: usize,
    /// The most rows that one execution read from tables and indexes.
    pub rows: f64,
    /// The most pages of 8 KiB that one execution read, from memory or from disk.
    pub buffers: f64,
}

/// The statements of the services' sessions, in the log after its first `from` bytes.
pub fn read(log: &Path, from: u64) -> Result<BTreeMap<Statement, Cost>> {
    let mut file = File::open(log)?;
    file.seek(SeekFrom::Start(from))?;
    let mut costs: BTreeMap<Statement, Cost> = BTreeMap::new();
    let mut database = None;
    let mut plan = String::new();
    for line in BufReader::new(file).split(b'\n') {
        let line = line?;
        let line = String::from_utf8_lossy(&line);
        if let Some(rest) = line.strip_prefix('\t') {
            plan += rest;
            plan.push('\n');
            continue;
        }
        if let Some(database) = database.take() {
            add(&mut costs, database, &plan)?;
        }
        plan.clear();
        database = line.ends_with(PLAN).then(|| database_of(&line)).flatten();
    }
    if let Some(database) = database.take() {
        add(&mut costs, database, &plan)?;
    }
    Ok(costs)
}

/// The database of a session of a running service. The prefix of a line is the role and the
/// database.
fn database_of(line: &str) -> Option<String> {
    let mut words = line.split(' ');
    let role = words.next()?;
    with_database().any(|service| service.database() == role).then(|| role.trim_start_matches("waybill_").to_owned())
}

fn add(costs: &mut BTreeMap<Statement, Cost>, database: String, plan: &str) -> Result<()> {
    let logged: Value = serde_json::from_str(plan).with_context(|| format!("Postgres has logged no plan: {plan}"))?;
    let text = logged["Query Text"].as_str().unwrap_or_default().split_whitespace().collect::<Vec<_>>().join(" ");
    let root = &logged["Plan"];
    let cost = costs.entry(Statement { database, text }).or_default();
    cost.runs += 1;
    cost.rows = cost.rows.max(rows(root));
    cost.buffers = cost.buffers.max(
        ["Shared Hit Blocks", "Shared Read Blocks", "Temp Read Blocks"].iter().map(|name| number(root, name)).sum(),
    );
    Ok(())
}

/// The rows that the scans of a plan have read, those included that a filter removed.
fn rows(node: &Value) -> f64 {
    let kind = node["Node Type"].as_str().unwrap_or_default();
    let scans = kind.ends_with("Scan") && (node["Relation Name"].is_string() || node["Index Name"].is_string());
    let mut rows = 0.0;
    // The rows of a bitmap are counted where they are fetched.
    if scans && kind != "Bitmap Index Scan" {
        let removed = number(node, "Rows Removed by Filter") + number(node, "Rows Removed by Index Recheck");
        rows = (number(node, "Actual Rows") + removed) * number(node, "Actual Loops");
    }
    let children = node["Plans"].as_array().into_iter().flatten();
    (rows + children.map(self::rows).sum::<f64>()).round()
}

fn number(node: &Value, name: &str) -> f64 {
    node[name].as_f64().unwrap_or(0.0)
}
