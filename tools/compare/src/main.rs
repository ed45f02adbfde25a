//! `cargo xtask compare` builds both sides, starts the components, and runs this program.

use std::process::ExitCode;

use anyhow::Result;
use clap::Parser;
use compare::{Plan, Size};
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use testbed::process;

#[derive(Parser)]
struct Arguments {
    #[arg(long)]
    quick: bool,
    #[arg(long, conflicts_with = "quick")]
    page: bool,
}

#[tokio::main]
async fn main() -> ExitCode {
    let outcome = run(&Arguments::parse()).await;
    let outcome = process::clean_leftovers().and(outcome);
    process::forget_run();
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

async fn run(arguments: &Arguments) -> Result<()> {
    if arguments.page {
        return compare::write_page_again();
    }
    raise_limit_of_files()?;
    let size = if arguments.quick { Size::Quick } else { Size::Full };
    compare::write(&compare::run(Plan::of(size)).await?)
}

/// A burst opens many connections: here, and in the programs, which inherit the limit.
fn raise_limit_of_files() -> Result<()> {
    let (_, hard) = getrlimit(Resource::RLIMIT_NOFILE)?;
    Ok(setrlimit(Resource::RLIMIT_NOFILE, hard, hard)?)
}
