//! What a service does with events. A handler is called with a batch, in the order of the partitions; the same event may come
//! again, at any time, also after newer ones (a relay's duplicate, a retry, a redrive, a replay). So its effects commute (on
//! facts) or the highest version wins (on state).

use std::ops::AddAssign;
use std::panic::AssertUnwindSafe;

use futures::FutureExt;
use tokio::time::{Duration, timeout};

use super::Record;
use crate::events::Event;

/// A consumer of one topic.
pub trait Handler: Send + Sync + 'static {
    type Event: Event;

    /// Makes the batch's effects durable. Only then is the offset committed, so a crash anywhere in here means that the batch
    /// comes again.
    fn handle(&self, batch: &[Record<Self::Event>]) -> impl Future<Output = Result<Outcome, Failure>> + Send;

    /// Where to start reading a partition, for a handler that keeps its position beside its data. `None`: at the offset
    /// that is committed in Kafka, or the beginning if there is none.
    fn resume_at(&self, _partition: i32) -> impl Future<Output = anyhow::Result<Option<i64>>> + Send {
        async { Ok(None) }
    }

    /// Everything before `position` has been handled and there is nothing behind it now. Called on reaching the end and then
    /// every second while it stays so. `after` is the position before this call, as in [`Record::after`].
    fn caught_up(
        &self,
        _partition: i32,
        _after: i64,
        _position: i64,
    ) -> impl Future<Output = Result<(), Failure>> + Send {
        async { Ok(()) }
    }
}

/// Calls a handler, for at most `limit`: beyond that nobody answers at all (a frozen server, a network that is gone). A panic is a
/// bug met by this record; its message may quote the record, so it is not kept.
pub(super) async fn call<H: Handler>(
    handler: &H,
    batch: &[Record<H::Event>],
    limit: Duration,
) -> Result<Outcome, Failure> {
    let handled = AssertUnwindSafe(handler.handle(batch)).catch_unwind();
    match timeout(limit, handled).await {
        Ok(handled) => handled.unwrap_or(Err(Failure::Reject("the handler panicked"))),
        Err(_) => Err(anyhow::Error::new(TookTooLong(limit)).into()),
    }
}

#[derive(Debug, thiserror::Error)]
#[error("the handler did not end within {0:?}")]
struct TookTooLong(Duration);

/// Why a batch did not work. The caller of [`Handler::handle`] draws the consequence.
#[derive(Debug)]
pub enum Failure {
    /// A dependency is down: the same batch is tried again until it is back. This is what `?` makes.
    Retry(anyhow::Error),
    /// This record can never work: it becomes a dead letter. The reason is text of the program, never of the record.
    Reject(&'static str),
    /// My stored position is another than the batch assumes: drop the batch and start again where I say.
    Resume,
}

impl<E: Into<anyhow::Error>> From<E> for Failure {
    fn from(error: E) -> Self {
        Self::Retry(error.into())
    }
}

impl Failure {
    /// The reason to give the record up, if waiting cannot mend this failure: a rejection, or an SQLSTATE of class 22 (data
    /// exception) or 23 (integrity constraint), which the same data meets every time.
    pub(crate) fn rejection(&self) -> Option<String> {
        match self {
            Self::Reject(reason) => Some((*reason).to_owned()),
            Self::Retry(error) => error.chain().find_map(|cause| {
                let code = cause.downcast_ref::<sqlx::Error>()?.as_database_error()?.code()?;
                (code.starts_with("22") || code.starts_with("23")).then(|| format!("SQLSTATE {code}"))
            }),
            Self::Resume => None,
        }
    }

    /// Whether fewer records at once could help: the handler, or one of its statements (SQLSTATE 57014), was ended for the time
    /// it took.
    pub(crate) fn took_too_long(&self) -> bool {
        let Self::Retry(error) = self else { return false };
        error.chain().any(|cause| {
            let code = cause.downcast_ref::<sqlx::Error>().and_then(|error| error.as_database_error()?.code());
            cause.is::<TookTooLong>() || code.is_some_and(|code| code == "57014")
        })
    }
}

/// What became of the records of a batch. Their sum is the batch's length: nothing is dropped silently.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Outcome {
    /// It had its effect now.
    pub applied: u64,
    /// It had had its effect before.
    pub duplicate: u64,
    /// Something newer had been applied before.
    pub stale: u64,
}

impl AddAssign for Outcome {
    fn add_assign(&mut self, other: Self) {
        self.applied += other.applied;
        self.duplicate += other.duplicate;
        self.stale += other.stale;
    }
}
