//! Dead letters: records that a consumer group could not handle, kept until a redrive settles
//! them or an operator discards them. [`admin`](super::admin) has what operators can do with them.
//!
//! A letter about a fact contains the whole record. A letter about a state is a pointer: it
//! contains the record's coordinates and not its data, because a copy would remain after the
//! original is erased.
//!
//! The topic `<group>.dlq` is a table and not a queue. It is compacted and keyed by the coordinates
//! of the record, so a record has one letter however often it is dead-lettered, and a settled
//! letter is a tombstone.

mod letter;
mod index;
mod page;
mod redrive;

pub(super) use index::LetterIndex;
pub(crate) use letter::declared_topic;
pub(super) use letter::{DeadLetter, DeadLetterWriter};
pub(super) use page::{Filter, Line, page};
pub(super) use redrive::{Chosen, Job, Progress, Redriver};
