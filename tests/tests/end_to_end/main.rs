//! The end-to-end tests: real services on real components. `cargo xtask test` starts what they need.

#![allow(clippy::disallowed_methods, clippy::unwrap_used, reason = "tests")]

mod breaker;
mod consuming;
mod counting;
mod dead_letters;
mod journey;
mod local_stack;
mod mailing;
mod malformed;
mod outage;
mod problems;
mod redriving;
mod registering;
mod relay;
mod tracing;
mod unwritable;
mod view;
