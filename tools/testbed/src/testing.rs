//! What tests ask for: the stack that `cargo xtask test` has started for all of them, and something of their own on it.

use std::path::PathBuf;

use uuid::Uuid;

use crate::postgres;

pub use crate::ports::free as free_port;

/// Where the shared stack is. Tests keep apart by topic prefix, database and key prefix; one that breaks a component starts its
/// own.
#[derive(Clone, Debug)]
pub struct TestStack {
    /// `host:port`.
    pub kafka: String,
    /// Of the superuser.
    pub postgres: String,
    pub valkey: String,
    /// The folder with the services' programs, built with fault points.
    pub programs: PathBuf,
}

pub const KAFKA: &str = "WAYBILL_TEST_KAFKA";
pub const POSTGRES: &str = "WAYBILL_TEST_POSTGRES";
pub const VALKEY: &str = "WAYBILL_TEST_VALKEY";
pub const BIN: &str = "WAYBILL_TEST_BIN";

pub fn stack() -> TestStack {
    TestStack {
        kafka: variable(KAFKA),
        postgres: variable(POSTGRES),
        valkey: variable(VALKEY),
        programs: variable(BIN).into(),
    }
}

/// An empty database for one test, owned by the role of a service; its URL for that role.
pub async fn database(service: &str) -> String {
    let name = format!("test_{service}_{}", Uuid::now_v7().simple());
    let url = postgres::create_database(&stack().postgres, &name, &postgres::role(service)).await;
    url.expect("the shared Postgres runs")
}

/// A prefix for the topics and groups, or the keys, of one test.
pub fn prefix() -> String {
    format!("t{}.", Uuid::now_v7().simple())
}

fn variable(name: &str) -> String {
    std::env::var(name)
        .unwrap_or_else(|_| panic!("{name} is not set: run `cargo xtask test`, which starts what the tests need"))
}
