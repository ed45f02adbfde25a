//! The way into the log: I1 to I4.

use std::collections::{BTreeMap, BTreeSet};

use uuid::Uuid;

use super::history::{Asked, Fact, History, Inserted, Known, Operation, Outcome};
use super::violation::Found;
use crate::record::Record;
use crate::services::{EMAIL_EVENTS, USER_EVENTS, USER_STATE};

pub fn check(history: &History, found: &mut Found) {
    let told: BTreeMap<(Uuid, i64), Known> =
        history.states.iter().filter_map(Known::of).map(|(user, known)| ((user, known.version), known)).collect();
    for operation in &history.operations {
        answered(history, operation, found);
        done_as_asked(history, operation, &told, found);
    }
    not_more_than_asked(history, found);
    let user = &history.inserted;
    published(history, USER_EVENTS, &history.facts, user, false, found);
    published(history, USER_STATE, &history.states, user, history.compacted, found);
    if let Some(email) = &history.email {
        published(history, EMAIL_EVENTS, &email.facts, &email.inserted, false, found);
    }
    newest_is_last(&history.states, found);
    state_is_the_table(history, found);
    commands_are_facts(history, found);
}

/// I1: what a client was told is so. I2: what it was refused is not.
fn answered(history: &History, operation: &Operation, found: &mut Found) {
    let row = operation.user.and_then(|user| history.users.get(&user));
    match (&operation.asked, operation.outcome) {
        (Asked::Read, _) | (_, Outcome::Unknown) => {}
        (_, Outcome::Done(version)) => {
            let there = row.is_some_and(|row| row.version >= version);
            found.expect(there, "I1", || format!("answered with success, but the row is {row:?}: {operation:?}"));
            let erased = operation.asked != Asked::Erase || row.is_some_and(|row| row.person.is_none());
            found.expect(erased, "I1", || format!("erased, but there: {operation:?}"));
        }
        (Asked::Register { email }, Outcome::Refused(_)) => {
            let mut people = history.users.values().filter_map(|row| row.person.as_ref());
            let absent = people.all(|person| person.email != *email);
            // The same request, sent again while nobody knew what became of it, may be refused because the first holds the key.
            let only =
                |other: &Operation| other.asked != operation.asked || matches!(other.outcome, Outcome::Refused(_));
            let absent = absent || !history.operations.iter().all(only);
            found.expect(absent, "I2", || format!("refused, but there: {operation:?}"));
        }
        (_, Outcome::Refused(_)) => {}
    }
}

/// I1: the version that a client was answered is the one that it has asked for.
fn done_as_asked(history: &History, operation: &Operation, told: &BTreeMap<(Uuid, i64), Known>, found: &mut Found) {
    let (Some(user), Outcome::Done(version)) = (operation.user, operation.outcome) else { return };
    let person = match told.get(&(user, version)) {
        Some(known) => known.person.as_ref(),
        None if history.compacted || [Asked::Read, Asked::Erase].contains(&operation.asked) => return,
        None => return found.add("I1", format!("in no state: {operation:?}")),
    };
    let as_asked = match &operation.asked {
        Asked::Register { email } | Asked::Move { email } => person.is_some_and(|person| person.email == *email),
        Asked::Rename { display_name } => person.is_some_and(|person| person.display_name == *display_name),
        Asked::Erase | Asked::Read => true,
    };
    found.expect(as_asked, "I1", || format!("done otherwise than asked, as {person:?}: {operation:?}"));
}

/// I2: a user has no more versions than requests that may have taken effect.
fn not_more_than_asked(history: &History, found: &mut Found) {
    let mut asked: BTreeMap<Uuid, i64> = BTreeMap::new();
    for operation in &history.operations {
        let effect = operation.asked != Asked::Read && !matches!(operation.outcome, Outcome::Refused(_));
        if let Some(user) = operation.user {
            *asked.entry(user).or_default() += i64::from(effect);
        }
    }
    for (user, most) in asked {
        let version = history.users.get(&user).map_or(0, |row| row.version);
        found.expect(version <= most, "I2", || format!("{user} has version {version} after {most} requests"));
    }
}

