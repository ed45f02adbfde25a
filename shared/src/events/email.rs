//! Events of the email service about its deliveries. They carry reply codes and never reply texts,
//! because SMTP reply texts contain addresses.

use serde::{Deserialize, Serialize};
use uuid::Uuid;

use super::{DecodeError, Event, Topic, from_json, to_json};

/// How a delivery ended. The record's key is the delivery's id, so all facts of a delivery are in
/// one partition, in order.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum EmailEvent {
    /// An SMTP server accepted the mail: it answered 250 after DATA.
    Sent(Delivery),
    /// An SMTP server refused the mail permanently, or deferred it until it was too old.
    Failed(Undelivered),
}

/// The delivery that an event is about.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Delivery {
    pub delivery_id: Uuid,
    pub user_id: Uuid,
    /// The template's name, for example `welcome`.
    pub template: String,
}

/// A delivery that failed, and the reply code (RFC 5321 §4.2) that it failed with.
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

    fn user(&self, _key: Uuid) -> Uuid {
        match self {
            Self::Sent(delivery) => delivery.user_id,
            Self::Failed(undelivered) => undelivered.delivery.user_id,
        }
    }

    #[cfg(feature = "test-support")]
    fn samples(user: Uuid) -> Vec<Self> {
        let delivery = Delivery { delivery_id: super::mint_id(), user_id: user, template: "welcome".to_owned() };
        let undelivered = Undelivered { delivery: delivery.clone(), smtp_code: 550 };
        vec![Self::Sent(delivery), Self::Failed(undelivered)]
    }
}
