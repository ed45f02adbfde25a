//! A record as a handler gets it.

use std::fmt;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::str::FromStr;

use rdkafka::Message;
use rdkafka::message::{Header, Headers};

use crate::events::{DecodeError, Envelope, Event};

/// The place of a record in Kafka. Its text form, `topic-partition-offset`, is the key of the
/// record's dead letter.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Coordinates {
    pub topic: String,
    pub partition: i32,
    pub offset: i64,
}

impl Coordinates {
    pub(crate) fn of(message: &impl Message) -> Self {
        Self { topic: message.topic().to_owned(), partition: message.partition(), offset: message.offset() }
    }
}

impl fmt::Display for Coordinates {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}-{}-{}", self.topic, self.partition, self.offset)
    }
}

impl FromStr for Coordinates {
    type Err = &'static str;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        // Split from the right, because the name of a topic may contain the separator.
        let mut fields = text.rsplitn(3, '-');
        let offset = fields.next().and_then(|number| number.parse().ok());
        let partition = fields.next().and_then(|number| number.parse().ok());
        match (fields.next(), partition, offset) {
            (Some(topic), Some(partition), Some(offset)) if !topic.is_empty() => {
                Ok(Self { topic: topic.to_owned(), partition, offset })
            }
            _ => Err("not topic-partition-offset, as `dead-letters` prints it"),
        }
    }
}

/// One decoded event.
pub struct Record<E> {
    pub event: E,
    pub envelope: Envelope,
    pub coordinates: Coordinates,
    /// The next offset of the partition before this record is handled. A handler that stores its
    /// own position compares it with this one. Offsets have gaps (compaction, transaction markers),
    /// so it can differ from `coordinates.offset`. `None` in a redrive, which does not follow the
    /// order of the partition.
    pub expected_position: Option<i64>,
}

impl<E: Event> Record<E> {
    /// `Ok(None)`: this release does not know the type of the event.
    pub(crate) fn decode(
        key: Option<&[u8]>,
        message: &impl Message,
        coordinates: Coordinates,
    ) -> Result<Option<Self>, DecodeError> {
        let headers: Result<Vec<_>, _> = headers(message).map(|header| header.map(|h| (h.key, h.value))).collect();
        let envelope = Envelope::parse(key, &headers?)?;
        let event = E::decode(&envelope.kind, message.payload())?;
        Ok(event.map(|event| Self { event, envelope, coordinates, expected_position: None }))
    }

    /// A record as a redrive would deliver it: in partition 0, at the offset `version`, with a new
    /// event id.
    #[cfg(any(test, feature = "test-support"))]
    pub fn sample(key: uuid::Uuid, version: i64, event: E) -> Self {
        let envelope = Envelope {
            id: crate::events::mint_id(),
            kind: event.encode().0.to_owned(),
            source: "/test".to_owned(),
            key,
            version,
            time: crate::events::now(),
            cause: crate::events::Cause::command(None),
            traceparent: None,
            tracestate: None,
        };
        let coordinates = Coordinates { topic: E::TOPIC.name.to_owned(), partition: 0, offset: version };
        Self { event, envelope, coordinates, expected_position: None }
    }
}

/// A record's headers. rdkafka panics on a name that is not UTF-8, which any client may write to a
/// topic. This function turns the panic into an error.
pub(super) fn headers<M: Message>(message: &M) -> impl Iterator<Item = Result<Header<'_, &[u8]>, DecodeError>> {
    message.headers().into_iter().flat_map(|headers| {
        (0..headers.count()).map(|index| {
            catch_unwind(AssertUnwindSafe(|| headers.get(index)))
                .map_err(|_| DecodeError::new("headers", "a name that is not UTF-8"))
        })
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn coordinates_are_parsed_from_their_text_form() {
        let coordinates = Coordinates { topic: "a-b.v1".to_owned(), partition: 3, offset: 17 };
        assert_eq!(coordinates.to_string(), "a-b.v1-3-17");
        assert_eq!(coordinates.to_string().parse(), Ok(coordinates));
        for wrong in ["", "a", "a-1", "-1-2", "a-b-1", "a-1-b", "a-1-"] {
            assert!(wrong.parse::<Coordinates>().is_err(), "{wrong}");
        }
    }
}
