//! One partition that the client reads, as the client's statistics show it.

use std::time::{Duration, Instant};

use rdkafka::message::Message;
use rdkafka::statistics::Partition;

use crate::platform::metrics::now_ms;

/// A partition counts as idle if the client was given it and has not read it for this long.
/// Starting to read takes milliseconds.
const IDLE_LIMIT: Duration = Duration::from_secs(2);
/// A partition counts as not read if its end is unknown for this long. Every answer to a fetch
/// contains the end.
const UNREAD_LIMIT: Duration = Duration::from_secs(10);
/// A transaction counts as left open after this time. Kafka ends those of our relays within 20 s:
/// it looks every 10 s for transactions that are older than 10 s.
const TRANSACTION_LIMIT: Duration = Duration::from_secs(25);

/// A record that was not polled yet counts for the age of the lag only after this time. With a
/// backlog the client has the next records already, and the consumer polls them within this time.
const UNPOLLED_LIMIT_MS: i64 = 1_000;

/// A record that was polled and is not handled yet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Unhandled {
    pub offset: i64,
    /// The record's timestamp, in milliseconds since 1970.
    pub written_ms: i64,
}

impl Unhandled {
    pub fn of(message: &impl Message) -> Self {
        Self { offset: message.offset(), written_ms: message.timestamp().to_millis().unwrap_or_else(now_ms) }
    }
}

/// What is known about the oldest record that is not handled yet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Oldest {
    /// There is no such record.
    None,
    /// When it was written, or when it was first noticed, in milliseconds since 1970.
    Since(i64),
    /// There is one, and the consumer is about to poll it.
    AboutToPoll,
    /// The end of the partition is not known.
    Unknown,
}

pub(super) struct Reading {
    /// Next offset to handle. The lag is the distance from here to the end.
    handled: i64,
    /// The first record that is not handled, if it was polled.
    unhandled: Option<Unhandled>,
    /// Since when there are records that were not polled, in milliseconds since 1970.
    unpolled_since_ms: Option<i64>,
    /// Whether the partition is paused because its next record fails. The statistics of a paused
    /// partition do not change.
    pub paused: bool,
    /// Whether it was reported that the partition is not read, or that a transaction is open.
    pub unread_reported: bool,
    pub open_reported: bool,
    /// The end of the log, if it is known. It is after the last record, committed or not.
    end: Option<i64>,
    /// Since when the client does not fetch.
    idle_since: Option<Instant>,
    /// Since when the end is unknown.
    unknown_since: Option<Instant>,
    /// Where the oldest open transaction begins, and since when it is the oldest.
    transaction: Option<(i64, Instant)>,
}

impl Reading {
    pub fn new(start: i64, now: Instant) -> Self {
        Self {
            handled: start,
            unhandled: None,
            unpolled_since_ms: None,
            paused: false,
            unread_reported: false,
            open_reported: false,
            end: None,
            idle_since: None,
            unknown_since: Some(now),
            transaction: None,
        }
    }

    /// Takes over the client's statistics. A fetch that the broker refuses sets the end to unknown.
    pub fn observe(&mut self, partition: &Partition, now: Instant) {
        let is_idle = partition.fetch_state == "none";
        self.idle_since = is_idle.then(|| self.idle_since.unwrap_or(now));
        self.end = (partition.hi_offset >= 0 && partition.leader >= 0).then_some(partition.hi_offset);
        self.unknown_since = self.end.is_none().then(|| self.unknown_since.unwrap_or(now));
        // Committed readers get the records before the last stable offset: the beginning of the
        // oldest open transaction.
        let stable = partition.ls_offset;
        let is_open = stable >= 0 && self.end.is_some_and(|end| stable < end);
        let since = self.transaction.filter(|(oldest, _)| *oldest == stable).map_or(now, |(_, since)| since);
        self.transaction = is_open.then_some((stable, since));
    }

    /// Notes the first polled record that is not handled yet.
    pub fn note_unhandled(&mut self, record: Unhandled) {
        self.unhandled = Some(record);
        self.unpolled_since_ms = None;
    }

    /// Notes that all records before this offset are handled.
    pub fn note_handled(&mut self, next_offset: i64) {
        self.handled = next_offset;
        self.unhandled = self.unhandled.filter(|record| record.offset >= next_offset);
    }

    /// Notes the end of the log, which was measured because the statistics of a paused partition do
    /// not change.
    pub fn note_end(&mut self, end: i64) {
        self.end = Some(end);
    }

    /// The oldest record that is not handled. A record that cannot be polled, because the partition
    /// is paused or a transaction is open, counts from when this consumer has noticed it.
    pub fn oldest(&mut self, now_ms: i64) -> Oldest {
        if let Some(record) = self.unhandled {
            return Oldest::Since(record.written_ms);
        }
        let lag = self.lag();
        if lag.is_none_or(|lag| lag == 0) {
            self.unpolled_since_ms = None;
            return if lag.is_some() { Oldest::None } else { Oldest::Unknown };
        }
        let since = *self.unpolled_since_ms.get_or_insert(now_ms);
        if now_ms - since < UNPOLLED_LIMIT_MS { Oldest::AboutToPoll } else { Oldest::Since(since) }
    }

