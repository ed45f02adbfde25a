//! Cargo does not see that `sqlx::migrate!` reads files.
fn main() {
    println!("cargo::rerun-if-changed=../../migrations/user");
}
