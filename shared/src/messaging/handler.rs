//! What a service does with events. A handler gets a batch of records; those of one partition are
//! in order. The same event can come again at any time, even after newer ones: the relay duplicates
//! it, or it is retried, redriven or replayed. So the effects of facts must commute, and for state
//! the highest version must win.

use std::collections::HashSet;
use std::mem;
use std::ops::{AddAssign, Range};
use std::panic::AssertUnwindSafe;

use futures::FutureExt;
use sqlx::PgConnection;
use tokio::time::{Duration, timeout};
use uuid::Uuid;

use super::record::Record;
use crate::events::Event;
use crate::platform::database;

/// Handles the events of one topic as one consumer group.
pub trait Handler: Send + Sync + 'static {
    type Event: Event;

    /// The consumer group, for example `email.welcome`. Its dead letters are in the topic
    /// `<group>.dlq`.
    const GROUP: &'static str;

    /// Makes the effects of the batch durable. The offset is committed afterwards, so after a crash
    /// within this call the batch comes again.
    fn handle(&self, batch: &[Record<Self::Event>]) -> impl Future<Output = Result<Outcome, Failure>> + Send;

    /// The offset at which to start reading a partition, for a handler that stores its position
    /// with its data. `None`: start at the offset that is committed in Kafka, or at the beginning
    /// if there is none.
    fn resume_at(&self, _partition: i32) -> impl Future<Output = anyhow::Result<Option<i64>>> + Send {
        async { Ok(None) }
    }

    /// Whether the handler's dependency answers and can be written to. The consumer asks this after
    /// a batch has failed several times: if the dependency works, one of the records is the cause.
    /// `false`: it is not known, and the whole batch is retried.
    fn dependency_works(&self) -> impl Future<Output = bool> + Send {
        async { false }
    }

    /// Called when the consumer reaches the end of a partition, and every second while it stays
    /// there.
    fn caught_up(&self, _end: EndOfPartition) -> impl Future<Output = Result<(), Failure>> + Send {
        async { Ok(()) }
    }
}

/// A handler whose database records the ids of the events that it contains, in the transaction of
/// their effects. A [`Replay`](super::Replay) can fold the same events into a copy.
pub trait Recorded: Handler {
    /// Which of these events the read model contains. The search path of `live` selects the model.
    fn recorded(live: &mut PgConnection, ids: Vec<Uuid>) -> impl Future<Output = sqlx::Result<HashSet<Uuid>>> + Send;
}

/// A partition that a consumer has read to its end.
#[derive(Clone, Copy, Debug)]
pub struct EndOfPartition {
    pub partition: i32,
    /// The next offset before this call. A handler that stores its own position compares it with
    /// this one, as with [`Record::expected_position`].
    pub expected_position: i64,
    /// The next offset after this call: all records before it are handled, and the partition
    /// currently has no more.
    pub next_offset: i64,
}

/// What happened to the records of a batch. The sum is the length of the batch: no record is
/// dropped silently.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Outcome {
    /// Records that took effect now.
    pub applied: u64,
    /// Records that had taken effect before.
    pub duplicate: u64,
    /// Records that are older than what was applied before.
    pub stale: u64,
}

impl AddAssign for Outcome {
    fn add_assign(&mut self, other: Self) {
        self.applied += other.applied;
        self.duplicate += other.duplicate;
        self.stale += other.stale;
    }
}

