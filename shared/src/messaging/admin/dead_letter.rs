//! `POST /dead-letters`: dead-letters a record that blocks its partition in this process.

use std::net::SocketAddr;

use axum::extract::State;
use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};
use axum::{Extension, Json, Router, routing};
use clap::Args;
use futures::future::join_all;
use serde::{Deserialize, Serialize};
use serde_json::json;

use super::client::{Token, act};
use super::operations::{Body, INVALID_ACTION, Operations, Refused, parsed, reason};
use super::show::coordinates;
use crate::messaging::actions::Intent;
use crate::messaging::record::Coordinates;
use crate::platform::admin::Operator;
use crate::platform::problem::Kind;

const RECORD_NOT_BLOCKED: Kind = Kind::new("record-not-blocked", StatusCode::NOT_FOUND);
const NOT_DEAD_LETTERED: Kind = Kind::new("not-dead-lettered", StatusCode::SERVICE_UNAVAILABLE);

pub(super) fn routes() -> Router<Operations> {
    Router::new().route("/dead-letters", routing::post(dead_letter))
}

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

async fn dead_letter(
    State(operations): State<Operations>,
    Extension(Operator(operator)): Extension<Operator>,
    request: Body<Request>,
) -> Result<Json<DeadLettered>, Response> {
    let request = parsed(request)?;
    let record = coordinates(&request.coordinates).map_err(Refused::into_response)?;
    let reason = reason(&request.reason).map_err(|error| Refused::new(INVALID_ACTION, error).into_response())?;
    if !operations.blocked_records().contains(&record) {
        return Err(not_blocked(&record).into_response());
    }
    let intent = Intent {
        action: "dead-letter",
        target: record.to_string(),
        group: None,
        operator,
        reason: Some(reason.clone()),
        detail: None,
    };
    let blocked = operations.blocked_records().clone();
    let work = async move {
        let waiting = blocked.decide(&record, &reason);
        if waiting.is_empty() {
            return Err(not_blocked(&record));
        }
        let mut groups = vec![];
        let mut failures = vec![];
        for (group, followed) in
            join_all(waiting.into_iter().map(|decided| blocked.until_followed(&record, decided))).await
        {
            match followed {
                Ok(()) => groups.push(group),
                Err(failure) => failures.push(format!("{group}: {failure}")),
            }
        }
        if !failures.is_empty() {
            // The letters of the other groups are written.
            failures.extend(groups.iter().map(|group| format!("{group}: dead-lettered")));
            return Err(Refused::new(NOT_DEAD_LETTERED, failures.join("; ")));
        }
        let detail = format!("dead-lettered by {}", groups.join(", "));
        Ok((DeadLettered { groups }, detail))
    };
    operations.act(intent, work).await.map(Json)
}

fn not_blocked(record: &Coordinates) -> Refused {
    let detail =
        format!("no consumer of this process waits at {record}: ask the process whose /status names this record");
    Refused::new(RECORD_NOT_BLOCKED, detail)
}

/// The subcommand `dead-letter`.
#[derive(Args, Clone, Debug)]
pub struct DeadLetterRecord {
    /// The record, as `/status` names it: topic-partition-offset.
    #[arg(value_name = "COORDINATES")]
    coordinates: Coordinates,
    /// Why, for the reader of the dead letter. Name no person in it: it is kept with the letter.
    #[arg(long, value_parser = reason)]
    reason: String,
    #[command(flatten)]
    token: Token,
}

impl DeadLetterRecord {
    #[expect(clippy::print_stdout, reason = "the output of the subcommand")]
    pub(super) async fn run(self, admin_addr: SocketAddr) -> anyhow::Result<()> {
        let body = json!({ "coordinates": self.coordinates.to_string(), "reason": self.reason });
        act(admin_addr, "/dead-letters", &self.token, &body).await?;
        println!("{} is a dead letter now, and its partition continues", self.coordinates);
        Ok(())
    }
}
