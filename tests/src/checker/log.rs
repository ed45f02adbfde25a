//! From the request to the topics: I1 to I4.

use std::collections::{BTreeMap, BTreeSet};

use uuid::Uuid;

use super::history::{Asked, Fact, History, Inserted, Known, Operation, Outcome};
use super::violation::Found;
use crate::record::Record;
use crate::services::{EMAIL_EVENTS, USER_EVENTS, USER_STATE};

pub fn check(history: &History, found: &mut Found) {
    let states: BTreeMap<(Uuid, i64), Known> =
        history.states.iter().filter_map(Known::of).map(|(user, known)| ((user, known.version), known)).collect();
    for operation in &history.operations {
        answered(history, operation, found);
        done_as_asked(history, operation, &states, found);
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

/// I1: an effect that was confirmed to a client exists. I2: an effect that was refused does not
/// exist.
fn answered(history: &History, operation: &Operation, found: &mut Found) {
    let row = operation.user.and_then(|user| history.users.get(&user));
    match (&operation.asked, operation.outcome) {
        (Asked::Read, _) | (_, Outcome::Unknown) => {}
        (_, Outcome::Done(version)) => {
            let there = row.is_some_and(|row| row.version >= version);
            found.expect(there, "I1", || format!("answered with success, but the row is {row:?}: {operation:?}"));
            let erased = operation.asked != Asked::Erase || row.is_some_and(|row| row.person.is_none());
            found.expect(erased, "I1", || format!("answered as erased, but the row still has a person: {operation:?}"));
        }
        (Asked::Register { email }, Outcome::Refused(_)) => {
            let mut people = history.users.values().filter_map(|row| row.person.as_ref());
            let absent = people.all(|person| person.email != *email);
            // A request that is sent again after an unknown outcome is refused while the first one
            // holds the idempotency key.
            let only =
                |other: &Operation| other.asked != operation.asked || matches!(other.outcome, Outcome::Refused(_));
            let absent = absent || !history.operations.iter().all(only);
            found.expect(absent, "I2", || format!("refused, but the user exists: {operation:?}"));
        }
        (_, Outcome::Refused(_)) => {}
    }
}

/// I1: the version in the answer contains the change that the client asked for.
fn done_as_asked(history: &History, operation: &Operation, states: &BTreeMap<(Uuid, i64), Known>, found: &mut Found) {
    let (Some(user), Outcome::Done(version)) = (operation.user, operation.outcome) else { return };
    let person = match states.get(&(user, version)) {
        Some(known) => known.person.as_ref(),
        None if history.compacted || [Asked::Read, Asked::Erase].contains(&operation.asked) => return,
        None => return found.add("I1", format!("answered with success, but no state has this version: {operation:?}")),
    };
    let as_asked = match &operation.asked {
        Asked::Register { email } | Asked::ChangeEmail { email } => person.is_some_and(|person| person.email == *email),
        Asked::Rename { display_name } => person.is_some_and(|person| person.display_name == *display_name),
        Asked::Erase | Asked::Read => true,
    };
    found.expect(as_asked, "I1", || format!("the state is not the one asked for but {person:?}: {operation:?}"));
}

/// I2: a user has at most as many versions as requests that may have taken effect.
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

/// I2, I3 and I4 for one topic.
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
    for id in logged.difference(&inserted).filter(|id| !history.written_by_test.contains(id)) {
        found.add("I2", format!("in {topic}, but never committed to an outbox: {id}"));
    }
    for id in inserted.difference(&logged).filter(|_| !compacted) {
        found.add("I3", format!("committed to the outbox, but not in {topic}: {id}"));
    }
    for (key, records) in by_key(records) {
        ordered(topic, &key, &records, compacted, found);
    }
}

/// I4: the first copies of a key's events have the versions 1, 2, 3, … in one partition, and later
/// copies are identical. A state may be republished: as a new event with the current version.
fn ordered(topic: &str, key: &str, records: &[&Record], compacted: bool, found: &mut Found) {
    let mut first: BTreeMap<Uuid, &Record> = BTreeMap::new();
    let mut last = 0;
    for record in records {
        let Some(event) = id(record) else { continue };
        if let Some(original) = first.get(&event) {
            let copy = Record { offset: original.offset, ..(*record).clone() };
            found.expect(copy == **original, "I4", || {
                format!("in {topic} a copy differs from its original: {original:?}, {record:?}")
            });
            continue;
        }
        first.insert(event, record);
        let version = record.version();
        let republished = topic == USER_STATE && version == last;
        let follows = republished || version == last + 1 || (compacted && version > last);
        found.expect(follows, "I4", || format!("in {topic} version {version} of {key} follows {last}"));
        last = version;
    }
    let partitions: BTreeSet<i32> = records.iter().map(|record| record.partition).collect();
    found.expect(partitions.len() == 1, "I4", || format!("in {topic} {key} is in the partitions {partitions:?}"));
}

/// I4: the last record of a key is its newest state, since compaction keeps the last one.
fn newest_is_last(states: &[Record], found: &mut Found) {
    for (key, records) in by_key(states) {
        let highest = records.iter().map(|record| record.version()).max();
        let last = records.last().map(|record| record.version());
        found.expect(last == highest, "I4", || format!("the last state of {key} is {last:?}, the highest {highest:?}"));
    }
}

/// I3: the newest state of each user in the topic is the row of the table.
fn state_is_the_table(history: &History, found: &mut Found) {
    let newest = Known::newest(&history.states);
    for (user, row) in &history.users {
        let state = newest.get(user);
        let compacted_away = history.compacted && row.person.is_none() && state.is_none();
        found.expect(compacted_away || state == Some(row), "I3", || {
            format!("{user} is {row:?} in the table and {state:?} in the topic")
        });
    }
}

/// I1: every version has one fact, and every user exactly one registration.
fn commands_are_facts(history: &History, found: &mut Found) {
    let mut facts: BTreeMap<Uuid, (i64, i64)> = BTreeMap::new();
    for fact in Fact::distinct(&history.facts) {
        let (all, registered) = facts.entry(fact.user).or_default();
        *all += 1;
        *registered += i64::from(fact.kind == "user.registered");
    }
    for (user, row) in &history.users {
        let (all, registered) = facts.get(user).copied().unwrap_or_default();
        found.expect(registered == 1, "I1", || format!("{user} has {registered} facts of a registration"));
        found.expect(all == row.version, "I1", || format!("{user} has version {} and {all} facts", row.version));
    }
}

fn id(record: &Record) -> Option<Uuid> {
    record.header("ce_id")?.parse().ok()
}

/// The records of each key, in the order of their offsets.
fn by_key(records: &[Record]) -> BTreeMap<String, Vec<&Record>> {
    let mut keys: BTreeMap<String, Vec<&Record>> = BTreeMap::new();
    for record in records {
        keys.entry(record.key_text()).or_default().push(record);
    }
    keys
}
