//! The end-to-end tests: real services on real components. `cargo xtask test` starts what they need.

#![allow(clippy::disallowed_methods, clippy::unwrap_used, reason = "tests")]

mod consuming;
mod cut_off;
mod dead_letters;
mod deleted;
mod journey;
mod local_stack;
mod mailing;
mod malformed;
mod outage;
mod problems;
mod rebalancing;
mod registering;
mod relay;
mod relaying;
mod tracing;
mod view;
