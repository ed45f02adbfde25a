//! The subcommands that services have in common. A service flattens them into its own.

use clap::Subcommand;

/// Subcommands of every service.
#[derive(Subcommand, Clone, Copy, Debug)]
pub enum Command {
    /// Run the service (the default).
    Serve,
    /// Ask the running service at /status whether it waits for anything. Exits with status 0 if it
    /// does not.
    Healthcheck,
    /// Create the topics of this service as they are declared, then exit. Run it as an operator who
    /// may create topics, so that the service can run with MANAGE_TOPICS=false. Safe to repeat.
    CreateTopics,
}

/// Subcommands of a service that has a database.
#[derive(Subcommand, Clone, Copy, Debug)]
pub enum DatabaseCommand {
    /// Apply the migrations of this release, then exit. Give it the database URL of the role that
    /// owns the tables. The role of the running service cannot change tables. Safe to repeat, and
    /// to run while older releases run.
    Migrate,
}
