//! The journey of an event: [`outbox`] → [`relay`] → (topic) → [`consumer`] → [`handler`] or
//! [`inbox`] → [`dead_letters`]. [`replay`] reads a topic again from its beginning. [`admin`] has
//! what operators do on the admin port, and [`actions`] the record of it.

mod kafka;
mod errors;
mod acknowledged;
mod reader;
pub mod outbox;
mod topics;
mod relay;
mod record;
mod handler;
mod inbox;
mod dead_letters;
mod consumer;
mod replay;
mod actions;
mod admin;

pub(crate) use actions::declared_topic as actions_topic;
pub use admin::AdminCommand;
pub(crate) use admin::{Operations, routes as admin_routes};
pub use consumer::BreakerConfig;
pub(crate) use consumer::{BATCH_RECORDS, Consumer, ConsumerSetup};
pub(crate) use dead_letters::declared_topic as dead_letter_topic;
pub use handler::{EndOfPartition, Failure, Handler, Outcome, Recorded};
pub use inbox::{Inbox, Projection};
pub use kafka::KafkaConfig;
pub(crate) use kafka::{report_unknown_connection, watch_connection, watch_files};
pub use record::{Coordinates, Record, headers};
pub(crate) use relay::{Relay, listen as listen_for_wake};
pub use relay::{RelayConfig, Wake};
pub use replay::Replay;
pub(crate) use topics::{Declared, Topics};
