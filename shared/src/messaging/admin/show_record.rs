//! `POST /records/show`: one record of a topic that this service consumes. An action, because a
//! state contains personal data: who has seen it is recorded.

use std::net::SocketAddr;

use axum::extract::State;
use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};
use axum::{Extension, Json, Router, routing};
use clap::Args;
use rdkafka::message::Message;
use serde::Deserialize;
use serde_json::json;
use tokio::task::block_in_place;

use super::client::{Token, act, print_json};
use super::operations::{Body, INVALID_ACTION, Operations, Refused, parsed, reason};
use super::show::{Content, content, coordinates};
use crate::messaging::actions::Intent;
use crate::messaging::reader::RecordReader;
use crate::messaging::record::Coordinates;
use crate::platform::admin::Operator;
use crate::platform::problem::Kind;

const TOPIC_NOT_CONSUMED: Kind = Kind::new("topic-not-consumed", StatusCode::NOT_FOUND);
const RECORD_NOT_FOUND: Kind = Kind::new("record-not-found", StatusCode::NOT_FOUND);

pub(super) fn routes() -> Router<Operations> {
    Router::new().route("/records/show", routing::post(show))
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Request {
    coordinates: String,
    reason: String,
}

/// Crash after the first record of the action: nothing was shown, and the action has no outcome.
async fn show(
    State(operations): State<Operations>,
    Extension(Operator(operator)): Extension<Operator>,
    request: Body<Request>,
) -> Result<Json<Content>, Response> {
    let request = parsed(request)?;
    let record = coordinates(&request.coordinates).map_err(Refused::into_response)?;
    let reason = reason(&request.reason).map_err(|error| Refused::new(INVALID_ACTION, error).into_response())?;
    let groups = operations.groups().map_err(Refused::into_response)?;
    let Some(group) = groups.into_iter().find(|group| group.records_topic == record.topic) else {
        let detail = format!("coordinates: no group of this service reads the topic {}", record.topic);
        return Err(Refused::new(TOPIC_NOT_CONSUMED, detail).into_response());
    };
    let intent = Intent {
        action: "show-record",
        target: record.to_string(),
        group: None,
        operator,
        reason: Some(reason),
        detail: None,
    };
    let this = operations.clone();
    let work = async move {
        let (_, _permit) = this.reader().await?;
        let read = block_in_place(|| RecordReader::new(this.kafka(), group.name)?.read(&record));
        match read.map_err(|error| Refused::unreadable(&error))? {
            Some(found) => Ok((content(found.key(), &found), "shown".to_owned())),
            None => {
                let detail = format!("Kafka has no record at {record}: it was deleted, or the offset never had one");
                Err(Refused::new(RECORD_NOT_FOUND, detail))
            }
        }
    };
    operations.act(intent, work).await.map(Json)
}

/// The subcommand `show-record`.
#[derive(Args, Clone, Debug)]
pub struct ShowRecord {
    /// The record: topic-partition-offset. The service consumes the topic.
    #[arg(value_name = "COORDINATES")]
    coordinates: Coordinates,
    /// Why you need to see the record. It is recorded with your token's name. Name no person in it.
    #[arg(long, value_parser = reason)]
    reason: String,
    #[command(flatten)]
    token: Token,
}

impl ShowRecord {
    pub(super) async fn run(self, admin_addr: SocketAddr) -> anyhow::Result<()> {
        let body = json!({ "coordinates": self.coordinates.to_string(), "reason": self.reason });
        print_json(&act(admin_addr, "/records/show", &self.token, &body).await?)
    }
}
