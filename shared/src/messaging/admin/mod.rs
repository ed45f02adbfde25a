//! What operators do on the admin port of a service that consumes, and the subcommands, which are
//! clients of it. Reading needs no token. Every action needs one, and leaves two records in
//! [`actions`](super::actions).

mod operations;
mod client;
mod list;
mod show;
mod show_record;
mod redrive;
mod discard;
mod dead_letter;
mod consumers;
mod log;

use std::net::SocketAddr;

use axum::{Extension, Json, Router, routing};
use clap::Subcommand;
use serde_json::{Value, json};

use crate::platform::admin::Operator;

pub(crate) use operations::Operations;

/// The routes of the admin port.
pub(crate) fn routes(operations: Operations) -> Router {
    let routes = list::routes().merge(show::routes()).merge(redrive::routes()).merge(discard::routes());
    let routes = routes
        .merge(show_record::routes())
        .merge(dead_letter::routes())
        .merge(consumers::routes())
        .merge(log::routes());
    routes.route("/operator", routing::post(operator)).with_state(operations)
}

/// The name of the token that came with the request. A client checks a token with it.
async fn operator(Extension(Operator(operator)): Extension<Operator>) -> Json<Value> {
    Json(json!({ "operator": operator }))
}

/// The subcommands of a service that consumes events. Each asks the running service at ADMIN_ADDR.
#[derive(Subcommand, Clone, Debug)]
pub enum AdminCommand {
    /// List the open dead letters. Shows no personal data.
    DeadLetters(list::ListDeadLetters),
    /// Show one dead letter with the headers and the value of its record. This is an action,
    /// because the record may contain personal data.
    ShowDeadLetter(show::ShowDeadLetter),
    /// Show one record of a topic that the service consumes, with its headers and its value. This
    /// is an action, because the record may contain personal data.
    ShowRecord(show_record::ShowRecord),
    /// Hand open dead letters to their handlers again.
    Redrive(redrive::Redrive),
    /// Settle a dead letter without an effect: its record is never handled.
    Discard(discard::Discard),
    /// Dead-letter a record that fails and blocks its partition.
    DeadLetter(dead_letter::DeadLetterRecord),
    /// Pause all consumers of the process, until they are resumed or the process ends.
    PauseConsumers(consumers::PauseConsumers),
    /// Resume the consumers that were paused.
    ResumeConsumers(consumers::ResumeConsumers),
    /// Let the consumers continue whose breaker is open, as SIGUSR1 does.
    CloseBreakers(consumers::CloseBreakers),
    /// List what operators did, newest first.
    Actions(log::ListActions),
}

impl AdminCommand {
    /// # Errors
    /// The service does not answer, or it refuses the request. The message says why.
    pub async fn run(self, admin_addr: SocketAddr) -> anyhow::Result<()> {
        match self {
            Self::DeadLetters(command) => command.run(admin_addr).await,
            Self::ShowDeadLetter(command) => command.run(admin_addr).await,
            Self::ShowRecord(command) => command.run(admin_addr).await,
            Self::Redrive(command) => command.run(admin_addr).await,
            Self::Discard(command) => command.run(admin_addr).await,
            Self::DeadLetter(command) => command.run(admin_addr).await,
            Self::PauseConsumers(command) => command.run(admin_addr).await,
            Self::ResumeConsumers(command) => command.run(admin_addr).await,
            Self::CloseBreakers(command) => command.run(admin_addr).await,
            Self::Actions(command) => command.run(admin_addr).await,
        }
    }
}
