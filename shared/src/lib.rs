//! What every Waybill service shares, in the order in which an event travels:
//!
//! - [`events`]: the contract. Plain data, no I/O.
//! - [`messaging`]: the journey. outbox → relay → (topic) → consumer → handler or inbox → dead letter → redrive.
//! - [`service`]: the process. Configuration, database, telemetry, health, shutdown: what every `main.rs` calls.
//!
//! The line between this crate and a service: `shared` knows that events travel and how; a service knows what an event
//! means to it. So there is no service's name, business table, route or template in here. It owns two tables, `outbox` and
//! `inbox`, whose DDL stands in the migrations of each service that has one.

pub mod events;
pub mod fault;
pub mod messaging;
pub mod service;
