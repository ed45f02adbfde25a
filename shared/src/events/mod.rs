//! The contract: what travels over Kafka. Plain data, no I/O. From here an event goes to [`crate::messaging::outbox`].

mod email;
mod envelope;
mod topics;
mod user;

pub use email::{Delivery, EmailEvent, Undelivered};
pub use envelope::{Envelope, mint_id, now};
pub use topics::{Kind, Topic};
pub use user::{Profile, UserEvent, UserRef, UserState};

use serde::{Serialize, de::DeserializeOwned};

/// What a topic carries. One Rust type per topic; the types of event in it are told apart by the header `ce_type`.
pub trait Event: Sized + Send + Sync + 'static {
    /// Where events of this kind travel.
    const TOPIC: Topic;

    /// The event's type (`ce_type`) and its data. No data is a tombstone, which only a [`Kind::State`] topic may carry.
    fn encode(&self) -> (&'static str, Option<Vec<u8>>);

    /// Reads what [`Event::encode`] wrote, possibly in an older or newer release: unknown fields are ignored.
    /// `Ok(None)` is a type this release does not know: the consumer skips and counts it.
    ///
    /// # Errors
    /// The data cannot be read as what `kind` says it is. The record becomes a dead letter.
    fn decode(kind: &str, data: Option<&[u8]>) -> Result<Option<Self>, DecodeError>;
}

/// Why a record could not be read. It ends in a header of the dead letter and in the log, so it carries the place and the
/// rule, never a value: a value may be personal data.
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

/// `serde_json`'s own messages quote the offending value, so only the class of the error is kept.
fn from_json<T: DeserializeOwned>(data: Option<&[u8]>) -> Result<T, DecodeError> {
    use serde_json::error::Category;
    let data = data.ok_or(DecodeError::new("data", "null, but facts always carry data"))?;
    serde_json::from_slice(data).map_err(|error| {
        DecodeError::new(
            "data",
            match error.classify() {
                Category::Eof => "JSON that ends too early",
                Category::Syntax | Category::Io => "not JSON",
                Category::Data => "JSON, but not the shape of its type: a field is missing or has another type",
            },
        )
    })
}
