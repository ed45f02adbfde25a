//! The end-to-end tests: real services on real components. `cargo xtask test` starts what they need.

#![allow(clippy::disallowed_methods, clippy::unwrap_used, reason = "tests")]

mod brokers;
mod clocks;
mod consuming;
mod dead_letters;
mod held;
mod journey;
mod local_stack;
mod mailing;
mod malformed;
mod outage;
mod problems;
mod rebuild;
mod registering;
mod relay;
mod republishing;
mod tracing;
mod view;
