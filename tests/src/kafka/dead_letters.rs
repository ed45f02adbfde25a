//! The dead letters of a group, as a client of Kafka reads them.

use std::collections::BTreeMap;

use super::Kafka;
use crate::record::Record;
use crate::services::{dead_letters_of, topic_of};
use crate::waiting::eventually_eq;

impl Kafka {
    /// The open dead letters of a group, by key.
    pub fn dead_letters(&self, group: &str) -> BTreeMap<String, Record> {
        let mut open = BTreeMap::new();
        for letter in self.read(&dead_letters_of(group)) {
            if letter.headers.is_empty() {
                open.remove(&letter.key_text());
            } else {
                open.insert(letter.key_text(), letter);
            }
        }
        open
    }

    /// The key of the dead letter of the record at this partition and offset.
    pub fn letter_key(&self, group: &str, (partition, offset): (i32, i64)) -> String {
        format!("{}-{partition}-{offset}", self.prefixed(topic_of(group)))
    }

    /// Waits until exactly the records at these partitions and offsets have open dead letters in
    /// the group.
    pub async fn until_dead_letters(&self, group: &str, records: &[(i32, i64)]) {
        let mut expected: Vec<_> = records.iter().map(|record| self.letter_key(group, *record)).collect();
        expected.sort();
        let what = format!("the open dead letters of {group}");
        eventually_eq(&what, expected, async || self.dead_letters(group).into_keys().collect()).await;
    }
}
