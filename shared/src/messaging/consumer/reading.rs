//! One partition that the client reads, as the client's statistics show it.

use std::time::{Duration, Instant};

use rdkafka::statistics::Partition;

/// A partition counts as idle if the client was given it and has not read it for this long.
/// Starting to read takes milliseconds.
const IDLE_LIMIT: Duration = Duration::from_secs(2);
/// A partition counts as not read if its end is unknown for this long. Every answer to a fetch
/// contains the end.
const UNREAD_LIMIT: Duration = Duration::from_secs(10);
/// A transaction counts as left open after this time. Kafka ends those of our relays within 20 s:
/// it looks every 10 s for transactions that are older than 10 s.
const TRANSACTION_LIMIT: Duration = Duration::from_secs(25);

pub(super) struct Reading {
    /// Next offset to handle. The lag is the distance from here to the end.
    pub handled: i64,
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
        reading.handled = 8;
        assert_eq!(reading.lag(), Some(0));
        reading.observe(&statistics(-1001, -1), now);
        assert_eq!(reading.lag(), None, "a refused fetch has no end");
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
