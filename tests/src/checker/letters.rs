//! What was set aside: I11 and I13.

use super::history::History;
use super::violation::Found;
use crate::record::Record;
use crate::services::{USER_EVENTS, USER_STATE, topic_of};

pub fn check(history: &History, found: &mut Found) {
    for (group, counted) in &history.counted {
        let records = records(history, group).len() as u64;
        found.expect(*counted >= records, "I11", || format!("{group} counted {counted} of {records} records"));
    }
    for (group, letters) in &history.letters {
        for letter in letters {
            points_to_its_source(history, group, letter, found);
        }
    }
}

/// I13: a letter names a record that exists, in its key. Of a fact it has the bytes; of a state none, for they could not be
/// erased there.
fn points_to_its_source(history: &History, group: &str, letter: &Record, found: &mut Found) {
    let key = letter.key_text();
    let mut parts = key.rsplitn(3, '-');
    let offset = parts.next().and_then(|offset| offset.parse().ok());
    let partition = parts.next().and_then(|partition| partition.parse().ok());
    let topic = parts.next().is_some_and(|topic| topic.ends_with(topic_of(group)));
    let at = |record: &&Record| Some(record.partition) == partition && Some(record.offset) == offset;
    let source = records(history, group).iter().find(at);
    if topic_of(group) == USER_STATE {
        let there = source.is_some() || history.compacted;
        found.expect(topic && there, "I13", || format!("a letter of {group} points nowhere: {key}"));
        found.expect(letter.value.is_none(), "I13", || format!("a letter about a state has its value: {key}"));
    } else {
        found.expect(topic && source.is_some(), "I13", || format!("a letter of {group} points nowhere: {key}"));
        let same = source.is_none_or(|source| source.value == letter.value);
        found.expect(same, "I13", || format!("a letter has other bytes than its source: {key}"));
    }
    let headers: Vec<&str> = letter.headers.iter().filter_map(|(name, _)| letter.header(name)).collect();
    found.expect(headers.iter().all(|header| !header.contains('@')), "I13", || {
        format!("personal data in the headers of {key}")
    });
}

/// The log that a group reads.
fn records<'a>(history: &'a History, group: &str) -> &'a [Record] {
    match topic_of(group) {
        USER_EVENTS => &history.facts,
        USER_STATE => &history.states,
        _ => history.email.as_ref().map_or(&[], |email| &email.facts),
    }
}
