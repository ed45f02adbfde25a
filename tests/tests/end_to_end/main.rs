//! The end-to-end tests: real services on real components. `cargo xtask test` starts what they need.

#![allow(clippy::disallowed_methods, clippy::unwrap_used, reason = "tests")]

mod breaker;
mod brokers;
mod clocks;
mod consuming;
mod counting;
mod cut_off;
mod dead_letters;
mod deleted;
mod held;
mod journey;
mod leases;
mod local_stack;
mod mailing;
mod malformed;
mod outage;
mod problems;
mod queries;
mod rebalancing;
mod rebuild;
mod redriving;
mod registering;
mod relay;
mod relaying;
mod republishing;
mod tracing;
mod unwritable;
mod view;
