//! What a system remembers of its run: what was started, what ended by itself, what the test wrote itself.

use std::collections::BTreeSet;
use std::sync::atomic::Ordering;

use uuid::Uuid;

use super::{Part, System};
use crate::log::Draft;

impl System {
    pub fn was_started(&self, part: Part) -> bool {
        self.starts.contains_key(&part)
    }

    /// Whether one process of the service has run from the start until now, and no copy of any service beside it.
    pub fn has_run_alone(&self, part: Part) -> bool {
        self.starts.get(&part) == Some(&1) && !self.copies.load(Ordering::Relaxed)
    }

    /// The services that ought to run now.
    pub fn running_parts(&self) -> Vec<Part> {
        self.starts.keys().filter(|part| !self.stopped.contains(part)).copied().collect()
    }

    pub fn started(&self) -> Vec<Part> {
        self.starts.keys().copied().collect()
    }

    /// Which processes have ended though nobody killed or stopped them.
    pub fn ended(&mut self) -> Vec<String> {
        let mut ended = self.ended.clone();
        for (part, running) in &mut self.services {
            if !self.stopped.contains(part)
                && let Some(status) = running.process.ended()
            {
                ended.push(format!("{part:?}: {status}"));
            }
        }
        ended
    }

    pub fn was_compacted(&self) -> bool {
        self.compacted.load(Ordering::Relaxed)
    }

    pub(crate) fn note_compaction(&self) {
        self.compacted.store(true, Ordering::Relaxed);
    }

    /// The ids of the events that were written without an outbox.
    pub fn written_by_hand(&self) -> BTreeSet<Uuid> {
        self.by_hand.lock().unwrap().clone()
    }

    pub(crate) fn note_by_hand(&self, draft: &Draft) {
        let id = draft.headers.iter().find(|(name, _)| name == "ce_id").and_then(|(_, id)| id.as_deref());
        self.by_hand.lock().unwrap().extend(id.and_then(|id| Uuid::try_parse_ascii(id).ok()));
    }

    /// Notes whether the service has ended though nobody made it.
    pub(super) fn bury(&mut self, part: Part) {
        if let Some(mut running) = self.services.remove(&part)
            && !self.expected_to_end.contains(&part)
            && !self.stopped.contains(&part)
            && let Some(status) = running.process.ended()
        {
            self.ended.push(format!("{part:?}: {status}"));
        }
    }
}
