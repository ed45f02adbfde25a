//! The welcome mail.

mod encryption;
mod held;
mod leases;
mod refusals;
mod sending;
mod stopping;

use std::collections::BTreeSet;
use std::time::Duration;

use serde_json::{Value, json};
use tests::record::Draft;
use tests::services::{EMAIL_EVENTS, USER_EVENTS, USER_STATE};
use tests::{System, eventually_eq};
use uuid::Uuid;

/// Type and data of the events in `email.events.v1` about a user's mails. A process that is killed
/// may leave a copy of an event with the same id; copies are left out.
fn email_events(system: &System, user: Uuid) -> Vec<(String, Value)> {
    let mut seen = BTreeSet::new();
    let events = system.kafka.read(EMAIL_EVENTS).into_iter();
    let events = events.filter(|event| seen.insert(event.header("ce_id").unwrap().to_owned()));
    let events = events.map(|event| {
        let data: Value = serde_json::from_slice(event.value.as_deref().unwrap()).unwrap();
        (event.header("ce_type").unwrap().to_owned(), data)
    });
    events.filter(|(_, data)| data["user_id"] == user.to_string()).collect()
}

/// Waits until events of exactly these types are published about the user's mails.
async fn until_email_events(system: &System, user: Uuid, kinds: &[&str]) {
    let kinds: Vec<String> = kinds.iter().map(|kind| (*kind).to_owned()).collect();
    let published = async || email_events(system, user).into_iter().map(|(kind, _)| kind).collect();
    eventually_eq("types of the events about the mail", kinds, published).await;
}

/// Waits until a mail to a new user is sent. A mail that was due before and is not sent by then
/// will not be sent.
async fn until_another_mail_is_sent(system: &System) {
    let id = system.users.register().await;
    system.users.until_mailed(id).await;
}

/// Writes a fact about `user` that happened this long ago.
pub async fn write_fact(system: &System, kind: &str, user: Uuid, version: i64, age: Duration) {
    let fact = Draft::user_event(kind, user, version).happened_before(age);
    system.kafka.write(USER_EVENTS, &fact).await;
}

/// Writes a state of `user`.
pub async fn write_state(system: &System, user: Uuid, version: i64, email: &str) {
    let value = json!({ "email": email, "display_name": "Ada Lovelace" }).to_string();
    let state = Draft::envelope("user.state", user, version).with_value(value.as_bytes());
    system.kafka.write(USER_STATE, &state).await;
}
