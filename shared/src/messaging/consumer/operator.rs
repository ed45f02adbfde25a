//! The records that block their partitions in this process, and an operator's decision to
//! dead-letter one of them. The admin port passes it on. Only the consumer of the partition may act
//! on it, because it must store the offset.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::sync::oneshot;
use tokio::time::timeout;

use crate::messaging::record::Coordinates;

/// How long a consumer may take to notice a decision. Longer than a turn usually takes.
const TAKE_TIMEOUT: Duration = Duration::from_secs(30);

/// The records that block partitions of this process, by coordinates and group.
#[derive(Clone, Default)]
pub struct BlockedRecords(Arc<Mutex<BTreeMap<Key, Option<Decision>>>>);

type Key = (Coordinates, &'static str);

/// An operator's decision to dead-letter a record.
pub(super) struct Decision {
    pub reason: String,
    answer: oneshot::Sender<Result<(), String>>,
}

impl Decision {
    /// Answers the operator.
    pub fn answer(self, result: Result<(), String>) {
        // Fails if the operator's request has ended.
        let _ = self.answer.send(result);
    }
}

/// A record in the list, for as long as this value exists.
pub(super) struct Listed {
    records: BlockedRecords,
    key: Key,
}

impl Listed {
    /// The operator's decision about the record, once.
    pub fn decision(&self) -> Option<Decision> {
        self.records.lock().get_mut(&self.key)?.take()
    }
}

/// Drops a decision that was not followed: the operator gets an error.
impl Drop for Listed {
    fn drop(&mut self) {
        self.records.lock().remove(&self.key);
    }
}

impl BlockedRecords {
    pub(super) fn list(&self, coordinates: Coordinates, group: &'static str) -> Listed {
        let key = (coordinates, group);
        self.lock().insert(key.clone(), None);
        Listed { records: self.clone(), key }
    }

    /// Whether a consumer waits at the record.
    pub fn contains(&self, coordinates: &Coordinates) -> bool {
        self.lock().keys().any(|(blocked, _)| blocked == coordinates)
    }

    /// Passes the decision to every consumer that waits at the record.
    pub fn decide(&self, coordinates: &Coordinates, reason: &str) -> Vec<Decided> {
        let mut waiting = vec![];
        for ((blocked, group), decision) in self.lock().iter_mut() {
            if blocked == coordinates {
                let (answer, receiver) = oneshot::channel();
                *decision = Some(Decision { reason: reason.to_owned(), answer });
                waiting.push(Decided { group, answer: receiver });
            }
        }
        waiting
    }

    /// Waits for the consumer's answer. If the consumer does not take the decision in time, for
    /// example because an operator has paused it, the decision is withdrawn: what is recorded as
    /// failed is not done later. A consumer that has taken it is writing the letter, so its answer
    /// is waited for. If the process dies before that, the action has no outcome.
    pub async fn until_followed(
        &self,
        coordinates: &Coordinates,
        decided: Decided,
    ) -> (&'static str, Result<(), String>) {
        self.followed(coordinates, decided, TAKE_TIMEOUT).await
    }

    async fn followed(
        &self,
        coordinates: &Coordinates,
        decided: Decided,
        limit: Duration,
    ) -> (&'static str, Result<(), String>) {
        let Decided { group, mut answer } = decided;
        let answered = match timeout(limit, &mut answer).await {
            Ok(answered) => answered,
            Err(_) if self.withdraw(coordinates, group) => {
                let busy = "nothing was done, because the consumer is busy, paused or waits for a dependency; look \
                            at /status and try again";
                return (group, Err(busy.to_owned()));
            }
            Err(_) => answer.await,
        };
        let moved = "the record does not block its partition any more, another process has it, or a later request replaced this one; \
                     look at the list of actions";
        (group, answered.unwrap_or_else(|_| Err(moved.to_owned())))
    }

    /// Takes a decision back. False if the consumer has already taken it.
    fn withdraw(&self, coordinates: &Coordinates, group: &'static str) -> bool {
        let mut records = self.lock();
        records.get_mut(&(coordinates.clone(), group)).is_some_and(|decision| decision.take().is_some())
    }

    fn lock(&self) -> MutexGuard<'_, BTreeMap<Key, Option<Decision>>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A decision that was passed to a consumer.
pub struct Decided {
    group: &'static str,
    /// What the consumer answers. Closed without an answer if the record no longer blocks its
    /// partition in this process.
    answer: oneshot::Receiver<Result<(), String>>,
}

#[cfg(test)]
mod tests {
    use std::pin::pin;

    use super::*;

    const LIMIT: Duration = Duration::from_millis(10);

    fn coordinates() -> Coordinates {
        Coordinates { topic: "some.events.v1".to_owned(), partition: 3, offset: 7 }
    }

    #[test]
    fn a_decision_reaches_the_consumers_that_wait_at_the_record() {
        let records = BlockedRecords::default();
        let listed = records.list(coordinates(), "a.b");
        assert!(listed.decision().is_none());
        let other = Coordinates { offset: 8, ..coordinates() };
        assert!(records.decide(&other, "why").is_empty());
        let mut waiting = records.decide(&coordinates(), "why");
        let decision = listed.decision().unwrap();
        assert_eq!(decision.reason, "why");
        assert!(listed.decision().is_none(), "a decision is made once");
        decision.answer(Ok(()));
        assert_eq!(waiting.remove(0).answer.try_recv(), Ok(Ok(())));
    }

    #[test]
    fn a_record_that_does_not_block_any_more_gets_no_decision() {
        let records = BlockedRecords::default();
        let listed = records.list(coordinates(), "a.b");
        let mut waiting = records.decide(&coordinates(), "why");
        drop(listed);
        assert!(waiting.remove(0).answer.try_recv().is_err());
        assert!(records.decide(&coordinates(), "why").is_empty());
    }

    #[tokio::test]
    async fn a_decision_that_no_consumer_takes_is_withdrawn() {
        let records = BlockedRecords::default();
        let listed = records.list(coordinates(), "a.b");
        let decided = records.decide(&coordinates(), "why").remove(0);
        let (group, followed) = records.followed(&coordinates(), decided, LIMIT).await;
        assert_eq!(group, "a.b");
        assert!(followed.unwrap_err().starts_with("nothing was done"));
        assert!(listed.decision().is_none(), "a consumer that resumes later would follow it");
    }

    #[tokio::test]
    async fn a_decision_that_a_consumer_has_taken_is_waited_for() {
        let records = BlockedRecords::default();
        let listed = records.list(coordinates(), "a.b");
        let decided = records.decide(&coordinates(), "why").remove(0);
        let taken = listed.decision().unwrap();
        let mut followed = pin!(async { records.followed(&coordinates(), decided, LIMIT).await });
        assert!(timeout(LIMIT * 2, &mut followed).await.is_err(), "the outcome is not known yet");
        taken.answer(Ok(()));
        assert_eq!(followed.await, ("a.b", Ok(())));
    }
}
