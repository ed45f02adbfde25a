//! Counters, dead letters and discarded records: I11 and I13.

use std::collections::BTreeMap;

use super::history::{Discard, History};
use super::violation::Found;
use crate::record::Record;
use crate::services::{USER_EVENTS, USER_STATE, topic_of};

pub fn check(history: &History, found: &mut Found) {
    for (group, counted) in &history.counted {
        let records = records(history, group).len() as u64;
        found.expect(*counted >= records, "I11", || format!("{group} counted {counted} of {records} records"));
    }
    for discard in &history.discards {
        check_discard(history, discard, found);
    }
    for (group, letters) in &history.letters {
        for letter in letters {
            check_letter(history, group, letter, found);
        }
    }
}

/// I11: what an operator discarded was a dead letter of that group before. What was discarded is
/// not open any more.
fn check_discard(history: &History, Discard { group, letter, is_done }: &Discard, found: &mut Found) {
    let has = |letters: &BTreeMap<&'static str, Vec<Record>>| {
        letters.get(group.as_str()).into_iter().flatten().any(|written| written.key_text() == *letter)
    };
    found.expect(has(&history.letters), "I11", || format!("{group} discarded {letter}, which was no dead letter"));
    found.expect(!is_done || !has(&history.open), "I11", || format!("{group} discarded {letter}, and it is open"));
}

/// I13: the key of a dead letter names an existing record. The letter of a fact has the same value.
/// The letter of a state has no value, since it could not be erased there.
fn check_letter(history: &History, group: &str, letter: &Record, found: &mut Found) {
    let key = letter.key_text();
    let mut fields = key.rsplitn(3, '-');
    let offset = fields.next().and_then(|offset| offset.parse().ok());
    let partition = fields.next().and_then(|partition| partition.parse().ok());
    let is_topic_of_group = fields.next().is_some_and(|topic| topic.ends_with(topic_of(group)));
    let at = |record: &&Record| Some(record.partition) == partition && Some(record.offset) == offset;
    let original = records(history, group).iter().find(at);
    if topic_of(group) == USER_STATE {
        let names_record = is_topic_of_group && (original.is_some() || history.compacted);
        found.expect(names_record, "I13", || format!("a dead letter of {group} names no record: {key}"));
        let has_data = letter.value.as_ref().is_some_and(|value| !value.is_empty());
        found.expect(!has_data, "I13", || format!("the dead letter of a state has a value: {key}"));
    } else {
        let names_record = is_topic_of_group && original.is_some();
        found.expect(names_record, "I13", || format!("a dead letter of {group} names no record: {key}"));
        // The letter of a record without a value has an empty one.
        let bytes = |record: &Record| record.value.clone().unwrap_or_default();
        let same = original.is_none_or(|original| bytes(original) == bytes(letter));
        found.expect(same, "I13", || format!("a dead letter has other bytes than its record: {key}"));
    }
    found.expect(letter.value.is_some(), "I11", || format!("compaction deletes the open dead letter {key}: no value"));
    let headers: Vec<&str> = letter.headers.iter().filter_map(|(name, _)| letter.header(name)).collect();
    found.expect(headers.iter().all(|header| !header.contains('@')), "I13", || {
        format!("personal data in the headers of the dead letter {key}")
    });
}

/// The records of the topic that a group reads.
fn records<'a>(history: &'a History, group: &str) -> &'a [Record] {
    match topic_of(group) {
        USER_EVENTS => &history.facts,
        USER_STATE => &history.states,
        _ => history.email.as_ref().map_or(&[], |email| &email.facts),
    }
}
