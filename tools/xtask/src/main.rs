//! `cargo xtask`: the commands that a developer runs. Each command is a file under `commands`. What
//! they share is the library `testbed`.

#![allow(
    clippy::disallowed_methods,
    reason = "the rules on clocks, ids and environment protect the services; a developer's tool reads all three"
)]

mod commands;
mod patches;
mod signals;
mod tree;

use std::future::Future;
use std::process::ExitCode;

use anyhow::{Result, bail};
use clap::{Parser, Subcommand};
use nix::sys::stat::{Mode, umask};
use testbed::process;
use testbed::say::say;

use commands::acls::Acls;
use commands::prepare;
use commands::up::{Brokers, Variant};
use signals::termination_signal;

/// Runs, tests and checks Waybill on this machine, without Docker.
///
/// The first run of most commands downloads Kafka, Postgres and Redis with Maven (about 90 MB) and
/// compiles the services. Both results are kept below target/.
#[derive(Parser)]
#[command(name = "cargo xtask", bin_name = "cargo xtask")]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Start the whole system on its published ports and keep it running until Ctrl-C.
    ///
    /// A process that ends is restarted. The data is kept from run to run. The console has a
    /// laboratory that breaks parts of the system.
    Up {
        /// Delete the data of earlier runs first.
        #[arg(long)]
        fresh: bool,
        /// Number of Kafka brokers. With three, the system survives the loss of any one. Each
        /// number of brokers has its own data.
        #[arg(long, value_enum, default_value_t)]
        brokers: Brokers,
        /// Ask for TLS and a login everywhere, and let each service do on Kafka only what
        /// `cargo xtask acls --table` lists. Has its own data, certificates and passwords.
        #[arg(long, conflicts_with = "brokers")]
        secure: bool,
        /// Use free ports, so that it disturbs no system that is already running, and delete the
        /// data at the end.
        #[arg(long, conflicts_with_all = ["brokers", "secure", "fresh"])]
        temporary: bool,
    },
    /// Show or grant what each service may do on Kafka. It follows from tools/topology.
    Acls(Acls),
    /// Write the certificates and passwords for compose.secure.yaml to target/secure.
    ///
    /// Those that exist are kept.
    Credentials,
    /// Start the whole system on free ports, follow three users through it, and stop it.
    ///
    /// It does not disturb a system that is already running.
    Demo,
    /// Run every test on a real Kafka, Postgres and Redis.
    Test {
        /// Run the tests with more repetitions and a longer soak, and write docs/last-run.md.
        #[arg(long, conflicts_with = "arguments")]
        full: bool,
        /// Arguments for `cargo test`, for example `-p user`.
        #[arg(last = true)]
        arguments: Vec<String>,
    },
    /// Put the system under load, inject random faults, and report violated guarantees.
    Soak {
        /// How long to run.
        #[arg(long, default_value_t = 30)]
        minutes: u64,
        /// Determines the faults and the requests of the clients.
        #[arg(long, default_value_t = 1)]
        seed: u64,
    },
    /// Apply known bugs to a copy of the source tree, one at a time, and report which tests catch
    /// each.
    Seeded {
        /// Names of patches in tests/seeded. Default: all.
        names: Vec<String>,
    },
    /// Fill the databases with 100,000 and with a million users, and compare what each statement of
    /// the services reads.
    ///
    /// Fails if one reads more than 1.5 times as much with ten times the users.
    Size,
    /// Measure how fast the release programs are, relative to what bare clients reach on the same
    /// components in the same run.
    ///
    /// Checks after each job that nothing was lost, doubled or reordered. Writes
    /// target/bench/results.json, and docs/performance.md after a full run of all jobs. Stop other
    /// programs first.
    Bench {
        /// Measure one slice of each side, with a tenth of the size.
        #[arg(long)]
        quick: bool,
        /// Jobs to run. Default: all.
        jobs: Vec<String>,
    },
    /// Put Waybill and a version of it that calls its receivers synchronously under the same load
    /// and the same faults.
    ///
    /// Prints a table for each scenario and writes target/compare/results.json, and
    /// docs/compared.md after a full run, which takes about half an hour. Stop other programs
    /// first.
    Compare {
        /// Take a sixth of the time for each scenario.
        #[arg(long)]
        quick: bool,
        /// Measure nothing: write docs/compared.md again from the results of the last full run.
        #[arg(long, conflicts_with = "quick")]
        page: bool,
    },
    /// Write docs/metrics.md from what the running services say about their metrics.
    Metrics,
    /// Write the pictures of the console in docs/console. Needs Chromium.
    Screenshots,
    /// Write docs/mistakes.md from the patches in tests/seeded.
    Mistakes,
    /// Update services/*/.sqlx, which describe the SQL queries so that the services compile without
    /// a database.
    Prepare {
        /// Change nothing and fail if a description is out of date.
        #[arg(long)]
        check: bool,
    },
    /// Check formatting, lints, the rules of the source tree, licences of dependencies, and
    /// services/*/.sqlx.
    Check,
}

#[tokio::main]
async fn main() -> ExitCode {
    // When we are root, Postgres runs as another user, which must be able to read what we unpack.
    umask(Mode::from_bits_truncate(0o022));
    let outcome = run(Arguments::parse().command).await;
    // A test process that was aborted may have left children running.
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
        say(format_args!("Ended {ended} processes that an earlier run had left running."));
    }
    match command {
        Command::Up { fresh, brokers, secure, temporary } => {
            commands::up::run(fresh, Variant::of(brokers, secure, temporary)).await
        }
        Command::Acls(options) => unless_terminated(commands::acls::run(options)).await,
        Command::Credentials => commands::credentials::run(),
        Command::Demo => unless_terminated(commands::demo::run()).await,
        Command::Test { full: true, .. } => unless_terminated(commands::full::run()).await,
        Command::Test { arguments, .. } => unless_terminated(commands::test::run(&arguments)).await,
        Command::Soak { minutes, seed } => unless_terminated(commands::soak::run(minutes, seed)).await,
        Command::Seeded { names } => unless_terminated(commands::seeded::run(&names)).await,
        Command::Size => unless_terminated(commands::size::run()).await,
        Command::Bench { quick, jobs } => unless_terminated(commands::bench::run(&jobs, quick)).await,
        Command::Compare { page: true, .. } => unless_terminated(commands::compare::write_page_again()).await,
        Command::Compare { quick, .. } => unless_terminated(commands::compare::run(quick)).await,
        Command::Metrics => unless_terminated(commands::metrics::run()).await,
        Command::Screenshots => unless_terminated(commands::screenshots::run()).await,
        Command::Mistakes => commands::mistakes::run(),
        Command::Prepare { check } => {
            let mode = if check { prepare::Mode::Check } else { prepare::Mode::Update };
            unless_terminated(prepare::run(mode)).await
        }
        Command::Check => unless_terminated(commands::check::run()).await,
    }
}

/// Does the work, or drops it when a signal arrives. Dropping it kills every process that it has
/// started.
async fn unless_terminated(work: impl Future<Output = Result<ExitCode>>) -> Result<ExitCode> {
    tokio::select! {
        outcome = work => outcome,
        () = termination_signal() => bail!("stopped by a signal"),
    }
}
