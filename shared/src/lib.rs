//! The code that all Waybill services share. The modules are layers, in the order in which they
//! build on each other:
//!
//! - [`events`]: the contract. What travels over Kafka, as plain data without I/O.
//! - [`platform`]: what any process needs. Database pool, health, HTTP, metrics, telemetry.
//! - [`messaging`]: the journey of an event. Outbox → relay → (topic) → consumer → handler or inbox
//!   → dead letter → redrive.
//! - [`service`]: what every `main.rs` calls. It composes the layers below.
//!
//! A module imports only modules that come before it in this list; [`fault`] may be imported by
//! all.
//!
//! `shared` moves events and does not interpret them. A service decides what an event means. So
//! this crate names no service, business table, route or template. It owns two tables, `outbox` and
//! `inbox`; each service that has one creates it in its own migrations.

pub mod events;
pub mod fault;
pub mod messaging;
pub mod platform;
pub mod service;
