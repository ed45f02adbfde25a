//! Dead letters: records that a consumer group could not handle, kept until a [redrive] settles
//! them.
//!
//! A letter about a fact contains the whole record. A letter about a state is a pointer: it
//! contains the record's coordinates and not its data, because a copy would remain after the
//! original is erased.
//!
//! The topic `<group>.dlq` is a table and not a queue. It is compacted and keyed by the coordinates
//! of the record, so a record has one letter however often it is dead-lettered, and a settled
//! letter is a tombstone.

mod letter;
mod table;
mod list;
mod redrive;

pub(crate) use letter::declared_topic;
pub(super) use letter::{DeadLetter, DeadLetterWriter};
pub use list::{ListDeadLetters, list_dead_letters};
pub use redrive::{Redrive, redrive};
pub(crate) use table::count_open_dead_letters;
