//! The live tail: reads the records of all topics as they arrive. It keeps the metadata that the
//! list of events shows, and no values.

use std::collections::{BTreeMap, VecDeque};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use rdkafka::consumer::{BaseConsumer, Consumer};
use rdkafka::error::{KafkaError, RDKafkaErrorCode};
use rdkafka::message::{BorrowedMessage, Message};
use rdkafka::{Offset, TopicPartitionList};
use shared::messaging::{KafkaConfig, headers};
use tokio_util::sync::CancellationToken;
use uuid::Uuid;

use super::{ANSWER_LIMIT, GROUP, logical, topics};
use crate::traces::{TraceId, trace_of};

/// How many records are kept, without their values: about 4 MB. The list of events shows some pages
/// of them, and the stories find the records of a user among them.
pub const KEPT: usize = 10_000;
/// How many records of each partition are read at the start, so that the list is not empty.
const READ_AT_START: i64 = 20;
/// Characters of a type or a version that are kept. Any client may write longer ones.
const TEXT_LIMIT: usize = 64;
/// How long one poll waits, so that a stop is noticed.
const POLL_INTERVAL: Duration = Duration::from_millis(200);
/// The pause before the next attempt to read topics that do not exist or could not be read.
const RETRY_INTERVAL: Duration = Duration::from_secs(1);
/// How many records are read in one second. The console skips the others: reading them would slow
/// down the services that share its machine, and no visitor can follow so many.
const RECORDS_A_SECOND: u32 = 10_000;
const SECOND: Duration = Duration::from_secs(1);

/// A record that has arrived.
#[derive(Clone, Debug)]
pub struct Seen {
    /// The number of the record since the start of the console.
    pub number: u64,
    pub topic: &'static str,
    pub partition: i32,
    pub offset: i64,
    /// The broker's time, in milliseconds since 1970.
    pub time: Option<i64>,
    /// The key, if it is an id.
    pub key: Option<Uuid>,
    /// The header `ce_type`, shortened.
    pub kind: String,
    /// The header `ce_sequence` without leading zeros, shortened.
    pub version: String,
    /// Bytes of key and value.
    pub size: usize,
    /// The header `ce_id`. Copies of a record have the same.
    pub event: Option<Uuid>,
    /// The trace that the header `traceparent` names.
    pub trace: Option<TraceId>,
    /// Whether the record has no value.
    pub is_tombstone: bool,
}

/// The last records, and how many there were per topic. Clones share them.
#[derive(Clone, Default)]
pub struct Recent(Arc<Mutex<Kept>>);

#[derive(Default)]
struct Kept {
    records: VecDeque<Arc<Seen>>,
    next: u64,
    counts: BTreeMap<&'static str, u64>,
    skipped: u64,
}

impl Recent {
    /// At most `limit` records after `number` that pass the filter, the newest first. Skipped
    /// records are not among them.
    pub fn after(&self, number: Option<u64>, limit: usize, passes: impl Fn(&Seen) -> bool) -> Vec<Arc<Seen>> {
        let kept = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let newer = kept.records.iter().rev().take_while(|seen| number.is_none_or(|number| seen.number > number));
        newer.filter(|seen| passes(seen)).take(limit).cloned().collect()
    }

    /// The number of the last record.
    pub fn last(&self) -> Option<u64> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).next.checked_sub(1)
    }

    /// How many records were skipped since the start. They have numbers.
    pub fn skipped(&self) -> u64 {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).skipped
    }

    /// How many records of each topic have arrived since the start.
    pub fn counts(&self) -> BTreeMap<&'static str, u64> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).counts.clone()
    }

    fn push(&self, mut seen: Seen) {
        let mut kept = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        seen.number = kept.next;
        kept.next += 1;
        *kept.counts.entry(seen.topic).or_default() += 1;
        if kept.records.len() == KEPT {
            kept.records.pop_front();
        }
        kept.records.push_back(Arc::new(seen));
    }

    fn skip(&self, topic: &'static str, records: u64) {
        let mut kept = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        kept.next += records;
        kept.skipped += records;
        *kept.counts.entry(topic).or_default() += records;
    }
}

