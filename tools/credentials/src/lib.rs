//! Certificates and passwords for a secured Waybill on one machine: for `cargo xtask up --secure`,
//! for compose.secure.yaml and for the tests. They are made here and never committed.

#![allow(
    clippy::disallowed_methods,
    reason = "the rules on clocks and environment protect the services; a developer's tool reads both"
)]

mod authority;
mod passwords;
pub mod compose;

pub use authority::{Authority, Certificate};
pub use passwords::Passwords;
