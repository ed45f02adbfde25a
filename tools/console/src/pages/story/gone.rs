//! Checks where the data of an erased user was deleted, as far as a client can see it: in the
//! public APIs, in the topics, and by the offsets of the group that deletes the address. The
//! console does not read the databases of the services.

use std::cmp::Reverse;
use std::sync::Arc;

use shared::messaging::Coordinates;
use topology::{CACHE, Service, USER};
use uuid::Uuid;

use super::assemble::Pill;
use crate::kafka::{Found, Seen};
use crate::pages::app::App;

/// The topic with the states, and the group that deletes the address of an erased user.
const STATES: &str = "user.state.v1";
const RECIPIENTS: &str = "email.recipients";
/// How many older states are looked for. Each needs a client of Kafka.
const OLDER_STATES: usize = 3;

/// The tombstone of the user, if the newest state is one.
pub fn tombstone(records: &[Arc<Seen>]) -> Option<&Arc<Seen>> {
    let states = records.iter().filter(|seen| seen.topic == STATES);
    states.max_by_key(|seen| seen.offset).filter(|seen| seen.is_tombstone)
}

/// What the services and their groups show about the erasure now.
pub async fn in_services(app: &App, user: Uuid, tombstone: &Seen) -> Vec<Pill> {
    let place = format!("{}@{}", tombstone.partition, tombstone.offset);
    let (row, profile, mails) = tokio::join!(
        absent(app, USER, format!("/users/{user}"), "the user"),
        absent(app, CACHE, format!("/profiles/{user}"), "the profile"),
        unsent(app, user),
    );
    let offsets = app.offsets.borrow().clone();
    let next = offsets.committed.get(RECIPIENTS).and_then(|next| next.get(&tombstone.partition));
    let address = match next {
        Some(next) if *next > tombstone.offset => Pill {
            state: "good",
            text: format!(
                "email: {RECIPIENTS} has committed offset {next}, so it has handled the tombstone and deleted the address"
            ),
        },
        _ => Pill { state: "wait", text: format!("email: {RECIPIENTS} has not committed past the tombstone yet") },
    };
    let state = Pill { state: "good", text: format!("Kafka: {STATES} has the tombstone at {place}") };
    vec![row, profile, address, mails, state]
}

/// Whether a service answers that it has nothing under this path.
async fn absent(app: &App, service: Service, path: String, what: &str) -> Pill {
    let name = service.name;
    let (state, text) = match app.users.status(service, &path).await {
        Ok(status @ (404 | 410)) => ("good", format!("{name}: GET {path} answers {status}")),
        Ok(status @ 200..300) => ("wait", format!("{name}: GET {path} answers {status}, so {what} is still there")),
        Ok(status @ (401 | 403)) => ("wait", format!("{name}: not checked: the API requires a token ({status})")),
        Ok(status) => ("wait", format!("{name}: GET {path} answers {status}")),
        Err(error) => ("wait", format!("{name}: {error:#}")),
    };
    Pill { state, text }
}

/// Whether no mail to the user waits any more. The answer has no address.
async fn unsent(app: &App, user: Uuid) -> Pill {
    let (state, text) = match app.users.deliveries(user).await {
        Err(error) => ("wait", format!("email: {error:#}")),
        Ok(deliveries) => {
            let waiting = deliveries.iter().filter(|state| !["sent", "failed", "cancelled"].contains(&state.as_str()));
            match waiting.count() {
                0 => ("good", "email: no mail to the user waits".to_owned()),
                waiting => ("wait", format!("email: {waiting} mails to the user wait")),
            }
        }
    };
    Pill { state, text }
}

/// Whether the older states, which have the personal data, can still be read from the topic.
pub async fn in_topic(app: &App, records: &[Arc<Seen>], tombstone: &Seen) -> Vec<Pill> {
    let older = records.iter().filter(|seen| seen.topic == STATES && seen.offset < tombstone.offset);
    let mut older: Vec<&Arc<Seen>> = older.collect();
    older.sort_by_key(|seen| Reverse(seen.offset));
    let mut pills = vec![];
    for seen in older.into_iter().take(OLDER_STATES) {
        let place = format!("{}@{}", seen.partition, seen.offset);
        let coordinates = Coordinates { topic: seen.topic.to_owned(), partition: seen.partition, offset: seen.offset };
        let (state, text) = match app.reader.read(coordinates).await {
            Ok(Found::Nothing) => ("good", format!("Kafka: compaction has deleted the state at {place}")),
            Ok(Found::Record(_)) => {
                ("wait", format!("Kafka: the state at {place} can be read until compaction deletes it, within a week"))
            }
            Err(error) => ("wait", format!("Kafka: {error:#}")),
        };
        pills.push(Pill { state, text });
    }
    pills
}