/// Follows all topics until the stop. Topics that do not exist yet are followed when they do.
pub fn follow(kafka: &KafkaConfig, recent: &Recent, stop: &CancellationToken) -> anyhow::Result<()> {
    let mut tail = Tail { kafka, recent, consumer: kafka.reader(GROUP).create()?, next: BTreeMap::new() };
    let mut missing = topics();
    let mut looked: Option<Instant> = None;
    // Whether the last error was logged. During an outage the client reports several kinds in turn.
    let mut logged = false;
    let (mut second, mut read) = (Instant::now(), 0);
    while !stop.is_cancelled() {
        if !missing.is_empty() && looked.is_none_or(|looked| looked.elapsed() >= RETRY_INTERVAL) {
            looked = Some(Instant::now());
            match tail.assign(&missing) {
                Ok(assigned) => missing.retain(|topic| !assigned.contains(topic)),
                Err(error) => tracing::debug!(%error, "Kafka does not list the topics; will retry"),
            }
        }
        if second.elapsed() >= SECOND {
            (second, read) = (Instant::now(), 0);
        }
        match tail.consumer.poll(POLL_INTERVAL) {
            Some(Ok(message)) => {
                logged = false;
                read += 1;
                if let Some(seen) = seen(kafka, &message) {
                    tail.next.insert((seen.topic, seen.partition), seen.offset + 1);
                    recent.push(seen);
                }
            }
            Some(Err(KafkaError::PartitionEOF(_))) => logged = false,
            None => {}
            Some(Err(error)) => {
                let error_code = error.rdkafka_error_code();
                if !logged {
                    tracing::warn!(%error, "cannot read the topics; will retry");
                    logged = true;
                }
                // After this error the client stops reading the partition, because its next offset
                // was deleted. So all topics are assigned again, shortly before their ends. The
                // client recovers from other errors by itself.
                if error_code == Some(RDKafkaErrorCode::AutoOffsetReset) {
                    tail.consumer.unassign()?;
                    missing = topics();
                    looked = Some(Instant::now());
                }
            }
        }
        // Nothing is fetched until the second is over. Then reading continues shortly before the
        // ends.
        if read == RECORDS_A_SECOND {
            tail.consumer.unassign()?;
            while second.elapsed() < SECOND && !stop.is_cancelled() {
                std::thread::sleep(POLL_INTERVAL.min(SECOND.saturating_sub(second.elapsed())));
            }
            missing = topics();
            looked = None;
        }
    }
    Ok(())
}

struct Tail<'a> {
    kafka: &'a KafkaConfig,
    recent: &'a Recent,
    consumer: BaseConsumer,
    /// The next offset to read, per partition that was assigned. It is kept while nothing is
    /// assigned, so that skipped records are counted and no record is read twice.
    next: BTreeMap<(&'static str, i32), i64>,
}