/// Why a batch failed. The caller of [`Handler::handle`] decides what follows.
#[derive(Debug)]
pub enum Failure {
    /// A dependency is down: the batch is retried until the dependency is back. `?` turns any other
    /// error into this variant.
    Retry(anyhow::Error),
    /// The record can never succeed: it becomes a dead letter. The reason is a fixed text of the
    /// program and quotes nothing from the record.
    Reject(&'static str),
    /// The handler's stored position differs from the one the batch assumes. Drop the batch and
    /// restart at `resume_at`.
    Resume,
}

impl<E: Into<anyhow::Error>> From<E> for Failure {
    fn from(error: E) -> Self {
        Self::Retry(error.into())
    }
}

impl Failure {
    /// The reason to dead-letter the record, if a retry cannot help: a rejection by the handler, or
    /// an SQLSTATE of class 22 (data exception) or 23 (integrity constraint violation). The same
    /// data causes these every time.
    pub(super) fn rejection(&self) -> Option<String> {
        match self {
            Self::Reject(reason) => Some((*reason).to_owned()),
            Self::Retry(error) => error.chain().find_map(|cause| {
                let code = cause.downcast_ref::<sqlx::Error>()?.as_database_error()?.code()?;
                (code.starts_with("22") || code.starts_with("23")).then(|| format!("SQLSTATE {code}"))
            }),
            Self::Resume => None,
        }
    }

    /// Whether the failure says that the dependency is down or busy, and nothing about a record: no
    /// answer; connection lost (SQLSTATE class 08), read-only (25006), rolled back because of other
    /// transactions (40), out of resources (53), locked (55P03), shut down (57P), or a system error
    /// (58).
    pub(super) fn is_outage(&self) -> bool {
        let Self::Retry(error) = self else { return false };
        error.chain().any(|cause| {
            if cause.is::<OneByOneTooLong>() {
                return true;
            }
            match cause.downcast_ref::<sqlx::Error>() {
                None => false,
                Some(sqlx::Error::Database(error)) => error.code().is_none_or(|code| {
                    ["08", "25006", "40", "53", "55P03", "57P", "58"].iter().any(|class| code.starts_with(class))
                }),
                Some(
                    sqlx::Error::Io(_)
                    | sqlx::Error::Tls(_)
                    | sqlx::Error::Protocol(_)
                    | sqlx::Error::PoolTimedOut
                    | sqlx::Error::PoolClosed
                    | sqlx::Error::WorkerCrashed,
                ) => true,
                Some(_) => false,
            }
        })
    }

    /// Whether one of the records may be the cause, although the handler does not reject it.
    pub(super) fn may_be_of_a_record(&self) -> bool {
        matches!(self, Self::Retry(_)) && !self.is_outage()
    }

    /// The failure as text, without the message of a database: it may quote values.
    pub(super) fn describe(&self) -> String {
        match self {
            Self::Retry(error) => {
                let code = error.chain().find_map(|cause| {
                    let database = cause.downcast_ref::<sqlx::Error>()?.as_database_error()?;
                    Some(format!("SQLSTATE {}", database.code().as_deref().unwrap_or("unknown")))
                });
                code.unwrap_or_else(|| format!("{error:#}"))
            }
            Self::Reject(reason) => (*reason).to_owned(),
            Self::Resume => "the handler has another position".to_owned(),
        }
    }

    /// Whether the call took too long: it exceeded our time limit, or the statement time-out of
    /// Postgres (SQLSTATE 57014). With fewer records a call may be fast enough.
    fn took_too_long(&self) -> bool {
        let Self::Retry(error) = self else { return false };
        error.chain().any(|cause| {
            let code = cause.downcast_ref::<sqlx::Error>().and_then(|error| error.as_database_error()?.code());
            cause.is::<TookTooLong>() || code.is_some_and(|code| code == "57014")
        })
    }
}

/// Calls a handler and waits at most `limit`: a frozen server or a broken network does not answer
/// at all. A panic counts as a rejection, because these records trigger a bug. The panic's message
/// is dropped, because it may quote a record.
pub(super) async fn call<H: Handler>(
    handler: &H,
    records: &[Record<H::Event>],
    limit: Duration,
) -> Result<Outcome, Failure> {
    let handled = AssertUnwindSafe(handler.handle(records)).catch_unwind();
    let handled = match timeout(limit, handled).await {
        Ok(handled) => handled.unwrap_or(Err(Failure::Reject("the handler panicked"))),
        Err(_) => Err(anyhow::Error::new(TookTooLong(limit)).into()),
    };
    if let Err(Failure::Retry(error)) = &handled {
        // The batch is retried. A session that cannot work must not be used again then.
        error.chain().filter_map(|cause| cause.downcast_ref()).for_each(database::report);
    }
    handled
}

#[derive(Debug, thiserror::Error)]
#[error("the handler did not finish within {0:?}")]
struct TookTooLong(Duration);

/// The records of a batch that were not tried one by one within the time limit.
#[derive(Debug, thiserror::Error)]
#[error("handling records one by one takes too long; the rest is retried later")]
pub(super) struct OneByOneTooLong;

/// What [`deliver`] needs to know from its caller: the consumer, a redrive or a replay.
pub(super) trait Delivery {
    type Event: Event;
    type Error: From<Failure>;

