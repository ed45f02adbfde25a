//! `cargo xtask`: what a developer runs. Each command is a file under `commands`; what they share is the library.

#![allow(
    clippy::disallowed_methods,
    reason = "the rules on clocks, ids and environment protect the services; a developer's tool reads all three"
)]

mod commands;

use std::future::Future;
use std::process::ExitCode;

use anyhow::{Result, bail};
use clap::{Parser, Subcommand};
use nix::sys::stat::{Mode, umask};
use testbed::process;
use testbed::say::say;
use tokio::signal::unix::{SignalKind, signal};

/// Starts, shows, tests and checks Waybill on this machine, without Docker.
#[derive(Parser)]
#[command(name = "cargo xtask", bin_name = "cargo xtask")]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Start the whole system on its usual ports and keep it running until Ctrl-C.
    Up {
        /// Forget the data of earlier runs.
        #[arg(long)]
        fresh: bool,
        /// How many Kafka brokers; three go on without any one of them. Each number has data of its own.
        #[arg(long, default_value = "1", value_parser = ["1", "3"])]
        brokers: String,
    },
    /// Start the whole system beside everything else, follow some users through it, and stop it.
    Demo,
    /// Run every test on a real Kafka, Postgres and Redis.
    Test {
        /// With the long repeats and a longer soak, and write docs/last-run.md.
        #[arg(long, conflicts_with = "arguments")]
        full: bool,
        /// Arguments for `cargo test`, for example `-p user`.
        #[arg(last = true)]
        arguments: Vec<String>,
    },
    /// Load the system while random faults strike it, and say whether a promise was broken.
    Soak {
        #[arg(long, default_value_t = 30)]
        minutes: u64,
        /// The faults and what the clients do follow from it.
        #[arg(long, default_value_t = 1)]
        seed: u64,
    },
    /// Put known mistakes into a copy of the tree, one after another, and say which test notices each.
    Seeded {
        /// Names of patches in tests/seeded; all, if none is given.
        names: Vec<String>,
    },
    /// Renew the descriptions of queries in services/*/.sqlx, which let the services compile without a database.
    Prepare {
        /// Only say whether they are current.
        #[arg(long)]
        check: bool,
    },
    /// Formatting, lints, the rules of the tree, and whether .sqlx is current.
    Check,
}

#[tokio::main]
async fn main() -> ExitCode {
    // Postgres runs as another user when we are root, and must be able to read what we unpack for it.
    umask(Mode::from_bits_truncate(0o022));
    let outcome = run(Arguments::parse().command).await;
    // A test that was aborted could not end what it had started.
    let outcome = process::clean_leftovers().and(outcome);
    process::forget_run();
    match outcome {
        Ok(code) => code,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

async fn run(command: Command) -> Result<ExitCode> {
    let ended = process::clean_leftovers()?;
    if ended > 0 {
        say(format_args!("ended {ended} processes that an earlier run had left behind"));
    }
    match command {
        Command::Up { fresh, brokers } => commands::up::run(fresh, brokers == "3").await,
        Command::Demo => unless_told_to_end(commands::demo::run()).await,
        Command::Test { full: true, .. } => unless_told_to_end(commands::full::run()).await,
        Command::Test { arguments, .. } => unless_told_to_end(commands::test::run(&arguments)).await,
        Command::Soak { minutes, seed } => unless_told_to_end(commands::soak::run(minutes, seed)).await,
        Command::Seeded { names } => unless_told_to_end(commands::seeded::run(&names)).await,
        Command::Prepare { check } => unless_told_to_end(commands::prepare::run(check)).await,
        Command::Check => unless_told_to_end(commands::check::run()).await,
    }
}

/// Dropping the work ends every process it has started.
async fn unless_told_to_end(work: impl Future<Output = Result<ExitCode>>) -> Result<ExitCode> {
    tokio::select! {
        outcome = work => outcome,
        () = told_to_end() => bail!("stopped"),
    }
}

/// Ctrl-C, `kill`, or the terminal is closed.
async fn told_to_end() {
    let [mut interrupt, mut terminate, mut hangup] =
        [SignalKind::interrupt(), SignalKind::terminate(), SignalKind::hangup()]
            .map(|kind| signal(kind).expect("a handler for a signal can be installed"));
    tokio::select! {
        _ = interrupt.recv() => {}
        _ = terminate.recv() => {}
        _ = hangup.recv() => {}
    }
}