impl Tail<'_> {
    /// Assigns all partitions of those topics that exist, shortly before their ends, and returns
    /// these topics.
    fn assign(&mut self, topics: &[&'static str]) -> anyhow::Result<Vec<&'static str>> {
        let mut assigned = TopicPartitionList::new();
        let mut existing = vec![];
        let mut skipped = vec![];
        for topic in topics {
            let name = self.kafka.prefixed(topic);
            let metadata = self.consumer.fetch_metadata(Some(&name), ANSWER_LIMIT)?;
            for partition in metadata.topics().iter().flat_map(|topic| topic.partitions()) {
                let place = (*topic, partition.id());
                let ends = self.consumer.fetch_watermarks(&name, partition.id(), ANSWER_LIMIT)?;
                let start = start(ends, self.next.get(&place).copied());
                assigned.add_partition_offset(&name, partition.id(), Offset::Offset(start))?;
                skipped.push((place, start));
                existing.push(*topic);
            }
        }
        if !existing.is_empty() {
            self.consumer.incremental_assign(&assigned)?;
        }
        for (place, start) in skipped {
            let before = self.next.insert(place, start).unwrap_or(start);
            self.recent.skip(place.0, u64::try_from(start - before).unwrap_or(0));
        }
        Ok(existing)
    }
}

/// Where to start reading: a few records before the end of a partition, and no record twice. If the
/// topic was deleted and created again, `next` is past its end and is ignored.
fn start((first, end): (i64, i64), next: Option<i64>) -> i64 {
    let before_end = (end - READ_AT_START).max(first);
    before_end.max(next.filter(|next| *next <= end).unwrap_or(before_end))
}

/// A record without its value. `None`: the topic is not one of Waybill's.
pub fn seen(kafka: &KafkaConfig, message: &BorrowedMessage<'_>) -> Option<Seen> {
    let header = |name: &str| {
        let found = headers(message).filter_map(Result::ok).find(|header| header.key == name);
        let text = found.and_then(|header| header.value).map(|value| String::from_utf8_lossy(value).into_owned());
        text.unwrap_or_default().chars().take(TEXT_LIMIT).collect::<String>()
    };
    Some(Seen {
        number: 0,
        topic: logical(kafka, message.topic())?,
        partition: message.partition(),
        offset: message.offset(),
        time: message.timestamp().to_millis(),
        key: message.key().and_then(|key| Uuid::try_parse_ascii(key).ok()),
        kind: header("ce_type"),
        version: header("ce_sequence").trim_start_matches('0').to_owned(),
        size: message.payload_len() + message.key_len(),
        event: Uuid::try_parse(&header("ce_id")).ok(),
        trace: trace_of(&header("traceparent")),
        is_tombstone: message.payload().is_none(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn record(offset: i64, kind: &str) -> Seen {
        Seen {
            number: 0,
            topic: "user.events.v1",
            partition: 0,
            offset,
            time: None,
            key: None,
            kind: kind.to_owned(),
            version: String::new(),
            size: 0,
            event: None,
            trace: None,
            is_tombstone: false,
        }
    }

    #[test]
    fn the_list_is_bounded_and_the_newest_record_comes_first() {
        let recent = Recent::default();
        assert_eq!(recent.last(), None);
        for offset in 0..20_000 {
            recent.push(record(offset, if offset % 2 == 0 { "even" } else { "odd" }));
        }
        let offsets = |number, limit| -> Vec<i64> {
            recent.after(number, limit, |seen| seen.kind == "even").iter().map(|seen| seen.offset).collect()
        };
        assert_eq!(offsets(None, 3), [19_998, 19_996, 19_994]);
        assert_eq!(offsets(Some(19_995), 10), [19_998, 19_996]);
        assert_eq!(offsets(None, 20_000).len(), KEPT / 2);
        assert_eq!(recent.counts()["user.events.v1"], 20_000);
        assert_eq!(recent.last(), Some(19_999));
    }

    #[test]
    fn skipped_records_have_numbers_and_count() {
        let recent = Recent::default();
        recent.push(record(0, "read"));
        recent.skip("user.events.v1", 500);
        recent.push(record(501, "read"));
        let numbers: Vec<u64> = recent.after(None, 10, |_| true).iter().map(|seen| seen.number).collect();
        assert_eq!((numbers, recent.skipped()), (vec![501, 0], 500));
        assert_eq!(recent.counts()["user.events.v1"], 502);
    }

    #[test]
    fn reading_starts_before_the_end_and_reads_no_record_twice() {
        assert_eq!(start((0, 1_000), None), 980);
        assert_eq!(start((990, 1_000), None), 990, "the records before were deleted");
        assert_eq!(start((0, 1_000), Some(500)), 980, "480 records are skipped");
        assert_eq!(start((0, 1_000), Some(995)), 995);
        assert_eq!(start((0, 1_000), Some(1_000)), 1_000);
        assert_eq!(start((0, 10), Some(1_000)), 0, "the topic was created again");
    }
}
