//! Reads the status and the metrics of the services on their admin ports, and calls their public
//! APIs.

mod openmetrics;
mod operations;
mod processes;
mod users;
mod watch;

#[cfg(test)]
pub use openmetrics::Samples;
pub use operations::{Act, Acted, Letter, Look, Operations, Order};
pub use processes::{Answer, Process};
pub use users::Users;
pub use watch::{Survey, watch};
