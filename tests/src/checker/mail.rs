//! Deliveries and mails: I5 and I6.

use std::collections::{BTreeMap, BTreeSet};

use uuid::Uuid;

use super::history::{Delivery, Email, History, StoredUser};
use super::violation::Found;
use crate::services::EMAIL_WELCOME;

/// The states in which a delivery may end.
const FINAL: [&str; 3] = ["sent", "failed", "cancelled"];

pub fn check(history: &History, email: &Email, found: &mut Found) {
    check_deliveries_per_user(history, email, found);
    for delivery in &email.deliveries {
        check_end(history, delivery, found);
    }
    check_mails(history, email, found);
    check_events(email, found);
}

/// I5: each registration in the topic has one delivery, and no other user has one.
fn check_deliveries_per_user(history: &History, email: &Email, found: &mut Found) {
    let facts = history.facts_for(EMAIL_WELCOME, &history.facts);
    let registered: BTreeSet<Uuid> =
        facts.iter().filter(|fact| fact.kind == "user.registered").map(|fact| fact.user).collect();
    let mut counts: BTreeMap<Uuid, usize> = BTreeMap::new();
    for delivery in &email.deliveries {
        *counts.entry(delivery.user).or_default() += 1;
    }
    for user in &registered {
        let count = counts.remove(user).unwrap_or(0);
        found.expect(count == 1, "I5", || format!("{user} was registered and has {count} deliveries"));
    }
    for (user, count) in counts {
        found.add("I5", format!("{user} was not registered and has {count} deliveries"));
    }
}

/// I5: every delivery has ended. Only that of an erased user may be cancelled.
fn check_end(history: &History, delivery: &Delivery, found: &mut Found) {
    let status = delivery.states.last().map_or("", String::as_str);
    found.expect(FINAL.contains(&status), "I5", || format!("not in a final state: {delivery:?}"));
    let exists = history.users.get(&delivery.user).is_some_and(|row| row.person.is_some());
    found.expect(!exists || status != "cancelled", "I5", || format!("cancelled though the user exists: {delivery:?}"));
}

/// I6: the server has every sent mail, and no mail without a delivery. All copies of a mail have
/// one Message-ID. There is more than one copy only if the answer was lost or the lease ended.
fn check_mails(history: &History, email: &Email, found: &mut Found) {
    let users: BTreeMap<Uuid, Uuid> = email.deliveries.iter().map(|delivery| (delivery.id, delivery.user)).collect();
    let addresses = addresses(history);
    let mut copies: BTreeMap<Uuid, usize> = BTreeMap::new();
    for mail in &email.mails {
        let id = mail.message_id.as_deref().and_then(|id| id.split('@').next()).and_then(|id| id.parse().ok());
        let Some(id) = id else {
            found.add("I6", format!("a mail without a delivery's Message-ID: {:?}", mail.message_id));
            continue;
        };
        *copies.entry(id).or_default() += 1;
        if let Some(user) = users.get(&id) {
            let known = addresses.get(user);
            let theirs = mail.to.len() == 1 && known.is_some_and(|known| known.contains(&mail.to[0]));
            found.expect(theirs || history.compacted, "I6", || format!("the mail of {user} went to {:?}", mail.to));
        }
    }
    for delivery in &email.deliveries {
        let count = copies.remove(&delivery.id).unwrap_or(0);
        let sent = delivery.states.last().is_some_and(|status| status == "sent");
        found.expect(!sent || count > 0, "I6", || format!("sent, but the server has no mail: {delivery:?}"));
        let most = if may_have_copies(delivery) { usize::MAX } else { 1 };
        found.expect(count <= most, "I6", || {
            format!("{count} copies, but neither a lost answer nor an ended lease: {delivery:?}")
        });
    }
    for (id, count) in copies {
        found.add("I6", format!("{count} mails with the Message-ID of no delivery: {id}"));
    }
}

/// Every address that each user ever had.
fn addresses(history: &History) -> BTreeMap<Uuid, BTreeSet<String>> {
    let mut addresses: BTreeMap<Uuid, BTreeSet<String>> = BTreeMap::new();
    for (user, known) in history.states.iter().filter_map(StoredUser::of) {
        addresses.entry(user).or_default().extend(known.person.map(|person| person.email));
    }
    addresses
}

/// Whether the answer to the mail was lost, or a lease ended and another sender took the delivery
/// over.
fn may_have_copies(delivery: &Delivery) -> bool {
    // The sender itself never changes `sending` to one of these states.
    let by_another = |next: &str| ["sending", "held", "cancelled"].contains(&next);
    let lease_ended = delivery.states.windows(2).any(|pair| pair[0] == "sending" && by_another(&pair[1]));
    lease_ended || delivery.states.iter().any(|status| status == "unknown")
}

/// I6: each ending of a delivery is published once, as the right event and with the next version. A
/// delivery has more than one ending if an operator released it after it had failed.
fn check_events(email: &Email, found: &mut Found) {
    let mut published: BTreeMap<String, Vec<String>> = BTreeMap::new();
    let mut seen = BTreeSet::new();
    for record in &email.facts {
        if seen.insert(record.header("ce_id")) {
            let kind = record.header("ce_type").unwrap_or_default();
            let version = record.header("ce_sequence").unwrap_or_default();
            published.entry(record.key_text()).or_default().push(format!("{kind} {version}"));
        }
    }
    for delivery in &email.deliveries {
        let endings = delivery.states.iter().filter(|status| ["sent", "failed"].contains(&status.as_str()));
        let expected: Vec<String> =
            endings.zip(1..).map(|(status, version)| format!("email.{status} {version}")).collect();
        let published = published.remove(&delivery.id.to_string()).unwrap_or_default();
        found.expect(published == expected, "I6", || format!("published as {published:?}: {delivery:?}"));
    }
}