    /// The same while no broker answers: only a polled record is known.
    pub fn oldest_polled(&mut self) -> Oldest {
        self.unpolled_since_ms = None;
        self.unhandled.map_or(Oldest::Unknown, |record| Oldest::Since(record.written_ms))
    }

    /// Forgets what was seen, because all partitions are paused.
    pub fn forget(&mut self) {
        self.unknown_since = None;
        self.transaction = None;
    }

    /// Whether the client silently stopped fetching.
    pub fn is_idle(&self, now: Instant) -> bool {
        self.idle_since.is_some_and(|since| now.duration_since(since) > IDLE_LIMIT)
    }

    pub fn is_unread(&self, now: Instant) -> bool {
        self.unknown_since.is_some_and(|since| now.duration_since(since) > UNREAD_LIMIT)
    }

    /// Whether the end is known.
    pub fn is_read(&self) -> bool {
        self.end.is_some()
    }

    /// The offset at which a transaction of another program holds the partition up.
    pub fn held_up_at(&self, now: Instant) -> Option<i64> {
        let (offset, since) = self.transaction?;
        (now.duration_since(since) > TRANSACTION_LIMIT).then_some(offset)
    }

    /// How many records are not handled, transaction markers included.
    pub fn lag(&self) -> Option<i64> {
        Some((self.end? - self.handled).max(0))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn statistics(stable: i64, end: i64) -> Partition {
        Partition { hi_offset: end, ls_offset: stable, fetch_state: "active".to_owned(), ..Partition::default() }
    }

    #[test]
    fn the_lag_counts_to_the_end_of_the_log() {
        let now = Instant::now();
        let mut reading = Reading::new(3, now);
        assert_eq!(reading.lag(), None);
        reading.observe(&statistics(3, 8), now);
        assert_eq!(reading.lag(), Some(5));
        reading.note_handled(8);
        assert_eq!(reading.lag(), Some(0));
        reading.observe(&statistics(-1001, -1), now);
        assert_eq!(reading.lag(), None, "a refused fetch has no end");
    }

    #[test]
    fn the_oldest_record_is_the_first_polled_one_that_is_not_handled() {
        let now = Instant::now();
        let mut reading = Reading::new(3, now);
        assert_eq!(reading.oldest(0), Oldest::Unknown, "the end is not known yet");
        reading.observe(&statistics(8, 8), now);
        reading.note_unhandled(Unhandled { offset: 4, written_ms: 700 });
        assert_eq!(reading.oldest(90_000), Oldest::Since(700), "offset 3 is a marker of a transaction");
        reading.note_handled(4);
        assert_eq!(reading.oldest(90_000), Oldest::Since(700), "a record before it was handled");
        assert_eq!(reading.oldest_polled(), Oldest::Since(700), "this is known without a broker");
        reading.note_handled(8);
        assert_eq!(reading.oldest(90_000), Oldest::None);
        assert_eq!(reading.oldest_polled(), Oldest::Unknown, "there may be new records");
        reading.observe(&statistics(-1001, -1), now);
        assert_eq!(reading.oldest(90_000), Oldest::Unknown, "a refused fetch has no end");
    }

    #[test]
    fn records_that_cannot_be_polled_count_from_when_they_were_noticed() {
        let mut reading = Reading::new(8, Instant::now());
        reading.note_end(9);
        assert_eq!(reading.oldest(5_000), Oldest::AboutToPoll);
        assert_eq!(reading.oldest(5_900), Oldest::AboutToPoll);
        reading.note_end(12);
        assert_eq!(reading.oldest(9_000), Oldest::Since(5_000));
        reading.note_handled(12);
        assert_eq!(reading.oldest(9_500), Oldest::None);
        reading.note_end(13);
        assert_eq!(reading.oldest(20_000), Oldest::AboutToPoll, "a later record counts from its own time");
    }

    #[test]
    fn a_partition_whose_end_stays_unknown_is_not_read() {
        let start = Instant::now();
        let mut reading = Reading::new(0, start);
        reading.observe(&statistics(-1001, -1001), start);
        assert!(!reading.is_unread(start + UNREAD_LIMIT));
        assert!(reading.is_unread(start + UNREAD_LIMIT * 2));
        reading.observe(&statistics(4, 4), start + UNREAD_LIMIT * 2);
        assert!(!reading.is_unread(start + UNREAD_LIMIT * 9));
        let without_leader = Partition { leader: -1, ..statistics(4, 4) };
        reading.observe(&without_leader, start);
        assert!(reading.is_unread(start + UNREAD_LIMIT * 2));
    }

    #[test]
    fn a_transaction_holds_up_a_partition_only_if_it_stays_the_oldest() {
        let start = Instant::now();
        let late = start + TRANSACTION_LIMIT * 2;
        let mut reading = Reading::new(0, start);
        reading.observe(&statistics(5, 9), start);
        assert_eq!(reading.held_up_at(late), Some(5));
        reading.observe(&statistics(7, 9), late);
        assert_eq!(reading.held_up_at(late), None, "another transaction is the oldest now");
        reading.observe(&statistics(9, 9), late);
        assert_eq!(reading.held_up_at(late + TRANSACTION_LIMIT * 2), None);
    }
}
