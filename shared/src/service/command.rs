//! The subcommands that services have in common. A service flattens them into its own.

use clap::Subcommand;

use crate::messaging::{ListDeadLetters, Redrive};

/// Subcommands of every service.
#[derive(Subcommand, Clone, Copy, Debug)]
pub enum Command {
    /// Run the service (the default).
    Serve,
    /// Ask the running service at /status whether it waits for anything. Exits with status 0 if it
    /// does not.
    Healthcheck,
}

/// Subcommands of a service that consumes events.
#[derive(Subcommand, Clone, Debug)]
pub enum ConsumerCommand {
    /// List the open dead letters.
    DeadLetters(ListDeadLetters),
    /// Hand the open dead letters to their handlers again.
    Redrive(Redrive),
}
