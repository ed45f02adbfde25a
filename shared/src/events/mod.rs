//! The contract: what travels over Kafka. Plain data, no I/O. A service writes an event with
//! [`crate::messaging::outbox::publish`], and several with
//! [`publish_all`](crate::messaging::outbox::publish_all).

mod action;
mod address;
mod email;
mod envelope;
mod topics;
mod user;

pub use action::{OperatorAction, Outcome as ActionOutcome, Step as ActionStep};
pub use address::check_address;
pub use email::{Delivery, EmailEvent, Undelivered};
pub(crate) use envelope::trace_context;
pub use envelope::{Cause, Envelope, MAX_HEADERS, in_utc, mint_id, now};
pub use topics::{Kind, Topic, key_hash};
pub use user::{Profile, UserEvent, UserRef, UserState};

use serde::{Serialize, de::DeserializeOwned};
use uuid::Uuid;

/// What a topic carries. Each topic has one Rust type; the header `ce_type` distinguishes the event
/// types within it.
pub trait Event: Sized + Send + Sync + 'static {
    /// The topic of these events.
    const TOPIC: Topic;

    /// The event's type (`ce_type`) and its data. No data is a tombstone, which only a
    /// [`Kind::State`] topic may carry.
    fn encode(&self) -> (&'static str, Option<Vec<u8>>);

    /// Reads what [`Event::encode`] wrote, in this release or in an older or newer one. Unknown
    /// fields are ignored. `Ok(None)`: this release does not know the type; the consumer skips the
    /// record and counts it.
    ///
    /// # Errors
    /// The data does not have the form that `kind` requires. The record becomes a dead letter.
    fn decode(kind: &str, data: Option<&[u8]>) -> Result<Option<Self>, DecodeError>;

    /// The user whom the event concerns, for log lines. `key` is the record's key.
    fn user(&self, key: Uuid) -> Uuid;

    /// One sample of every variant, about this user.
    #[cfg(feature = "test-support")]
    fn samples(user: Uuid) -> Vec<Self>;
}

/// Why a record could not be read. The reason is written to a header of the dead letter and to the
/// log. So it names the field and the violated rule, and never quotes a value: a value may be
/// personal data.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("{field}: {reason}")]
pub struct DecodeError {
    /// The header, `key` or `data`.
    pub field: &'static str,
    /// What is wrong with it.
    pub reason: &'static str,
}

impl DecodeError {
    pub(crate) const fn new(field: &'static str, reason: &'static str) -> Self {
        Self { field, reason }
    }
}

fn to_json<T: Serialize>(data: &T) -> Vec<u8> {
    serde_json::to_vec(data).expect("events are plain structs with string keys, which always serialise")
}

/// Keeps only the class of an error: messages of `serde_json` quote the offending value.
fn from_json<T: DeserializeOwned>(data: Option<&[u8]>) -> Result<T, DecodeError> {
    use serde_json::error::Category;
    let data = data.ok_or(DecodeError::new("data", "null, but facts always carry data"))?;
    serde_json::from_slice(data).map_err(|error| {
        DecodeError::new(
            "data",
            match error.classify() {
                Category::Eof => "incomplete JSON",
                Category::Syntax | Category::Io => "not JSON",
                Category::Data => "JSON that does not match its type: a field is missing or has another type",
            },
        )
    })
}
