pub mod check;
pub mod demo;
pub mod prepare;
pub mod seeded;
pub mod soak;
pub mod test;
pub mod up;
