//! The results: on the terminal, as JSON, and as docs/performance.md.

mod chart;
mod figures;
mod files;
mod outcome;
mod page;

pub use chart::{Bar, bars};
pub use figures::{Figure, Spread};
pub use files::write;
pub use outcome::{Bound, Machine, Report};
