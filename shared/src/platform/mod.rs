//! What any process needs, whether it handles events or not.

pub mod database;
pub mod health;
pub mod http;
pub mod metrics;
pub mod telemetry;
