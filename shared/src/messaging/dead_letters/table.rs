//! The table of open dead letters, read from its topic.

use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, Instant};

use anyhow::ensure;
use rdkafka::consumer::{BaseConsumer, Consumer};
use rdkafka::error::{KafkaError, RDKafkaErrorCode};
use rdkafka::message::{Message, OwnedMessage};
use rdkafka::{Offset, TopicPartitionList};
use tokio_util::sync::CancellationToken;

use super::letter::{DeadLetter, topic};
use crate::messaging::errors::{Class, class};
use crate::messaging::kafka::{KafkaConfig, create};
use crate::platform::metrics::{GroupLabels, Metrics};

const POLL_INTERVAL: Duration = Duration::from_millis(200);
/// A command gives up when Kafka has sent nothing for this long.
const SILENCE_LIMIT: Duration = Duration::from_secs(10);

/// The open letters of a group, ordered by coordinates. Holds all of them in memory.
///
/// # Errors
/// Kafka does not answer, or the topic does not exist because the group has never run.
pub fn open(kafka: &KafkaConfig, group: &str) -> anyhow::Result<Vec<DeadLetter>> {
    let mut table = BTreeMap::new();
    let mut complete = false;
    let mut last_change = Instant::now();
    let mut cause = "Kafka sent nothing in time";
    follow(kafka, group, |change, at_end| {
        match change {
            Change::Letter(key, letter) => {
                table.insert(key, letter);
            }
            Change::Settled(key) => {
                table.remove(&key);
            }
            Change::TopicMissing => {
                table.clear();
                cause = "the topic does not exist: the service has never run here, or the topic was deleted";
                return Follow::unless(last_change.elapsed() >= SILENCE_LIMIT);
            }
            Change::None => {
                complete = at_end;
                return Follow::unless(complete || last_change.elapsed() >= SILENCE_LIMIT);
            }
        }
        last_change = Instant::now();
        Follow::Continue
    })?;
    ensure!(complete, "cannot read the dead letters {}: {cause}", topic(kafka, group));
    let mut letters: Vec<_> = table.values().filter_map(DeadLetter::parse).collect();
    letters.sort_by(|a, b| a.coordinates.cmp(&b.coordinates));
    Ok(letters)
}

/// Keeps the metric of open letters up to date by reading the table's changes. So the metric also
/// changes when another process redrives. Holds only the keys in memory.
pub fn count_open_dead_letters(
    kafka: &KafkaConfig,
    group: &str,
    metrics: &Metrics,
    stop: &CancellationToken,
) -> anyhow::Result<()> {
    let gauge = metrics.dead_letters_open.get_or_create_owned(&GroupLabels { group: group.to_owned() });
    let mut open = BTreeSet::new();
    follow(kafka, group, |change, at_end| {
        match change {
            Change::Letter(key, _) => {
                open.insert(key);
            }
            Change::Settled(key) => {
                open.remove(&key);
            }
            Change::TopicMissing => open.clear(),
            Change::None if at_end => {
                gauge.set(open.len() as i64);
            }
            Change::None => {}
        }
        Follow::unless(stop.is_cancelled())
    })
}

/// A change of the table.
enum Change {
    Letter(Vec<u8>, OwnedMessage),
    Settled(Vec<u8>),
    /// The topic does not exist or was created again. Reading starts from its beginning.
    TopicMissing,
    /// There is no change at the moment.
    None,
}

/// What the reader of the table does next.
#[derive(PartialEq, Eq)]
enum Follow {
    Continue,
    Stop,
}

impl Follow {
    fn unless(stop: bool) -> Self {
        if stop { Self::Stop } else { Self::Continue }
    }
}

/// Reads the table from its beginning and calls `on_change` with each change, and with whether the
/// end has been reached.
fn follow(kafka: &KafkaConfig, group: &str, mut on_change: impl FnMut(Change, bool) -> Follow) -> anyhow::Result<()> {
    // The reader starts at the beginning, so an offset that Kafka does not have means that the
    // topic was created again.
    let consumer: BaseConsumer = create(&kafka.reader(group))?;
    let mut start = TopicPartitionList::new();
    start.add_partition_offset(&topic(kafka, group), 0, Offset::Beginning)?;
    consumer.assign(&start)?;
    let mut at_end = false;
    let mut refusals = BTreeSet::new();
    loop {
        let change = match consumer.poll(POLL_INTERVAL) {
            Some(Ok(message)) => {
                let key = message.key().unwrap_or_default().to_vec();
                // A pointer has no payload either, but it has headers.
                if message.headers().is_some() { Change::Letter(key, message.detach()) } else { Change::Settled(key) }
            }
            Some(Err(KafkaError::PartitionEOF(_))) => {
                at_end = true;
                Change::None
            }
            Some(Err(error)) => {
                if class(&error) == Class::Transport || is_topic_missing(&error) {
                    tracing::debug!(group, %error, "cannot read the dead letters; will retry");
                } else if refusals.insert(error.to_string()) {
                    tracing::warn!(group, %error, "Kafka refuses to send the dead letters; will retry");
                }
                if is_topic_missing(&error) {
                    // The client may report this at once, without a request to Kafka.
                    std::thread::sleep(POLL_INTERVAL);
                    consumer.assign(&start)?;
                    at_end = false;
                    Change::TopicMissing
                } else {
                    Change::None
                }
            }
            None => Change::None,
        };
        if on_change(change, at_end) == Follow::Stop {
            return Ok(());
        }
    }
}

/// Whether the topic does not exist, or was deleted and created again.
fn is_topic_missing(error: &KafkaError) -> bool {
    use RDKafkaErrorCode::{AutoOffsetReset, UnknownPartition, UnknownTopic, UnknownTopicOrPartition};
    let code = error.rdkafka_error_code();
    matches!(code, Some(AutoOffsetReset | UnknownPartition | UnknownTopic | UnknownTopicOrPartition))
}
