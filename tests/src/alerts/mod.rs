//! The alerts of `deploy/observability`, and proof that they fire: a [`Recording`] of a real fault
//! is given to promtool, which evaluates the rules on it.

mod page;
pub mod promtool;
mod query;
mod recording;
mod rules;
mod series;

pub use page::Page;
pub use query::Query;
pub use recording::{Recording, SCRAPES};
pub use rules::{Alert, RULES, Rules, UNIT_TESTS};
