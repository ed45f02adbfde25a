//! `POST /dead-letters/discard`: settles a letter without an effect.

use std::net::SocketAddr;

use axum::extract::State;
use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};
use axum::{Extension, Json, Router, routing};
use clap::Args;
use serde::{Deserialize, Serialize};
use serde_json::json;

use super::client::{Token, act};
use super::operations::{Body, INVALID_ACTION, Operations, Refused, parsed, reason};
use super::show::coordinates;
use crate::fault;
use crate::messaging::actions::Intent;
use crate::messaging::record::Coordinates;
use crate::platform::admin::Operator;
use crate::platform::problem::Kind;

const NOT_DISCARDED: Kind = Kind::new("not-discarded", StatusCode::SERVICE_UNAVAILABLE);

pub(super) fn routes() -> Router<Operations> {
    Router::new().route("/dead-letters/discard", routing::post(discard))
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Request {
    coordinates: String,
    group: Option<String>,
    reason: String,
}

#[derive(Serialize)]
struct Discarded {
    group: &'static str,
}

/// The record of the action is written before the tombstone. Crash in between: the letter stays
/// open, and the action has no outcome. Crash after the tombstone: the letter is settled, and the
/// action has no outcome. A letter is never settled without a record of who discarded it.
///
/// If a redrive that runs at the same time fails, it writes the letter again, and the letter is
/// open again. The operator sees that in the list, and discards it again.
async fn discard(
    State(operations): State<Operations>,
    Extension(Operator(operator)): Extension<Operator>,
    request: Body<Request>,
) -> Result<Json<Discarded>, Response> {
    let request = parsed(request)?;
    let record = coordinates(&request.coordinates).map_err(Refused::into_response)?;
    let reason = reason(&request.reason).map_err(|error| Refused::new(INVALID_ACTION, error).into_response())?;
    let group = {
        let (reader, _permit) = operations.reader().await.map_err(Refused::into_response)?;
        let found = operations.letter(&reader, &record, request.group.as_deref()).await;
        found.map_err(Refused::into_response)?.0
    };
    let intent = Intent {
        action: "discard",
        target: record.to_string(),
        group: Some(group.name),
        operator,
        reason: Some(reason),
        detail: None,
    };
    let work = async move {
        let settled = group.letters.tombstone(&[record]).await;
        settled.map_err(|error| Refused::new(NOT_DISCARDED, format!("{error:#}")))?;
        fault::point("discard.after_tombstone");
        Ok((Discarded { group: group.name }, "discarded".to_owned()))
    };
    operations.act(intent, work).await.map(Json)
}

/// The subcommand `discard`.
#[derive(Args, Clone, Debug)]
pub struct Discard {
    /// The letters, as `dead-letters` prints them: topic-partition-offset.
    #[arg(value_name = "COORDINATES", required = true, num_args = 1..)]
    coordinates: Vec<Coordinates>,
    /// The consumer group, if a record is a dead letter of several.
    #[arg(long)]
    group: Option<String>,
    /// Why the records are never handled. It is recorded with your token's name. Name no person in
    /// it.
    #[arg(long, value_parser = reason)]
    reason: String,
    #[command(flatten)]
    token: Token,
}

impl Discard {
    /// Each letter is an action of its own. Ends at the first that fails.
    #[expect(clippy::print_stdout, reason = "the output of the subcommand")]
    pub(super) async fn run(self, admin_addr: SocketAddr) -> anyhow::Result<()> {
        for coordinates in &self.coordinates {
            let body = json!({ "coordinates": coordinates.to_string(), "group": self.group, "reason": self.reason });
            act(admin_addr, "/dead-letters/discard", &self.token, &body).await?;
            println!("{coordinates} is discarded: its record is never handled");
        }
        Ok(())
    }
}
