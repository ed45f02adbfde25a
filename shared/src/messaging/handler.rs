//! What a service does with events. A handler gets a batch of records; those of one partition are
//! in order. The same event can come again at any time, even after newer ones: the relay duplicates
//! it, or it is retried, redriven or replayed. So the effects of facts must commute, and for state
//! the highest version must win.

use std::collections::HashSet;
use std::ops::AddAssign;
use std::panic::AssertUnwindSafe;
use std::slice;

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
    /// A dependency is down: the batch is retried until the dependency is back. The operator `?`
    /// makes this variant.
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

/// When records are tried one by one, so that one of them does not delay the others.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Split {
    /// After a call in which a record was rejected.
    Rejected,
    /// Also after a call that took too long.
    Slow,
    /// From the beginning, because the batch has failed several times.
    Failing,
}

/// As [`deliver`], for a caller that does not wait until a failing record succeeds: a redrive or a
/// replay. If the delivery fails although the handler's dependency works, the records that have not
/// taken effect are tried one by one, and each failure is noted for its record.
pub(super) async fn deliver_all<D: Delivery<Error = Failure>, H: Handler>(
    delivery: &mut D,
    handler: &H,
    records: &mut Vec<Record<D::Event>>,
    limit: Duration,
) -> Result<(), Failure> {
    // A single record that took too long is not tried again.
    let split = if records.len() > 1 { Split::Slow } else { Split::Rejected };
    match deliver(delivery, records, split).await {
        Err(failure) if failure.may_be_of_a_record() && !failure.took_too_long() => {
            if !timeout(limit, handler.dependency_works()).await.unwrap_or(false) {
                return Err(failure);
            }
            records.retain(|record| !delivery.is_finished(record));
            deliver(delivery, records, Split::Failing).await
        }
        result => result,
    }
}

/// Hands records to a handler: first all at once, then one by one if [`Split`] says so. The SQL
/// error of one record rolls back the whole transaction, so every record is tried again.
///
/// # Errors
/// A failure that concerns no single record. The records that succeeded one by one before the failure
/// have taken effect.
pub(super) async fn deliver<D: Delivery>(
    delivery: &mut D,
    records: &mut [Record<D::Event>],
    split: Split,
) -> Result<(), D::Error> {
    if records.is_empty() {
        return Ok(());
    }
    if split != Split::Failing {
        match delivery.attempt(records).await {
            Ok(()) => return Ok(()),
            Err(failure) if failure.rejection().is_some() => {}
            Err(failure) if failure.took_too_long() && split == Split::Slow => {}
            Err(failure) => return Err(failure.into()),
        }
    }
    for record in records {
        match delivery.attempt(slice::from_mut(record)).await {
            Ok(()) => {}
            Err(failure) => match failure.rejection() {
                Some(reason) => delivery.reject(record, reason).await?,
                None if split == Split::Failing && failure.may_be_of_a_record() => {
                    delivery.fail(record, failure).await?;
                }
                None => return Err(failure.into()),
            },
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

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
