//! What a developer runs, as a library: it fetches real Kafka, Postgres and Redis, starts them as child processes beside an SMTP
//! sink, and sees to it that nothing outlives us. `cargo xtask` (main.rs) starts the whole system with it; the tests break single
//! parts with it. It is never shipped, and it knows the services only as programs with environment variables and ports.
//!
//! Reading order: `process` (children that die with us), `fetch`, one file per component, `stack`, `services`, `system`, `testing`.

#![allow(
    clippy::disallowed_methods,
    reason = "the rules on clocks, ids and environment protect the services; a developer's tool reads all three"
)]

pub mod fetch;
pub mod kafka;
pub mod paths;
pub mod ports;
pub mod postgres;
pub mod process;
pub mod redis;
pub mod say;
pub mod services;
pub mod smtp_sink;
pub mod stack;
pub mod system;
pub mod testing;
