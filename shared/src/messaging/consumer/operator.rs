//! The records that block their partitions in this process, and an operator's decision to
//! dead-letter one of them: `<service> dead-letter TOPIC-PARTITION-OFFSET --reason TEXT` sends it
//! to the admin port of the running service. Only the consumer of the partition may act on it,
//! because it must store the offset.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use anyhow::{bail, ensure};
use axum::extract::State;
use axum::extract::rejection::JsonRejection;
use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};
use axum::{Extension, Json, Router, routing};
use clap::Args;
use serde::{Deserialize, Serialize};
use serde_json::json;
use tokio::sync::oneshot;
use tokio::time::timeout;

use crate::messaging::record::Coordinates;
use crate::platform::admin::{AdminToken, Operator, is_token};
use crate::platform::health;
use crate::platform::problem::{IntoProblem, Kind, problem};
use crate::platform::secret::{OptionalSecret, Secret};

const INVALID_DEAD_LETTER: Kind = Kind::new("invalid-dead-letter", StatusCode::BAD_REQUEST);
const RECORD_NOT_BLOCKED: Kind = Kind::new("record-not-blocked", StatusCode::NOT_FOUND);
const NOT_DEAD_LETTERED: Kind = Kind::new("not-dead-lettered", StatusCode::SERVICE_UNAVAILABLE);

/// Longer than a turn of the consumer and the acknowledgement of a letter usually take.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(30);
const REASON_MAX_LENGTH: usize = 200;

/// The subcommand `dead-letter`.
#[derive(Args, Clone, Debug)]
pub struct DeadLetterRecord {
    /// The record, as `/status` names it: topic-partition-offset.
    #[arg(value_name = "COORDINATES")]
    pub coordinates: Coordinates,
    /// Why, for the reader of the dead letter. Name no person in it: it is kept with the letter.
    #[arg(long, value_parser = reason)]
    pub reason: String,
    #[command(flatten)]
    token: OptionalSecret<AdminToken>,
}

fn reason(text: &str) -> Result<String, String> {
    if (1..=REASON_MAX_LENGTH).contains(&text.chars().count()) && !text.contains(char::is_control) {
        Ok(text.to_owned())
    } else {
        Err(format!("the reason has 1 to {REASON_MAX_LENGTH} characters, and no control characters"))
    }
}

/// Asks the running service to dead-letter a record that blocks its partition, and prints the
/// result.
///
/// # Errors
/// ADMIN_TOKEN is malformed, the service does not answer or does not accept it, no consumer of it waits at this record, or Kafka does not accept
/// the letter.
#[expect(clippy::print_stdout, reason = "the output of the subcommand")]
pub async fn dead_letter(admin_addr: SocketAddr, options: &DeadLetterRecord) -> anyhow::Result<()> {
    let body = json!({ "coordinates": options.coordinates.to_string(), "reason": options.reason });
    let authorization = match options.token.get().map(Secret::expose) {
        None => String::new(),
        Some(token) => {
            ensure!(is_token(token), "ADMIN_TOKEN is not a token: it has 32 to 512 visible ASCII characters");
            format!("authorization: Bearer {token}\r\n")
        }
    };
    let answer = health::ask(admin_addr, "POST", "/dead-letters", &authorization, Some(&body), ANSWER_TIMEOUT * 2);
    let (status, body) = answer.await?;
    if status != StatusCode::OK.as_u16() {
        bail!("the service answered {status}: {body}");
    }
    println!("{} is a dead letter now, and its partition continues", options.coordinates);
    Ok(())
}

/// The records that block partitions of this process, by coordinates and group.
#[derive(Clone, Default)]
pub struct BlockedRecords(Arc<Mutex<BTreeMap<Key, Option<Decision>>>>);

