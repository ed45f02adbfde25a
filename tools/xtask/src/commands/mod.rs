pub mod check;
pub mod demo;
pub mod full;
pub mod prepare;
mod report;
pub mod seeded;
pub mod soak;
pub mod test;
pub mod up;
