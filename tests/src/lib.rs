//! The harness of the end-to-end tests. It runs the real services as processes on real components.
//!
//! [`System`] is one Waybill for one test. Its facets are `users` (the public APIs), `kafka`,
//! `mail`, `stores` (Postgres and Valkey) and `processes`. A [`judge::Judge`] records a run and
//! checks it.
//!
//! Nothing in here sleeps instead of waiting for a condition, and every wait has a deadline.

#![allow(
    clippy::disallowed_methods,
    clippy::unwrap_used,
    clippy::missing_panics_doc,
    reason = "test support: a panic is how a test fails"
)]

pub mod alerts;
pub mod browser;
pub mod certificates;
pub mod checker;
pub mod clock;
pub mod console;
pub mod http;
pub mod identity;
pub mod judge;
pub mod kafka;
pub mod load;
pub mod mail;
pub mod mail_front;
pub mod otlp;
pub mod pooler;
pub mod processes;
pub mod proxy;
pub mod record;
pub mod services;
pub mod soak;
pub mod stores;
pub mod synchronous;
pub mod system;
pub mod tap;
pub mod up;
pub mod users;
pub mod web;
mod waiting;

pub use system::System;
pub use waiting::{DEADLINE, eventually, eventually_contains, eventually_eq, eventually_reaches, throughout, within};

/// The parameters of a test that repeats itself: `usual`, or `full` in `cargo xtask test --full`.
pub fn repeats(usual: &'static [u32], full: &'static [u32]) -> impl Iterator<Item = u32> {
    let repeats = if std::env::var_os("WAYBILL_FULL").is_some() { full } else { usual };
    repeats.iter().copied()
}
