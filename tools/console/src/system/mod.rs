//! What the services say about themselves on their admin ports.

mod openmetrics;
mod operations;
mod processes;
mod watch;

#[cfg(test)]
pub use openmetrics::Samples;
pub use operations::{Act, Acted, Letter, Look, Operations, Order};
pub use processes::{Answer, Process};
pub use watch::{Survey, watch};
