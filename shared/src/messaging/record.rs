//! A record as a handler gets it.

use std::fmt;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::str::FromStr;

use rdkafka::Message;
use rdkafka::message::{Header, Headers, OwnedMessage};

use crate::events::{DecodeError, Envelope, Event};

/// Where a record stands in Kafka. Its text form, `topic-partition-offset`, is the key of its dead letter.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Source {
    pub topic: String,
    pub partition: i32,
    pub offset: i64,
}

impl fmt::Display for Source {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}-{}-{}", self.topic, self.partition, self.offset)
    }
}

impl FromStr for Source {
    type Err = &'static str;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        // From the right: a topic's name may hold the sign too.
        let mut parts = text.rsplitn(3, '-');
        let (offset, partition) =
            (parts.next().and_then(|n| n.parse().ok()), parts.next().and_then(|n| n.parse().ok()));
        match (parts.next(), partition, offset) {
            (Some(topic), Some(partition), Some(offset)) if !topic.is_empty() => {
                Ok(Self { topic: topic.to_owned(), partition, offset })
            }
            _ => Err("not topic-partition-offset, as `dead-letters` lists it"),
        }
    }
}

impl Source {
    pub(crate) fn of(message: &OwnedMessage) -> Self {
        Self { topic: message.topic().to_owned(), partition: message.partition(), offset: message.offset() }
    }
}

/// One event, decoded.
pub struct Record<E> {
    pub event: E,
    pub envelope: Envelope,
    pub source: Source,
    /// The position that the partition's reader had reached before this record: what a handler that stores its own position
    /// compares with. Offsets have gaps (compaction, transaction markers), so it is not `source.offset`. `None` in a redrive,
    /// which stands outside the partition's order.
    pub after: Option<i64>,
}

impl<E: Event> Record<E> {
    /// `Ok(None)`: a type of event that this release does not know.
    pub(crate) fn decode(
        key: Option<&[u8]>,
        message: &OwnedMessage,
        source: Source,
    ) -> Result<Option<Self>, DecodeError> {
        let headers: Result<Vec<_>, _> = headers(message).map(|header| header.map(|h| (h.key, h.value))).collect();
        let envelope = Envelope::parse(key, &headers?)?;
        let event = E::decode(&envelope.kind, message.payload())?;
        Ok(event.map(|event| Self { event, envelope, source, after: None }))
    }
}

/// A record's headers. rdkafka panics on a name that is not UTF-8, which anybody may write to a topic; here it is an error.
pub(super) fn headers(message: &OwnedMessage) -> impl Iterator<Item = Result<Header<'_, &[u8]>, DecodeError>> {
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
    fn a_source_is_read_as_it_is_written() {
        let source = Source { topic: "a-b.v1".to_owned(), partition: 3, offset: 17 };
        assert_eq!(source.to_string(), "a-b.v1-3-17");
        assert_eq!(source.to_string().parse(), Ok(source));
        for wrong in ["", "a", "a-1", "-1-2", "a-b-1", "a-1-b", "a-1-"] {
            assert!(wrong.parse::<Source>().is_err(), "{wrong}");
        }
    }
}
