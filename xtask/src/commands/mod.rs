pub mod check;
pub mod demo;
pub mod prepare;
pub mod test;
pub mod up;
