//! The records that block their partitions in this process, and an operator's decision to
//! dead-letter one of them. The admin port passes it on. Only the consumer of the partition may act
//! on it, because it must store the offset.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::sync::oneshot;

use crate::messaging::record::Coordinates;

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

    /// Passes the decision to every consumer that waits at the record. Returns their groups and the
    /// receivers of their answers.
    pub fn decide(&self, coordinates: &Coordinates, reason: &str) -> Vec<Decided> {
        let mut waiting = vec![];
        for ((blocked, group), decision) in self.lock().iter_mut() {
            if blocked == coordinates {
                let (answer, receiver) = oneshot::channel();
                *decision = Some(Decision { reason: reason.to_owned(), answer });
                waiting.push((*group, receiver));
            }
        }
        waiting
    }

    fn lock(&self) -> MutexGuard<'_, BTreeMap<Key, Option<Decision>>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A group, and what its consumer answers.
pub type Decided = (&'static str, oneshot::Receiver<Result<(), String>>);

#[cfg(test)]
mod tests {
    use super::*;

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
        assert_eq!(waiting.remove(0).1.try_recv(), Ok(Ok(())));
    }

    #[test]
    fn a_record_that_does_not_block_any_more_gets_no_decision() {
        let records = BlockedRecords::default();
        let listed = records.list(coordinates(), "a.b");
        let mut waiting = records.decide(&coordinates(), "why");
        drop(listed);
        assert!(waiting.remove(0).1.try_recv().is_err());
        assert!(records.decide(&coordinates(), "why").is_empty());
    }
}