    /// Calls the handler, and records the success.
    async fn attempt(&mut self, records: &mut [Record<Self::Event>]) -> Result<(), Failure>;

    /// The handler rejected this record when it was called with it alone.
    async fn reject(&mut self, record: &Record<Self::Event>, reason: String) -> Result<(), Self::Error>;

    /// With [`Split::Failing`], this record alone failed for another reason than an outage.
    async fn fail(&mut self, record: &Record<Self::Event>, failure: Failure) -> Result<(), Self::Error>;

    /// Whether [`Delivery::attempt`] or [`Delivery::reject`] has finished this record.
    fn is_finished(&self, record: &Record<Self::Event>) -> bool;
}

/// When records are tried in smaller calls, so that one of them does not delay the others.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Split {
    /// In halves, after a call in which a record was rejected.
    Rejected,
    /// Also one by one, after a call that took too long.
    Slow,
    /// One by one from the beginning, because the batch has failed several times.
    Failing,
}

/// As [`deliver`], for a caller that does not wait until a failing record succeeds: a redrive or a
/// replay. If the delivery fails although the handler's dependency works, the records that have not
/// taken effect are tried one by one, and each failure is noted for its record. A single record that
/// took too long is not tried again.
pub(super) async fn deliver_all<D: Delivery<Error = Failure>, H: Handler>(
    delivery: &mut D,
    handler: &H,
    records: &mut Vec<Record<D::Event>>,
    limit: Duration,
) -> Result<(), Failure> {
    let Err(failure) = deliver(delivery, records, Split::Slow).await else { return Ok(()) };
    if !failure.may_be_of_a_record() || !timeout(limit, handler.dependency_works()).await.unwrap_or(false) {
        return Err(failure);
    }
    records.retain(|record| !delivery.is_finished(record));
    if failure.took_too_long() && !records.is_empty() {
        // The delivery ended with this record. It was called alone, because `Split::Slow` calls each
        // record of a slow call alone.
        let slow = records.remove(0);
        delivery.fail(&slow, failure).await?;
    }
    deliver(delivery, records, Split::Failing).await
}

/// Hands records to a handler, all at once if possible. The SQL error of one record rolls back the
/// whole transaction. So when a call is rejected, its records are halved until the rejected one is
/// alone: one bad record among 2,000 costs about 22 calls and not 2,000. The first half comes
/// first, so the order is kept. With [`Split`], records are also tried one by one. A record counts
/// as rejected after two rejected calls, the second one with it alone: a panic that happens once
/// rejects nothing.
///
/// A halved call takes about half as long, so all rejected calls before the first success take
/// about as long as the first one. The caller's time limit for a split batch therefore leaves time
/// for progress.
///
/// # Errors
/// A failure that concerns no single record. The records that succeeded before the failure have taken
/// effect.
pub(super) async fn deliver<D: Delivery>(
    delivery: &mut D,
    records: &mut [Record<D::Event>],
    split: Split,
) -> Result<(), D::Error> {
    // The parts that are left to do. The next one is last.
    let mut parts = vec![];
    match split {
        Split::Failing => parts.extend(singles(0..records.len())),
        Split::Rejected | Split::Slow => parts.push(0..records.len()),
    }
    let mut is_first_call = split != Split::Failing;
    while let Some(part) = parts.pop() {
        if part.is_empty() {
            continue;
        }
        let was_first_call = mem::take(&mut is_first_call);
        let Err(failure) = delivery.attempt(&mut records[part.clone()]).await else { continue };
        match (failure.rejection(), part.len()) {
            (Some(_), 1) if was_first_call => parts.push(part),
            (Some(reason), 1) => delivery.reject(&records[part.start], reason).await?,
            (Some(_), length) => {
                let middle = part.start + length / 2;
                parts.push(middle..part.end);
                parts.push(part.start..middle);
            }
            (None, 2..) if split == Split::Slow && failure.took_too_long() => parts.extend(singles(part)),
            (None, 1) if split == Split::Failing && failure.may_be_of_a_record() => {
                delivery.fail(&records[part.start], failure).await?;
            }
            (None, _) => return Err(failure.into()),
        }
    }
    Ok(())
}

