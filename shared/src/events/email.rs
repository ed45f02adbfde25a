//! What the email service says about deliveries. Codes only: SMTP reply texts carry addresses.

use serde::{Deserialize, Serialize};
use uuid::Uuid;

use super::{DecodeError, Event, Topic, from_json, to_json};

/// What became of a mail. The record's key is the delivery's id, so a delivery's facts keep their order.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum EmailEvent {
    /// An SMTP server took the mail over (answered 250 to DATA).
    Sent(Delivery),
    /// An SMTP server refused it for good.
    Failed(Undelivered),
}

/// Which mail, and whose.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Delivery {
    pub delivery_id: Uuid,
    pub user_id: Uuid,
    /// The template's name, for example `welcome`.
    pub template: String,
}

/// A delivery and the reply code (RFC 5321 §4.2) that ended it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Undelivered {
    #[serde(flatten)]
    pub delivery: Delivery,
    pub smtp_code: u16,
}

impl Event for EmailEvent {
    const TOPIC: Topic = Topic::EMAIL_EVENTS;

    fn encode(&self) -> (&'static str, Option<Vec<u8>>) {
        match self {
            Self::Sent(delivery) => ("email.sent", Some(to_json(delivery))),
            Self::Failed(undelivered) => ("email.failed", Some(to_json(undelivered))),
        }
    }

    fn decode(kind: &str, data: Option<&[u8]>) -> Result<Option<Self>, DecodeError> {
        Ok(Some(match kind {
            "email.sent" => Self::Sent(from_json(data)?),
            "email.failed" => Self::Failed(from_json(data)?),
            _ => return Ok(None),
        }))
    }
}
