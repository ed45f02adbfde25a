//! What the services say about themselves on their admin ports.

mod openmetrics;
mod processes;
mod watch;

#[cfg(test)]
pub use openmetrics::Samples;
pub use processes::{Answer, Process};
pub use watch::{Survey, watch};
