//! The synchronous version of Waybill, for the comparison in `docs/compared.md`. It is never
//! shipped.
//!
//! One program with three roles: `user`, `analytics` and `cache`. Each has its own database or
//! store. `POST /users` inserts the user, commits, and then sends the mail and calls the other two
//! over HTTP. It has a unique address, an `Idempotency-Key`, time-outs on every pool, request and
//! call, and idempotent receivers. A request is finished even if the caller has disconnected. The
//! mail client, the store client, the template, and the settings of the database pool are Waybill's
//! own.
//!
//! # What the caller is answered when a call fails
//!
//! The user is committed by then, so one of three answers is possible:
//!
//! - **Delete the user again and answer 503.** The mail may have been sent and the count raised, so
//!   both would have to be undone as well, by calls that fail for the same reason. And no user could
//!   register while analytics is down.
//! - **Answer 503 and keep the user.** The caller repeats the request and the program repeats the
//!   calls. Then a registration is as available as the least available receiver. A person sees an
//!   error although the account exists, and whether the mail is ever sent depends on the patience of a
//!   browser.
//! - **Answer 201 and name what is missing.** The account exists, and that is what the caller asked for.
//!
//! This program does the last: `{"id": …, "version": 1, "missing": ["mail"]}`. The failure is
//! logged and counted. A caller that wants more repeats the request with the same
//! `Idempotency-Key`. Then the program makes only the missing calls. This also completes a
//! registration whose process died between the commit and the calls.
//!
//! # Variants
//!
//! `VARIANT` is `sequential` (one call after another), `parallel`, `resilient` (parallel, with
//! short time-outs, two retries with back-off, and a circuit breaker for each receiver), or
//! `background`: as `resilient`, and after the answer the process makes the missing calls again for
//! a minute. It remembers them in memory only, so a process that is killed or replaced forgets
//! them. To remember them it would read the table of keys, which has them, when it starts: a step
//! towards an outbox.

mod analytics;
mod breaker;
mod cache;
mod calls;
mod mailer;
mod problem;
mod receiver;
mod registrations;
mod server;
mod user;
mod waybill;

use std::net::SocketAddr;

use clap::{Parser, Subcommand};
use shared::platform::settings;
use tracing_subscriber::EnvFilter;

/// Registers users by calling every receiver within the request.
#[derive(Parser)]
struct Cli {
    /// Address of the role's API, of /readyz and of /metrics.
    #[arg(long, env, default_value = "127.0.0.1:8080", global = true)]
    http_addr: SocketAddr,
    #[command(subcommand)]
    role: Role,
}

#[derive(Subcommand)]
enum Role {
    /// Registers users.
    User(user::Config),
    /// Counts registrations.
    Analytics(analytics::Config),
    /// Serves profiles.
    Cache(cache::Config),
}

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    let Cli { http_addr, role } = settings::parse();
    let filter = EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new("info"));
    tracing_subscriber::fmt().json().with_env_filter(filter).init();
    match role {
        Role::User(config) => user::serve(http_addr, config).await,
        Role::Analytics(config) => analytics::serve(http_addr, config).await,
        Role::Cache(config) => cache::serve(http_addr, config).await,
    }
}
