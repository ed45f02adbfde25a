//! The effects of the consumers: I7 to I10.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Debug;

use uuid::Uuid;

use super::history::{Analytics, Audited, Fact, History, Outcome, Recipient, Request, StoredUser};
use super::violation::Found;
use crate::services::{ANALYTICS_AUDIT, ANALYTICS_EMAILS, ANALYTICS_USERS, EMAIL_EVENTS, USER_EVENTS};

pub fn check(history: &History, found: &mut Found) {
    if let Some(analytics) = &history.analytics {
        let users = history.facts_for(ANALYTICS_USERS, &history.facts);
        let mailed = history.email.as_ref().map_or(&[][..], |email| &email.facts);
        let emails = history.facts_for(ANALYTICS_EMAILS, mailed);
        check_inbox(analytics, USER_EVENTS, &users, found);
        check_inbox(analytics, EMAIL_EVENTS, &emails, found);
        check_read_models(analytics, &users, &emails, found);
        check_audit(analytics, &history.facts_for(ANALYTICS_AUDIT, &history.facts), found);
    }
    let newest = StoredUser::newest(&history.states);
    if let Some(email) = &history.email {
        let newest = newest.iter().map(|(user, state)| (*user, Recipient::from(state))).collect();
        let erased = |recipient: &Recipient| recipient.email.is_none();
        check_store("I10", "the recipient", &newest, &email.recipients, erased, found);
    }
    if let Some(cache) = &history.cache {
        let erased = |user: &StoredUser| user.person.is_none();
        check_store("I8", "the cached profile", &newest, cache, erased, found);
        check_reads(history, found);
    }
}

/// I9: since all offsets are committed, an event without effect must be an open dead letter. I7:
/// every event with an effect is in the topic.
fn check_inbox(analytics: &Analytics, topic: &str, facts: &[Fact], found: &mut Found) {
    let logged: BTreeSet<Uuid> = facts.iter().map(|fact| fact.id).collect();
    let none = BTreeSet::new();
    let inbox = analytics.inbox.get(topic).unwrap_or(&none);
    for id in logged.difference(inbox) {
        found.add("I9", format!("an event of {topic} was committed without effect: {id}"));
    }
    for id in inbox.difference(&logged) {
        found.add("I7", format!("an event in the inbox is not in {topic}: {id}"));
    }
}

/// I7, I9: the audit has one row for each fact, and no other.
fn check_audit(analytics: &Analytics, facts: &[Fact], found: &mut Found) {
    let mut rows: BTreeMap<Uuid, Vec<&Audited>> = BTreeMap::new();
    for row in &analytics.audit {
        rows.entry(row.event).or_default().push(row);
    }
    for fact in facts {
        let expected = Audited::from(fact);
        match rows.remove(&fact.id).as_deref() {
            Some([row]) if **row == expected => {}
            Some(rows) => found.add("I7", format!("the audit has the rows {rows:?}, and the topic {expected:?}")),
            None => found.add("I9", format!("a fact was committed without a row in the audit: {expected:?}")),
        }
    }
    for row in rows.values() {
        found.add("I7", format!("rows of the audit are not in the topic: {row:?}"));
    }
}

/// I7: the read models are the fold of the topics, with each fact once.
fn check_read_models(analytics: &Analytics, users: &[Fact], emails: &[Fact], found: &mut Found) {
    let (hours, funnel) = Analytics::fold(users, emails);
    let model = &analytics.registrations;
    found.expect(*model == hours, "I7", || {
        format!("registrations by hour are {model:?} in the table and {hours:?} in the topic")
    });
    let totals = Analytics::totals(&funnel);
    found.expect(analytics.totals == totals, "I7", || {
        format!("registered and mailed users are {:?} in the totals and {totals:?} in the topics", analytics.totals)
    });
    let users: BTreeSet<&Uuid> = funnel.keys().chain(analytics.funnel.keys()).collect();
    for user in users {
        let model = analytics.funnel.get(user);
        let topic = funnel.get(user);
        found.expect(model == topic, "I7", || format!("{user} is {model:?} in the funnel and {topic:?} in the topics"));
    }
}

/// The store has the state with the highest version of each user. A compacted topic may lack erased
/// users.
fn check_store<S: PartialEq + Debug>(
    invariant: &'static str,
    what: &str,
    newest: &BTreeMap<Uuid, S>,
    store: &BTreeMap<Uuid, S>,
    is_erased: impl Fn(&S) -> bool,
    found: &mut Found,
) {
    for (user, state) in newest {
        let stored = store.get(user);
        found.expect(stored == Some(state), invariant, || {
            format!("{what} of {user} is {stored:?}, in the topic {state:?}")
        });
    }
    for (user, stored) in store.iter().filter(|(user, stored)| !newest.contains_key(user) && !is_erased(stored)) {
        found.add(invariant, format!("{what} of {user} is {stored:?}, but the topic has no state"));
    }
}

/// I8: a reader never sees an older version than before, and a user who is no longer found was
/// erased.
fn check_reads(history: &History, found: &mut Found) {
    let mut seen: BTreeMap<Uuid, i64> = BTreeMap::new();
    let mut erased = BTreeSet::new();
    for operation in &history.operations {
        let Some(user) = operation.user else { continue };
        match (&operation.request, operation.outcome) {
            (Request::Erase, Outcome::Done(_) | Outcome::Unknown) => drop(erased.insert(user)),
            (Request::Read, Outcome::Done(version)) => {
                let before = seen.insert(user, version).unwrap_or(0);
                found.expect(version >= before, "I8", || {
                    format!("{user} was read with version {before}, then with {version}")
                });
            }
            (Request::Read, Outcome::Refused(404)) if seen.contains_key(&user) => {
                found.expect(erased.contains(&user), "I8", || {
                    format!("{user} was read, then not found, and was not erased")
                });
            }
            _ => {}
        }
    }
}
