//! Checks that nothing was lost, doubled or written out of order.

use std::collections::{BTreeMap, HashMap, HashSet};

use anyhow::{Context, Result, ensure};
use rdkafka::Message;
use uuid::Uuid;

use crate::bed::Bed;
use crate::kafka;

/// Reads a topic from these offsets on. Fails unless it has this number of events, each once, and
/// those of a key in the order of their versions.
pub fn require_events(bed: &Bed, topic: &str, starts: &BTreeMap<i32, i64>, expected: u64) -> Result<()> {
    let mut ids: HashSet<Uuid> = HashSet::new();
    let mut versions: HashMap<Uuid, i64> = HashMap::new();
    let mut copies = 0_u64;
    kafka::read(bed, topic, starts, |message| {
        let key = Uuid::try_parse_ascii(message.key().context("a record has no key")?)?;
        let id: Uuid = kafka::header(message, "ce_id").context("a record has no id")?.parse()?;
        let version: i64 = kafka::header(message, "ce_sequence").context("a record has no version")?.parse()?;
        if !ids.insert(id) {
            copies += 1;
        } else if let Some(last) = versions.insert(key, version) {
            ensure!(last < version, "{topic}: version {version} of {key} comes after version {last}");
        }
        Ok(())
    })?;
    ensure!(copies == 0, "{topic}: {copies} records are copies of earlier ones, although no process crashed");
    require_equal(&format!("events in {topic}"), ids.len() as u64, expected)
}

pub fn require_equal(what: &str, found: u64, expected: u64) -> Result<()> {
    ensure!(found == expected, "{found} {what}, expected {expected}");
    Ok(())
}
