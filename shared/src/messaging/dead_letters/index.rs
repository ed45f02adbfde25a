//! Which letters of a group are open, and where each is in the letters' topic. A thread of the
//! process follows the topic, so the index also shows what other processes write.
//!
//! The index holds only numbers: a record of the group's topic is a partition and an offset, and
//! its letter is an offset. A million open letters take less than [`MAX_BYTES_OF_A_MILLION`].

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use anyhow::Context;
use rdkafka::consumer::{BaseConsumer, Consumer};
use rdkafka::error::{KafkaError, RDKafkaErrorCode};
use rdkafka::message::{BorrowedMessage, Message};
use rdkafka::{Offset, TopicPartitionList};
use tokio::sync::watch;
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;

use super::letter::topic;
use crate::messaging::errors::{Class, class};
use crate::messaging::kafka::{KafkaConfig, create};
use crate::messaging::record::Coordinates;
use crate::platform::metrics::{GroupLabels, Metrics};

/// Bytes. What operators can plan with, see `docs/sizing.md`. A test measures it.
#[cfg(test)]
const MAX_BYTES_OF_A_MILLION: usize = 64 * 1024 * 1024;
const POLL_INTERVAL: Duration = Duration::from_millis(200);
/// How long a request waits until the index has read the letters that were written before it.
const READ_TIMEOUT: Duration = Duration::from_secs(10);

/// The open letters of a group. Clones share them.
#[derive(Clone)]
pub struct LetterIndex {
    /// The name of the topic whose records the letters are about.
    records_topic: String,
    open: Arc<Mutex<Open>>,
    /// Offset up to which the letters' topic was read.
    read_to: Arc<watch::Sender<i64>>,
}

#[derive(Default)]
struct Open {
    /// Partition of a record, offset of the record, offset of its letter.
    letters: BTreeMap<i32, BTreeMap<i64, i64>>,
    count: usize,
}

impl Open {
    fn insert(&mut self, partition: i32, offset: i64, letter: i64) {
        let earlier = self.letters.entry(partition).or_default().insert(offset, letter);
        self.count += usize::from(earlier.is_none());
    }

    fn remove(&mut self, partition: i32, offset: i64) {
        let removed = self.letters.get_mut(&partition).and_then(|letters| letters.remove(&offset));
        self.count -= usize::from(removed.is_some());
    }
}

impl LetterIndex {
    /// An empty index of letters about records of this topic. [`LetterIndex::follow`] fills it.
    pub fn new(records_topic: String) -> Self {
        Self { records_topic, open: Arc::default(), read_to: Arc::new(watch::Sender::new(0)) }
    }

    pub fn count(&self) -> usize {
        self.lock().count
    }

    /// The offset of the record's letter. `None`: the record has no open letter.
    pub fn letter_of(&self, record: &Coordinates) -> Option<i64> {
        let open = self.lock();
        let letters = open.letters.get(&record.partition).filter(|_| record.topic == self.records_topic)?;
        letters.get(&record.offset).copied()
    }

    /// The record whose open letter this is. `None`: the letter was settled or replaced by a later
    /// one, or it is none.
    pub fn record_of(&self, letter: &impl Message) -> Option<Coordinates> {
        let record = self.named(letter.key()?)?;
        (self.letter_of(&record) == Some(letter.offset())).then_some(record)
    }

    /// The record that the key of a letter names. `None`: another program wrote a key that is not
    /// the name of a record of this group.
    fn named(&self, key: &[u8]) -> Option<Coordinates> {
        let text = std::str::from_utf8(key).ok()?;
        let record: Coordinates = text.parse().ok()?;
        (record.topic == self.records_topic && record.to_string() == text).then_some(record)
    }

    /// Waits until the index contains all letters before this offset.
    ///
    /// # Errors
    /// Kafka does not send them in time.
    pub async fn until_read(&self, end: i64) -> anyhow::Result<()> {
        let mut read_to = self.read_to.subscribe();
        let read = timeout(READ_TIMEOUT, read_to.wait_for(|read_to| *read_to >= end)).await;
        read.with_context(|| format!("the dead letters were not read to their end within {READ_TIMEOUT:?}"))?
            .context("the process stops")?;
        Ok(())
    }

