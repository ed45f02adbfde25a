//! The options of `analytics rebuild`, and its output.

use shared::platform::settings::number;

/// The subcommand `rebuild`.
#[derive(clap::Args, Clone)]
pub struct Rebuild {
    /// Swap even if the rebuilt tables differ from the live ones. After a change of a projection
    /// they differ on purpose; check the printed differences first.
    #[arg(long)]
    pub accept_differences: bool,
    /// Swap even if Kafka has deleted events that the live model contains. Their effects are lost.
    #[arg(long)]
    pub accept_lost_history: bool,
    /// How long to wait until the running service has read as far as the rebuild, in seconds.
    #[arg(long, default_value_t = 30, value_parser = number::<u64>(0..=86_400))]
    pub wait_seconds: u64,
}

#[expect(clippy::print_stdout, reason = "the output of the subcommand")]
pub fn print_line(line: &str) {
    println!("{line}");
}
