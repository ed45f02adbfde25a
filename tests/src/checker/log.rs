//! From the request to the topics: I1 to I4.

use std::collections::{BTreeMap, BTreeSet};

use uuid::Uuid;

use super::history::{Fact, History, Inserted, Operation, Outcome, Request, StoredUser};
use super::violation::Found;
use crate::record::Record;
use crate::services::{EMAIL_EVENTS, USER_EVENTS, USER_STATE};

pub fn check(history: &History, found: &mut Found) {
    let states: BTreeMap<(Uuid, i64), StoredUser> =
        history.states.iter().filter_map(StoredUser::of).map(|(user, known)| ((user, known.version), known)).collect();
    for operation in &history.operations {
        check_answer(history, operation, found);
        check_requested_change(history, operation, &states, found);
    }
    check_versions(history, found);
    let facts = Log { topic: USER_EVENTS, records: &history.facts, inserted: &history.inserted, compacted: false };
    check_log(history, &facts, found);
    let compacted = history.compacted;
    let states = Log { topic: USER_STATE, records: &history.states, inserted: &history.inserted, compacted };
    check_log(history, &states, found);
    if let Some(email) = &history.email {
        let facts = Log { topic: EMAIL_EVENTS, records: &email.facts, inserted: &email.inserted, compacted: false };
        check_log(history, &facts, found);
    }
    check_last_states(&history.states, found);
    check_newest_states(history, found);
    check_facts(history, found);
}

/// The records of a topic, and the rows of the outbox from which they are published.
struct Log<'a> {
    topic: &'static str,
    records: &'a [Record],
    /// Contains rows for other topics too.
    inserted: &'a [Inserted],
    /// Whether superseded records are missing.
    compacted: bool,
}

/// I1: an effect that was confirmed to a client exists. I2: an effect that was refused does not
/// exist.
fn check_answer(history: &History, operation: &Operation, found: &mut Found) {
    let row = operation.user.and_then(|user| history.users.get(&user));
    match (&operation.request, operation.outcome) {
        (Request::Read, _) | (_, Outcome::Unknown) => {}
        (_, Outcome::Done(version)) => {
            let exists = row.is_some_and(|row| row.version >= version);
            found.expect(exists, "I1", || format!("answered with success, but the row is {row:?}: {operation:?}"));
            let erased = operation.request != Request::Erase || row.is_some_and(|row| row.person.is_none());
            found.expect(erased, "I1", || format!("answered as erased, but the row still has a person: {operation:?}"));
        }
        (Request::Register { email }, Outcome::Refused(_)) => {
            let mut people = history.users.values().filter_map(|row| row.person.as_ref());
            let absent = people.all(|person| person.email != *email);
            // If the same request had another outcome before, it may have taken effect. A request
            // that is sent again is refused while the first one holds the idempotency key.
            let may_have_registered =
                |other: &Operation| other.request == operation.request && !matches!(other.outcome, Outcome::Refused(_));
            let allowed = absent || history.operations.iter().any(may_have_registered);
            found.expect(allowed, "I2", || format!("refused, but the user exists: {operation:?}"));
        }
        (_, Outcome::Refused(_)) => {}
    }
}

/// I1: the version in the answer contains the requested change.
fn check_requested_change(
    history: &History,
    operation: &Operation,
    states: &BTreeMap<(Uuid, i64), StoredUser>,
    found: &mut Found,
) {
    let (Some(user), Outcome::Done(version)) = (operation.user, operation.outcome) else { return };
    let person = match states.get(&(user, version)) {
        Some(known) => known.person.as_ref(),
        None if history.compacted || [Request::Read, Request::Erase].contains(&operation.request) => return,
        None => return found.add("I1", format!("answered with success, but no state has this version: {operation:?}")),
    };
    let as_requested = match &operation.request {
        Request::Register { email } | Request::ChangeEmail { email } => {
            person.is_some_and(|person| person.email == *email)
        }
        Request::Rename { display_name } => person.is_some_and(|person| person.display_name == *display_name),
        Request::Erase | Request::Read => true,
    };
    found.expect(as_requested, "I1", || format!("the state is not the requested one but {person:?}: {operation:?}"));
}

/// I2: a user has at most as many versions as requests that may have taken effect.
fn check_versions(history: &History, found: &mut Found) {
    let mut requests: BTreeMap<Uuid, i64> = BTreeMap::new();
    for operation in &history.operations {
        let effect = operation.request != Request::Read && !matches!(operation.outcome, Outcome::Refused(_));
        if let Some(user) = operation.user {
            *requests.entry(user).or_default() += i64::from(effect);
        }
    }
    for (user, count) in requests {
        let version = history.users.get(&user).map_or(0, |row| row.version);
        found.expect(version <= count, "I2", || format!("{user} has version {version} after {count} requests"));
    }
}

/// I2, I3 and I4 for one topic.
fn check_log(history: &History, log: &Log<'_>, found: &mut Found) {
    let topic = log.topic;
    let logged: BTreeSet<Uuid> = log.records.iter().filter_map(id).collect();
    let rows = log.inserted.iter().filter(|row| row.topic == topic);
    let inserted: BTreeSet<Uuid> = rows.map(|row| row.event_id).collect();
    for id in logged.difference(&inserted).filter(|id| !history.written_by_test.contains(id)) {
        found.add("I2", format!("in {topic}, but never committed to an outbox: {id}"));
    }
    for id in inserted.difference(&logged).filter(|_| !log.compacted) {
        found.add("I3", format!("committed to the outbox, but not in {topic}: {id}"));
    }
    for (key, records) in by_key(log.records) {
        check_order(log, &key, &records, found);
    }
}

/// I4: the first copies of a key's events have the versions 1, 2, 3, … in one partition, and later
/// copies are identical. A state may be republished: as a new event with the current version.
fn check_order(log: &Log<'_>, key: &str, records: &[&Record], found: &mut Found) {
    let topic = log.topic;
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
        let follows = republished || version == last + 1 || (log.compacted && version > last);
        found.expect(follows, "I4", || format!("in {topic} version {version} of {key} follows {last}"));
        last = version;
    }
    let partitions: BTreeSet<i32> = records.iter().map(|record| record.partition).collect();
    found.expect(partitions.len() == 1, "I4", || format!("in {topic} {key} is in the partitions {partitions:?}"));
}

/// I4: the last record of a key is its newest state, since compaction keeps the last one.
fn check_last_states(states: &[Record], found: &mut Found) {
    for (key, records) in by_key(states) {
        let highest = records.iter().map(|record| record.version()).max();
        let last = records.last().map(|record| record.version());
        found.expect(last == highest, "I4", || format!("the last state of {key} is {last:?}, the highest {highest:?}"));
    }
}

/// I3: the newest state of each user in the topic is the row of the table.
fn check_newest_states(history: &History, found: &mut Found) {
    let newest = StoredUser::newest(&history.states);
    for (user, row) in &history.users {
        let state = newest.get(user);
        let compacted_away = history.compacted && row.person.is_none() && state.is_none();
        found.expect(compacted_away || state == Some(row), "I3", || {
            format!("{user} is {row:?} in the table and {state:?} in the topic")
        });
    }
}

/// I1: every version has one fact, and every user exactly one registration.
fn check_facts(history: &History, found: &mut Found) {
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
