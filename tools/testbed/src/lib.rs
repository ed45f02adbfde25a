//! The test bed: fetches real Kafka, Postgres and Redis, starts them as child processes together
//! with an SMTP sink, and makes sure that no process outlives the run. `cargo xtask` starts the
//! whole system with it, and the tests break single components with it. It is never shipped. It
//! knows the services only as programs with environment variables and ports.
//!
//! Reading order: `process` (children that end with us), `fetch`, one file per component, `stack`,
//! `services`, `system`, `laboratory`, `testing`.

#![allow(
    clippy::disallowed_methods,
    reason = "the rules on clocks, ids and environment protect the services; a developer's tool reads all three"
)]

pub mod fetch;
pub mod kafka;
pub mod laboratory;
pub mod mail_front;
pub mod paths;
pub mod ports;
pub mod postgres;
pub mod process;
pub mod redis;
pub mod say;
pub mod secured;
pub mod services;
pub mod smtp_sink;
pub mod stack;
pub mod system;
pub mod testing;
pub mod tls;
pub mod tools;
