//! The end-to-end tests: real services on real components. `cargo xtask test` starts what they need.

#![allow(clippy::disallowed_methods, clippy::unwrap_used, reason = "tests")]

mod journey;
