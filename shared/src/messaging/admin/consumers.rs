//! `POST /consumers/…`: pauses and resumes the consumers of this process, and closes their
//! breakers.

use std::net::SocketAddr;

use axum::extract::State;
use axum::response::{IntoResponse, Response};
use axum::{Extension, Json, Router, routing};
use clap::Args;
use serde::{Deserialize, Serialize};
use serde_json::json;

use super::client::{Token, act};
use super::operations::{Body, INVALID_ACTION, Operations, Refused, parsed, reason};
use crate::messaging::actions::Intent;
use crate::platform::admin::Operator;

pub(super) fn routes() -> Router<Operations> {
    Router::new()
        .route("/consumers/pause", routing::post(pause))
        .route("/consumers/resume", routing::post(resume))
        .route("/consumers/close-breakers", routing::post(close_breakers))
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Request {
    reason: Option<String>,
}

#[derive(Serialize)]
struct Ordered {
    /// The groups whose consumers follow the order.
    groups: Vec<&'static str>,
}

/// The consumers pause at their next turn: a batch in progress is finished first. The pause is not
/// kept over a restart, so a process that dies and is restarted consumes again.
async fn pause(
    State(operations): State<Operations>,
    Extension(Operator(operator)): Extension<Operator>,
    request: Body<Request>,
) -> Result<Json<Ordered>, Response> {
    let given = parsed(request)?.reason;
    let Some(why) = given.clone() else {
        return Err(Refused::new(INVALID_ACTION, "reason: say why the consumers are paused").into_response());
    };
    let paused = operations.paused().clone();
    let text = format!("{operator}: {why}");
    order(&operations, "pause-consumers", operator, given, move || {
        paused.send_replace(Some(text));
    })
    .await
}

async fn resume(
    State(operations): State<Operations>,
    Extension(Operator(operator)): Extension<Operator>,
    request: Body<Request>,
) -> Result<Json<Ordered>, Response> {
    let reason = parsed(request)?.reason;
    let paused = operations.paused().clone();
    order(&operations, "resume-consumers", operator, reason, move || {
        paused.send_replace(None);
    })
    .await
}

async fn close_breakers(
    State(operations): State<Operations>,
    Extension(Operator(operator)): Extension<Operator>,
    request: Body<Request>,
) -> Result<Json<Ordered>, Response> {
    let reason = parsed(request)?.reason;
    let resumed = operations.resumed().clone();
    order(&operations, "close-breakers", operator, reason, move || {
        resumed.send_replace(());
    })
    .await
}

/// Records the action, and gives the order between its two records.
async fn order(
    operations: &Operations,
    action: &'static str,
    operator: String,
    given: Option<String>,
    give: impl FnOnce() + Send + 'static,
) -> Result<Json<Ordered>, Response> {
    let given = given.map(|text| reason(&text)).transpose();
    let reason = given.map_err(|error| Refused::new(INVALID_ACTION, error).into_response())?;
    let groups = operations.groups().map_err(Refused::into_response)?;
    let groups: Vec<&'static str> = groups.iter().map(|group| group.name).collect();
    let target = operations.service().to_owned();
    let intent = Intent { action, target, group: None, operator, reason, detail: None };
    let work = async move {
        give();
        let detail = format!("ordered for {}", groups.join(", "));
        Ok((Ordered { groups }, detail))
    };
    operations.act(intent, work).await.map(Json)
}

/// The subcommand `pause-consumers`.
#[derive(Args, Clone, Debug)]
pub struct PauseConsumers {
    /// Why. It is shown in /status and recorded with your token's name. Name no person in it.
    #[arg(long, value_parser = reason)]
    reason: String,
    #[command(flatten)]
    token: Token,
}

/// The subcommand `resume-consumers`.
#[derive(Args, Clone, Debug)]
pub struct ResumeConsumers {
    /// Why. It is recorded with your token's name. Name no person in it.
    #[arg(long, value_parser = reason)]
    reason: Option<String>,
    #[command(flatten)]
    token: Token,
}

/// The subcommand `close-breakers`.
#[derive(Args, Clone, Debug)]
pub struct CloseBreakers {
    /// Why. It is recorded with your token's name. Name no person in it.
    #[arg(long, value_parser = reason)]
    reason: Option<String>,
    #[command(flatten)]
    token: Token,
}

impl PauseConsumers {
    #[expect(clippy::print_stdout, reason = "the output of the subcommand")]
    pub(super) async fn run(self, admin_addr: SocketAddr) -> anyhow::Result<()> {
        act(admin_addr, "/consumers/pause", &self.token, &json!({ "reason": self.reason })).await?;
        println!("the consumers of this process pause after their batch in progress, see /status");
        Ok(())
    }
}

impl ResumeConsumers {
    #[expect(clippy::print_stdout, reason = "the output of the subcommand")]
    pub(super) async fn run(self, admin_addr: SocketAddr) -> anyhow::Result<()> {
        act(admin_addr, "/consumers/resume", &self.token, &json!({ "reason": self.reason })).await?;
        println!("the consumers of this process resume");
        Ok(())
    }
}

impl CloseBreakers {
    #[expect(clippy::print_stdout, reason = "the output of the subcommand")]
    pub(super) async fn run(self, admin_addr: SocketAddr) -> anyhow::Result<()> {
        act(admin_addr, "/consumers/close-breakers", &self.token, &json!({ "reason": self.reason })).await?;
        println!("the consumers of this process whose breaker is open try their batch again");
        Ok(())
    }
}