    /// Follows the letters' topic from its beginning, and keeps the metric of open letters up to
    /// date. Blocks the calling thread until the process stops.
    pub fn follow(
        &self,
        kafka: &KafkaConfig,
        group: &str,
        metrics: &Metrics,
        stop: &CancellationToken,
    ) -> anyhow::Result<()> {
        let gauge = metrics.dead_letters_open.get_or_create_owned(&GroupLabels { group: group.to_owned() });
        // The reader starts at the beginning, so an offset that Kafka does not have means that the
        // topic was created again.
        let consumer: BaseConsumer = create(&kafka.reader(group))?;
        let mut start = TopicPartitionList::new();
        start.add_partition_offset(&topic(kafka, group), 0, Offset::Beginning)?;
        consumer.assign(&start)?;
        let mut at_end = false;
        let mut refusals = BTreeSet::new();
        while !stop.is_cancelled() {
            match consumer.poll(POLL_INTERVAL) {
                Some(Ok(message)) => self.apply(&message),
                Some(Err(KafkaError::PartitionEOF(_))) => {
                    at_end = true;
                    // Past records that were compacted away, too.
                    let position = consumer.position()?;
                    let next = position.elements().first().map(|partition| partition.offset());
                    if let Some(Offset::Offset(end)) = next {
                        self.read_to.send_replace(end);
                    }
                }
                Some(Err(error)) if is_topic_missing(&error) => {
                    tracing::debug!(group, %error, "cannot read the dead letters; will retry");
                    // The client may report this at once, without a request to Kafka.
                    std::thread::sleep(POLL_INTERVAL);
                    consumer.assign(&start)?;
                    at_end = false;
                    *self.lock() = Open::default();
                    self.read_to.send_replace(0);
                }
                Some(Err(error)) => {
                    if class(&error) == Class::Transport {
                        tracing::debug!(group, %error, "cannot read the dead letters; will retry");
                    } else if refusals.insert(error.to_string()) {
                        tracing::warn!(group, %error, "Kafka refuses to send the dead letters; will retry");
                    }
                }
                None => {}
            }
            if at_end {
                gauge.set(self.count() as i64);
            }
        }
        Ok(())
    }

    fn apply(&self, letter: &BorrowedMessage<'_>) {
        if let Some(record) = letter.key().and_then(|key| self.named(key)) {
            let mut open = self.lock();
            if is_tombstone(letter) {
                open.remove(record.partition, record.offset);
            } else {
                open.insert(record.partition, record.offset, letter.offset());
            }
        }
        self.read_to.send_replace(letter.offset() + 1);
    }

    fn lock(&self) -> MutexGuard<'_, Open> {
        self.open.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Whether the record settles a letter. An earlier release wrote pointers without a value, so the
/// headers count too.
fn is_tombstone(letter: &impl Message) -> bool {
    letter.payload().is_none() && letter.headers().is_none()
}

/// Whether the topic does not exist, or was deleted and created again.
fn is_topic_missing(error: &KafkaError) -> bool {
    use RDKafkaErrorCode::{AutoOffsetReset, UnknownPartition, UnknownTopic, UnknownTopicOrPartition};
    let code = error.rdkafka_error_code();
    matches!(code, Some(AutoOffsetReset | UnknownPartition | UnknownTopic | UnknownTopicOrPartition))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn index() -> LetterIndex {
        LetterIndex::new("some.events.v1".to_owned())
    }

    #[test]
    fn a_letter_that_is_written_again_is_counted_once() {
        let index = index();
        index.lock().insert(3, 7, 0);
        index.lock().insert(3, 7, 5);
        assert_eq!(index.count(), 1);
        let record = Coordinates { topic: "some.events.v1".to_owned(), partition: 3, offset: 7 };
        assert_eq!(index.letter_of(&record), Some(5));
        assert_eq!(index.letter_of(&Coordinates { topic: "other.v1".to_owned(), ..record.clone() }), None);
        index.lock().remove(3, 7);
        index.lock().remove(3, 7);
        assert_eq!((index.count(), index.letter_of(&record)), (0, None));
    }

    /// A tombstone is written with the name of a record as its key. It would not settle a letter
    /// with another spelling of the name.
    #[test]
    fn a_key_that_is_not_the_name_of_a_record_of_the_group_is_not_a_letter() {
        let index = index();
        assert!(index.named(b"some.events.v1-3-7").is_some());
        let wrong: [&[u8]; 6] =
            [b"", b"\xff\xfe", b"other.v1-3-7", b"some.events.v1-3-07", b"some.events.v1--3-7", b"some.events.v1-+3-7"];
        for key in wrong {
            assert!(index.named(key).is_none(), "{key:?}");
        }
    }

    /// Memory that this process has allocated and uses, in bytes. Without the pages of its program.
    fn resident() -> usize {
        let status = std::fs::read_to_string("/proc/self/status").unwrap();
        let line = status.lines().find_map(|line| line.strip_prefix("RssAnon:")).unwrap();
        line.trim().trim_end_matches(" kB").parse::<usize>().unwrap() * 1024
    }

    /// The letters arrive in the order in which several consumers wrote them.
    #[test]
    fn a_million_open_letters_take_at_most_64_mib() {
        let index = index();
        let before = resident();
        for letter in 0..1_000_000 {
            index.lock().insert(letter as i32 % 6, letter * 3, letter);
        }
        let taken = resident().saturating_sub(before);
        assert_eq!(index.count(), 1_000_000);
        assert!(taken > 16 * 1024 * 1024, "{taken} bytes: the measurement does not work");
        assert!(taken <= MAX_BYTES_OF_A_MILLION, "a million letters take {taken} bytes");
    }
}
