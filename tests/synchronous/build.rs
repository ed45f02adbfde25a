//! `sqlx::migrate!` reads files that Cargo does not track.
fn main() {
    println!("cargo::rerun-if-changed=migrations");
}
