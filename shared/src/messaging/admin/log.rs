//! `GET /actions`: what operators did, on any service.

use std::net::SocketAddr;

use axum::extract::rejection::QueryRejection;
use axum::extract::{Query, State};
use axum::response::{IntoResponse, Response};
use axum::{Json, Router, routing};
use clap::Args;
use serde::{Deserialize, Serialize};
use tokio::task::block_in_place;

use super::client::{aligned, get, printable, query};
use super::operations::{Operations, Refused};
use crate::events::ActionOutcome;
use crate::messaging::actions::{self, Listed};
use crate::platform::problem::{INVALID_QUERY, IntoProblem};
use crate::platform::settings::number;

const LIMIT_DEFAULT: usize = 100;
const LIMIT_MAX: usize = 5_000;

pub(super) fn routes() -> Router<Operations> {
    Router::new().route("/actions", routing::get(list))
}

/// The parameters of the query string.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Parameters {
    /// Only actions on this record, group or service.
    target: Option<String>,
    limit: Option<usize>,
}

#[derive(Serialize, Deserialize)]
struct Page {
    /// Newest first.
    actions: Vec<Listed>,
}

async fn list(
    State(operations): State<Operations>,
    parameters: Result<Query<Parameters>, QueryRejection>,
) -> Result<Json<Page>, Response> {
    let Query(Parameters { target, limit }) =
        parameters.map_err(|rejection| rejection.into_problem().into_response())?;
    let limit = limit.unwrap_or(LIMIT_DEFAULT);
    if !(1..=LIMIT_MAX).contains(&limit) {
        let detail = format!("limit: a list has 1 to {LIMIT_MAX} actions");
        return Err(Refused::new(INVALID_QUERY, detail).into_response());
    }
    let (mut reader, _permit) = operations.reader().await.map_err(Refused::into_response)?;
    let newest = block_in_place(|| actions::newest(&mut reader, operations.kafka()));
    let mut actions = newest.map_err(|error| Refused::unreadable(&error).into_response())?;
    actions.retain(|action| target.as_ref().is_none_or(|target| action.target == *target));
    actions.truncate(limit);
    Ok(Json(Page { actions }))
}

/// The subcommand `actions`.
#[derive(Args, Clone, Debug)]
pub struct ListActions {
    /// Only actions on this record (topic-partition-offset), consumer group or service.
    #[arg(long)]
    target: Option<String>,
    /// Print at most this many.
    #[arg(long, default_value_t = LIMIT_DEFAULT, value_parser = number::<usize>(1..=LIMIT_MAX))]
    limit: usize,
    /// Print one JSON object per line instead of a table.
    #[arg(long)]
    json: bool,
}

impl ListActions {
    #[expect(clippy::print_stdout, reason = "the output of the subcommand")]
    pub(super) async fn run(self, admin_addr: SocketAddr) -> anyhow::Result<()> {
        let parameters = query(&[("target", self.target), ("limit", Some(self.limit.to_string()))]);
        let page: Page = get(admin_addr, &format!("/actions?{parameters}")).await?;
        if self.json {
            for action in page.actions {
                println!("{}", serde_json::to_string(&action)?);
            }
        } else {
            print!("{}", table(&page.actions));
        }
        Ok(())
    }
}

fn table(actions: &[Listed]) -> String {
    let mut rows =
        vec![["BEGUN", "OPERATOR", "ACTION", "TARGET", "GROUP", "OUTCOME", "DETAIL", "REASON"].map(str::to_owned)];
    let or_dash = |text: &Option<String>| text.as_deref().map_or("-".to_owned(), printable);
    rows.extend(actions.iter().map(|action| {
        let outcome = match action.outcome {
            Some(ActionOutcome::Done) => "done",
            Some(ActionOutcome::Failed) => "failed",
            None => "none",
        };
        [
            or_dash(&action.begun),
            printable(&action.operator),
            printable(&action.action),
            printable(&action.target),
            or_dash(&action.group),
            outcome.to_owned(),
            or_dash(&action.detail),
            or_dash(&action.reason),
        ]
    }));
    aligned(&rows)
}
