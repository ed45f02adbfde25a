//! The journey of an event: [`outbox`] → [`relay`] → (topic) → [`consumer`] → [`handler`] or
//! [`inbox`] → [`dead_letters`]. [`replay`] reads a topic again from its beginning.

mod kafka;
mod errors;
pub mod outbox;
mod topics;
mod relay;
mod record;
mod handler;
mod inbox;
mod dead_letters;
mod consumer;
mod replay;

pub(crate) use consumer::{BATCH_RECORDS, BlockedRecords, Consumer, ConsumerSetup};
pub use consumer::{BreakerConfig, DeadLetterRecord, dead_letter};
pub use dead_letters::{ListDeadLetters, Redrive, list_dead_letters, redrive};
pub(crate) use dead_letters::{count_open_dead_letters, declared_topic as dead_letter_topic};
pub use handler::{EndOfPartition, Failure, Handler, Outcome, Recorded};
pub use inbox::{Inbox, Projection};
pub use kafka::KafkaConfig;
pub(crate) use kafka::{report_unknown_connection, watch_connection, watch_files};
pub use record::{Coordinates, Record, headers};
pub(crate) use relay::{Relay, listen as listen_for_wake};
pub use relay::{RelayConfig, Wake};
pub use replay::Replay;
pub(crate) use topics::{Declared, create_now as create_topics_now, ensure as ensure_topics, watch as watch_topics};
