//! `POST /dead-letters/show`: one letter with its record. An action, because a record may contain
//! personal data: who has seen it is recorded.

use std::net::SocketAddr;

use axum::extract::State;
use axum::response::{IntoResponse, Response};
use axum::{Extension, Json, Router, routing};
use clap::Args;
use rdkafka::message::{Message, OwnedMessage};
use serde::{Deserialize, Serialize};
use serde_json::json;
use tokio::task::block_in_place;

use super::client::{Token, act, print_json};
use super::operations::{Body, INVALID_ACTION, LETTER_NOT_OPEN, Operations, Refused, parsed, reason};
use crate::events::Kind;
use crate::messaging::actions::Intent;
use crate::messaging::dead_letters::{DeadLetter, Line};
use crate::messaging::reader::RecordReader;
use crate::messaging::record::{Coordinates, headers};
use crate::platform::admin::Operator;

pub(super) fn routes() -> Router<Operations> {
    Router::new().route("/dead-letters/show", routing::post(show))
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Request {
    coordinates: String,
    group: Option<String>,
    reason: String,
}

/// A letter and its record.
#[derive(Serialize)]
struct Shown {
    letter: Line,
    /// `copy`: the record as the letter contains it. `original`: the record that the letter points
    /// to. `compacted`: the letter is a pointer, and Kafka has deleted the record because its key
    /// has a newer one.
    from: &'static str,
    record: Option<Content>,
}

/// A record.
#[derive(Serialize)]
pub(super) struct Content {
    key: Option<Bytes>,
    headers: Vec<Header>,
    value: Option<Bytes>,
}

#[derive(Serialize)]
struct Header {
    /// `null`: the name is not UTF-8.
    name: Option<String>,
    value: Option<Bytes>,
}

/// Text, or bytes that are not UTF-8.
#[derive(Debug, PartialEq, Eq, Serialize)]
#[serde(untagged)]
enum Bytes {
    Text(String),
    Hex { hex: String },
}

impl From<&[u8]> for Bytes {
    fn from(bytes: &[u8]) -> Self {
        match std::str::from_utf8(bytes) {
            Ok(text) => Self::Text(text.to_owned()),
            Err(_) => Self::Hex { hex: bytes.iter().map(|byte| format!("{byte:02x}")).collect() },
        }
    }
}

/// Crash after the first record of the action: nothing was shown, and the action has no outcome.
async fn show(
    State(operations): State<Operations>,
    Extension(Operator(operator)): Extension<Operator>,
    request: Body<Request>,
) -> Result<Json<Shown>, Response> {
    let request = parsed(request)?;
    let record = coordinates(&request.coordinates).map_err(Refused::into_response)?;
    let reason = reason(&request.reason).map_err(|error| Refused::new(INVALID_ACTION, error).into_response())?;
    let group = {
        let (reader, _permit) = operations.reader().await.map_err(Refused::into_response)?;
        let found = operations.letter(&reader, &record, request.group.as_deref()).await;
        found.map_err(Refused::into_response)?.0
    };
    let intent = Intent {
        action: "show",
        target: record.to_string(),
        group: Some(group.name),
        operator,
        reason: Some(reason),
        detail: None,
    };
    let this = operations.clone();
    let work = async move {
        let (mut reader, _permit) = this.reader().await?;
        let (_, offset) = this.letter(&reader, &record, Some(group.name)).await?;
        let read = block_in_place(|| {
            let Some(letter) = reader.at(group.letters.topic(), offset)? else { return Ok(None) };
            let letter = DeadLetter::read(record.clone(), letter);
            let original = match group.kind {
                Kind::Facts => None,
                Kind::State => Some(RecordReader::new(this.kafka(), group.name)?.read(&record)?),
            };
            anyhow::Ok(Some((letter, original)))
        });
        let Some((letter, original)) = read.map_err(|error| Refused::unreadable(&error))? else {
            return Err(Refused::new(LETTER_NOT_OPEN, format!("{record} was settled meanwhile")));
        };
        let (from, record) = match original {
            None => ("copy", Some(copied(&letter))),
            Some(Some(original)) => ("original", Some(content(original.key(), &original))),
            Some(None) => ("compacted", None),
        };
        let shown = Shown { letter: Line::of(group.name, &letter), from, record };
        Ok((shown, format!("shown: {from}")))
    };
    operations.act(intent, work).await.map(Json)
}

/// The record in a letter: without the letter's own headers, and with the record's key.
fn copied(letter: &DeadLetter) -> Content {
    let mut content = content(letter.record_key(), &letter.message);
    content.headers.retain(|header| header.name.as_ref().is_none_or(|name| !name.starts_with("dlq-")));
    content
}

pub(super) fn content(key: Option<&[u8]>, message: &OwnedMessage) -> Content {
    let headers = headers(message).map(|header| match header {
        Ok(header) => Header { name: Some(header.key.to_owned()), value: header.value.map(Bytes::from) },
        Err(_) => Header { name: None, value: None },
    });
    Content { key: key.map(Bytes::from), headers: headers.collect(), value: message.payload().map(Bytes::from) }
}

/// # Errors
/// The text does not name a record.
pub(super) fn coordinates(text: &str) -> Result<Coordinates, Refused> {
    text.parse().map_err(|error| Refused::new(INVALID_ACTION, format!("coordinates: {error}")))
}

/// The subcommand `show-dead-letter`.
#[derive(Args, Clone, Debug)]
pub struct ShowDeadLetter {
    /// The letter, as `dead-letters` prints it: topic-partition-offset.
    #[arg(value_name = "COORDINATES")]
    coordinates: Coordinates,
    /// The consumer group, if the record is a dead letter of several.
    #[arg(long)]
    group: Option<String>,
    /// Why you need to see the record. It is recorded with your token's name. Name no person in it.
    #[arg(long, value_parser = reason)]
    reason: String,
    #[command(flatten)]
    token: Token,
}

impl ShowDeadLetter {
    pub(super) async fn run(self, admin_addr: SocketAddr) -> anyhow::Result<()> {
        let Self { coordinates, group, reason, token } = self;
        let body = json!({ "coordinates": coordinates.to_string(), "group": group, "reason": reason });
        print_json(&act(admin_addr, "/dead-letters/show", &token, &body).await?)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_that_are_not_text_are_shown_in_hexadecimal() {
        assert_eq!(Bytes::from(&b"a\"b"[..]), Bytes::Text("a\"b".to_owned()));
        assert_eq!(Bytes::from(&b"\xff\x00"[..]), Bytes::Hex { hex: "ff00".to_owned() });
    }
}