/// I2, I3 and I4 of one topic.
fn published(
    history: &History,
    topic: &'static str,
    records: &[Record],
    inserted: &[Inserted],
    compacted: bool,
    found: &mut Found,
) {
    let logged: BTreeSet<Uuid> = records.iter().filter_map(id).collect();
    let inserted: BTreeSet<Uuid> = inserted.iter().filter(|row| row.topic == topic).map(|row| row.event_id).collect();
    for id in logged.difference(&inserted).filter(|id| !history.by_hand.contains(id)) {
        found.add("I2", format!("in {topic} without a commit: {id}"));
    }
    for id in inserted.difference(&logged).filter(|_| !compacted) {
        found.add("I3", format!("committed, but not in {topic}: {id}"));
    }
    for (key, records) in by_key(records) {
        ordered(topic, &key, &records, compacted, found);
    }
}

/// I4: the first occurrences of a key's events are the versions 1, 2, 3, … in one partition, and every later copy is exact. A
/// state may be published anew, as a new event of the version that is current.
fn ordered(topic: &str, key: &str, records: &[&Record], compacted: bool, found: &mut Found) {
    let mut first: BTreeMap<Uuid, &Record> = BTreeMap::new();
    let mut last = 0;
    for record in records {
        let Some(event) = id(record) else { continue };
        if let Some(original) = first.get(&event) {
            let copy = Record { offset: original.offset, ..(*record).clone() };
            found.expect(copy == **original, "I4", || format!("in {topic} a copy differs: {original:?}, {record:?}"));
            continue;
        }
        first.insert(event, record);
        let version = record.version();
        let anew = topic == USER_STATE && version == last;
        let follows = anew || version == last + 1 || (compacted && version > last);
        found.expect(follows, "I4", || format!("in {topic} version {version} of {key} follows {last}"));
        last = version;
    }
    let partitions: BTreeSet<i32> = records.iter().map(|record| record.partition).collect();
    found.expect(partitions.len() == 1, "I4", || format!("in {topic} {key} is in the partitions {partitions:?}"));
}

/// I4: whoever reads the last record of a key, as compaction does, has its newest state.
fn newest_is_last(states: &[Record], found: &mut Found) {
    for (key, records) in by_key(states) {
        let highest = records.iter().map(|record| record.version()).max();
        let last = records.last().map(|record| record.version());
        found.expect(last == highest, "I4", || format!("the last state of {key} is {last:?}, the highest {highest:?}"));
    }
}

/// I3: the log's newest state of each user is that of the table.
fn state_is_the_table(history: &History, found: &mut Found) {
    let newest = Known::newest(&history.states);
    for (user, row) in &history.users {
        let state = newest.get(user);
        let forgotten = history.compacted && row.person.is_none() && state.is_none();
        found.expect(forgotten || state == Some(row), "I3", || format!("{user} is {row:?}, and in the log {state:?}"));
    }
}

/// I1: every command has its fact, and a registration that was accepted has exactly one.
fn commands_are_facts(history: &History, found: &mut Found) {
    let mut facts: BTreeMap<Uuid, (i64, i64)> = BTreeMap::new();
    for fact in Fact::distinct(&history.facts) {
        let (all, registered) = facts.entry(fact.user).or_default();
        *all += 1;
        *registered += i64::from(fact.kind == "user.registered");
    }
    for (user, row) in &history.users {
        let (all, registered) = facts.get(user).copied().unwrap_or_default();
        found.expect(registered == 1, "I1", || format!("{user} was registered by {registered} facts"));
        found.expect(all == row.version, "I1", || format!("{user} has version {} and {all} facts", row.version));
    }
}

fn id(record: &Record) -> Option<Uuid> {
    record.header("ce_id")?.parse().ok()
}

/// In the order of the log, which per key is that of its one partition.
fn by_key(records: &[Record]) -> BTreeMap<String, Vec<&Record>> {
    let mut keys: BTreeMap<String, Vec<&Record>> = BTreeMap::new();
    for record in records {
        keys.entry(record.key_text()).or_default().push(record);
    }
    keys
}