/// Each record alone, the first one last.
fn singles(part: Range<usize>) -> impl Iterator<Item = Range<usize>> {
    part.rev().map(|index| index..index + 1)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::events::{UserEvent, UserRef, mint_id};

    /// Rejects some records, by their position in the batch, and finds some too slow together with
    /// others.
    #[derive(Default)]
    struct Scripted {
        rejects: Vec<i64>,
        slow: Vec<i64>,
        /// Too slow also when called alone.
        hangs: Vec<i64>,
        /// Whether only the first call is rejected.
        panics_once: bool,
        calls: usize,
        applied: Vec<i64>,
        rejected: Vec<i64>,
        failed: Vec<i64>,
    }

    impl Delivery for Scripted {
        type Event = UserEvent;
        type Error = Failure;

        async fn attempt(&mut self, records: &mut [Record<UserEvent>]) -> Result<(), Failure> {
            self.calls += 1;
            let positions: Vec<i64> = records.iter().map(|record| record.envelope.version).collect();
            let has = |some: &[i64]| positions.iter().any(|position| some.contains(position));
            if has(&self.rejects) || (self.panics_once && self.calls == 1) {
                return Err(Failure::Reject("never"));
            }
            if (positions.len() > 1 && has(&self.slow)) || has(&self.hangs) {
                return Err(anyhow::Error::new(TookTooLong(Duration::from_secs(1))).into());
            }
            self.applied.extend(positions);
            Ok(())
        }

        async fn reject(&mut self, record: &Record<UserEvent>, _reason: String) -> Result<(), Failure> {
            // Every record before this one has taken effect or was rejected.
            let position = record.envelope.version;
            assert_eq!(self.applied.len() + self.rejected.len(), position as usize);
            self.rejected.push(position);
            Ok(())
        }

        async fn fail(&mut self, record: &Record<UserEvent>, _failure: Failure) -> Result<(), Failure> {
            self.failed.push(record.envelope.version);
            Ok(())
        }

        fn is_finished(&self, record: &Record<UserEvent>) -> bool {
            self.applied.contains(&record.envelope.version)
        }
    }

    fn sample(records: i64) -> Vec<Record<UserEvent>> {
        let event = || UserEvent::Deleted(UserRef { user_id: mint_id() });
        (0..records).map(|position| Record::sample(mint_id(), position, event())).collect()
    }

    async fn delivered(mut delivery: Scripted, records: i64, split: Split) -> Result<Scripted, Failure> {
        deliver(&mut delivery, &mut sample(records), split).await?;
        Ok(delivery)
    }

    /// A handler whose dependency works, or does not.
    struct Depends(bool);

    impl Handler for Depends {
        type Event = UserEvent;
        const GROUP: &'static str = "depends";

        async fn handle(&self, _batch: &[Record<UserEvent>]) -> Result<Outcome, Failure> {
            Ok(Outcome::default())
        }

        async fn dependency_works(&self) -> bool {
            self.0
        }
    }

    /// A redrive and a replay must get past a record that always takes too long.
    #[tokio::test]
    async fn a_record_that_takes_too_long_alone_fails_and_the_others_are_delivered() {
        let limit = Duration::from_secs(1);
        for (records, hangs) in [(1, vec![0]), (10, vec![0]), (10, vec![9]), (10, vec![3, 4, 8])] {
            let mut delivery = Scripted { hangs: hangs.clone(), ..Scripted::default() };
            deliver_all(&mut delivery, &Depends(true), &mut sample(records), limit).await.unwrap();
            let others: Vec<i64> = (0..records).filter(|position| !hangs.contains(position)).collect();
            assert_eq!((delivery.failed, delivery.applied), (hangs.clone(), others));
            // All together once, and each alone at most once.
            assert!(delivery.calls <= records as usize + 1, "{} calls of {records} records", delivery.calls);

            let mut delivery = Scripted { hangs, ..Scripted::default() };
            let failure = deliver_all(&mut delivery, &Depends(false), &mut sample(records), limit).await.unwrap_err();
            assert!(failure.took_too_long() && delivery.failed.is_empty(), "a dependency is down");
        }
    }

    #[tokio::test]
    async fn one_rejected_record_of_a_full_batch_costs_few_calls_and_keeps_the_order() {
        for rejected in [0, 1, 999, 1_000, 1_999] {
            let delivery = Scripted { rejects: vec![rejected], ..Scripted::default() };
            let delivery = delivered(delivery, 2_000, Split::Rejected).await.unwrap();
            assert_eq!(delivery.rejected, [rejected]);
            let others: Vec<i64> = (0..2_000).filter(|position| *position != rejected).collect();
            assert_eq!(delivery.applied, others);
            assert!(delivery.calls <= 23, "{} calls", delivery.calls);
        }
    }

    #[tokio::test]
    async fn a_batch_in_which_every_record_is_rejected_is_rejected_in_order() {
        let all: Vec<i64> = (0..100).collect();
        let delivery = Scripted { rejects: all.clone(), ..Scripted::default() };
        let delivery = delivered(delivery, 100, Split::Rejected).await.unwrap();
        assert_eq!((delivery.rejected, delivery.applied), (all, vec![]));
        assert_eq!(delivery.calls, 199);
    }

    #[tokio::test]
    async fn a_call_that_is_rejected_once_rejects_no_record() {
        for records in [1, 2, 7] {
            let delivery = Scripted { panics_once: true, ..Scripted::default() };
            let delivery = delivered(delivery, records, Split::Rejected).await.unwrap();
            assert_eq!((delivery.applied.len(), delivery.rejected.len()), (records as usize, 0));
        }
    }

    #[tokio::test]
    async fn records_that_are_too_slow_together_are_tried_one_by_one_only_on_a_retry() {
        let slow = || Scripted { slow: vec![3], rejects: vec![7], ..Scripted::default() };
        let failure = delivered(slow(), 10, Split::Rejected).await.err().unwrap();
        assert!(failure.took_too_long());
        let delivery = delivered(slow(), 10, Split::Slow).await.unwrap();
        assert_eq!(delivery.applied, [0, 1, 2, 3, 4, 5, 6, 8, 9]);
        assert_eq!(delivery.rejected, [7]);
    }

    /// A value that cannot be decoded is the same each time. A server that does not answer is not.
    #[test]
    fn an_outage_is_not_the_fault_of_a_record() {
        let outages = [sqlx::Error::PoolTimedOut, sqlx::Error::PoolClosed, sqlx::Error::WorkerCrashed];
        for error in outages {
            assert!(Failure::from(error).is_outage());
        }
        assert!(Failure::from(OneByOneTooLong).is_outage());
        let decoding = [sqlx::Error::Decode("not a date".into()), sqlx::Error::RowNotFound];
        for error in decoding {
            assert!(!Failure::from(error).is_outage());
        }
        assert!(!Failure::Reject("never").is_outage());
    }
}
