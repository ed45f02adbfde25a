//! The journey of an event: [`outbox`] → [`relay`] → (topic) → [`consumer`] → [`handler`] or [`inbox`] → [`dead_letters`]
//! → [`redrive`]; and once more from the beginning: [`replay`].

mod consumer;
mod dead_letters;
mod handler;
mod inbox;
mod listing;
pub mod outbox;
mod record;
mod redrive;
mod relay;
mod replay;
mod topics;

pub(crate) use consumer::Consumer;
pub(crate) use dead_letters::count_open;
pub use handler::{Failure, Handler, Outcome};
pub use inbox::{Inbox, Projection};
pub use listing::{ListDeadLetters, list_dead_letters};
pub(crate) use outbox::measure as measure_outbox;
pub use record::{Record, Source};
pub use redrive::{Redrive, redrive};
pub(crate) use relay::Relay;
pub use relay::Wake;
pub use replay::Replay;
pub(crate) use topics::ensure as ensure_topics;
