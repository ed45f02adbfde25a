//! `cargo xtask bench` builds the services and runs this program.

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::Result;
use bench::{Job, Machine, Programs, Size};
use clap::{Parser, Subcommand};
use testbed::process;
use testbed::say::say;

#[derive(Parser)]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Run jobs, all of them by default.
    Run {
        /// The folder with the services' programs.
        #[arg(long)]
        programs: PathBuf,
        #[arg(long)]
        quick: bool,
        jobs: Vec<Job>,
    },
    /// The program that the job `read` is compared with.
    ServeProfiles { port: u16, valkey: String, prefix: String },
}

#[tokio::main]
async fn main() -> ExitCode {
    let outcome = run(Arguments::parse().command).await;
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
    let (programs, quick, jobs) = match command {
        Command::Run { programs, quick, jobs } => (programs, quick, jobs),
        Command::ServeProfiles { port, valkey, prefix } => {
            bench::serve_profiles(port, valkey, prefix).await?;
            return Ok(ExitCode::SUCCESS);
        }
    };
    let all = jobs.is_empty();
    let jobs = if all { Job::ALL.to_vec() } else { jobs };
    let size = if quick { Size::Quick } else { Size::Full };
    let machine = Machine::look()?;
    say(&machine);
    let programs = Programs { services: &programs, bench: &std::env::current_exe()? };
    let reports = bench::run(&jobs, size, programs, |report| say(report)).await?;
    bench::write(&machine, size, &reports, all)?;
    Ok(ExitCode::SUCCESS)
}