type Key = (Coordinates, &'static str);

/// An operator's decision to dead-letter a record.
pub(super) struct Decision {
    pub reason: String,
    answer: oneshot::Sender<Result<(), String>>,
}

impl Decision {
    /// Answers the operator.
    pub fn answer(self, result: Result<(), String>) {
        // Fails if the operator's request has ended.
        let _ = self.answer.send(result);
    }
}

/// A record in the list, for as long as this value exists.
pub(super) struct Listed {
    records: BlockedRecords,
    key: Key,
}

impl Listed {
    /// The operator's decision about the record, once.
    pub fn decision(&self) -> Option<Decision> {
        self.records.lock().get_mut(&self.key)?.take()
    }
}

/// Drops a decision that was not followed: the operator gets an error.
impl Drop for Listed {
    fn drop(&mut self) {
        self.records.lock().remove(&self.key);
    }
}

impl BlockedRecords {
    pub(super) fn list(&self, coordinates: Coordinates, group: &'static str) -> Listed {
        let key = (coordinates, group);
        self.lock().insert(key.clone(), None);
        Listed { records: self.clone(), key }
    }

    /// The routes of the admin port.
    pub(crate) fn routes(self) -> Router {
        Router::new().route("/dead-letters", routing::post(decide)).with_state(self)
    }

    /// Passes the decision to every consumer that waits at the record. Returns their groups and the
    /// receivers of their answers.
    fn decide(&self, coordinates: &Coordinates, reason: &str) -> Vec<(&'static str, Answer)> {
        let mut waiting = vec![];
        for ((blocked, group), decision) in self.lock().iter_mut() {
            if blocked == coordinates {
                let (answer, receiver) = oneshot::channel();
                *decision = Some(Decision { reason: reason.to_owned(), answer });
                waiting.push((*group, receiver));
            }
        }
        waiting
    }

    fn lock(&self) -> MutexGuard<'_, BTreeMap<Key, Option<Decision>>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

type Answer = oneshot::Receiver<Result<(), String>>;

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Request {
    coordinates: String,
    reason: String,
}

#[derive(Serialize)]
struct DeadLettered {
    /// The groups that have dead-lettered the record.
    groups: Vec<&'static str>,
}

async fn decide(
    State(records): State<BlockedRecords>,
    Extension(Operator(operator)): Extension<Operator>,
    request: Result<Json<Request>, JsonRejection>,
) -> Result<Json<DeadLettered>, Response> {
    let Json(request) = request.map_err(|rejection| rejection.into_problem().into_response())?;
    let refuse = |kind, detail: String| problem(kind, detail).into_response();
    let coordinates: Coordinates =
        request.coordinates.parse().map_err(|error| refuse(INVALID_DEAD_LETTER, format!("coordinates: {error}")))?;
    let reason = reason(&request.reason).map_err(|error| refuse(INVALID_DEAD_LETTER, error))?;
    let waiting = records.decide(&coordinates, &reason);
    if waiting.is_empty() {
        let detail = format!(
            "no consumer of this process waits at {coordinates}: ask the process whose /status names this record"
        );
        return Err(refuse(RECORD_NOT_BLOCKED, detail));
    }
    tracing::info!(operator, %coordinates, "an operator dead-letters a record");
    let mut groups = vec![];
    for (group, answer) in waiting {
        let failed = match timeout(ANSWER_TIMEOUT, answer).await {
            Ok(Ok(Ok(()))) => {
                groups.push(group);
                continue;
            }
            Ok(Ok(Err(error))) => error,
            Ok(Err(_)) => "the record does not block its partition any more, or another process has it".to_owned(),
            Err(_) => "the consumer is busy or waits for a dependency; look at /status and try again".to_owned(),
        };
        return Err(refuse(NOT_DEAD_LETTERED, format!("{group}: {failed}")));
    }
    Ok(Json(DeadLettered { groups }))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn coordinates() -> Coordinates {
        Coordinates { topic: "some.events.v1".to_owned(), partition: 3, offset: 7 }
    }

    #[test]
    fn a_decision_reaches_the_consumers_that_wait_at_the_record() {
        let records = BlockedRecords::default();
        let listed = records.list(coordinates(), "a.b");
        assert!(listed.decision().is_none());
        let other = Coordinates { offset: 8, ..coordinates() };
        assert!(records.decide(&other, "why").is_empty());
        let mut waiting = records.decide(&coordinates(), "why");
        let decision = listed.decision().unwrap();
        assert_eq!(decision.reason, "why");
        assert!(listed.decision().is_none(), "a decision is made once");
        decision.answer(Ok(()));
        assert_eq!(waiting.remove(0).1.try_recv(), Ok(Ok(())));
    }

    #[test]
    fn a_record_that_does_not_block_any_more_gets_no_decision() {
        let records = BlockedRecords::default();
        let listed = records.list(coordinates(), "a.b");
        let mut waiting = records.decide(&coordinates(), "why");
        drop(listed);
        assert!(waiting.remove(0).1.try_recv().is_err());
        assert!(records.decide(&coordinates(), "why").is_empty());
    }

    #[test]
    fn a_reason_is_short_and_printable() {
        assert!(reason("a broken release").is_ok());
        for wrong in ["", "two\nlines", &"a".repeat(REASON_MAX_LENGTH + 1)] {
            assert!(reason(wrong).is_err(), "{wrong:?}");
        }
    }
}
