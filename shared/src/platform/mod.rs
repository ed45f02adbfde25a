//! What any process needs, whether it handles events or not.

pub mod settings;
pub mod secret;
pub mod tls;
pub mod metrics;
mod traces;
mod sampling;
mod span_fields;
pub mod telemetry;
pub mod health;
pub mod batching;
pub mod database;
pub mod problem;
pub mod admin;
pub mod preconditions;
mod fetch;
pub mod access;
pub mod http;
pub mod server;
