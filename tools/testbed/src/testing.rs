//! What tests use: the stack that `cargo xtask test` has started for all of them, and databases and
//! name prefixes of their own on it.

use std::path::PathBuf;

use sqlx::PgPool;
use sqlx::migrate::Migrator;
use uuid::Uuid;

use crate::postgres::{self, Database};
use crate::services::Service;

pub use crate::ports::free as free_port;

/// The stack that all tests share. A test isolates itself by a topic prefix, a database and a key
/// prefix. A test that breaks a component starts its own.
#[derive(Clone, Debug)]
pub struct TestStack {
    /// `host:port`.
    pub kafka: String,
    /// The superuser's URL.
    pub postgres: String,
    pub valkey: String,
    /// The folder with the services' programs, built with fault points.
    pub programs: PathBuf,
}

// The variables in which `cargo xtask test` passes the stack to the tests.
pub const KAFKA: &str = "WAYBILL_TEST_KAFKA";
pub const POSTGRES: &str = "WAYBILL_TEST_POSTGRES";
pub const VALKEY: &str = "WAYBILL_TEST_VALKEY";
pub const PROGRAMS: &str = "WAYBILL_TEST_PROGRAMS";

pub fn stack() -> TestStack {
    TestStack {
        kafka: variable(KAFKA),
        postgres: variable(POSTGRES),
        valkey: variable(VALKEY),
        programs: variable(PROGRAMS).into(),
    }
}

/// Creates a database for one test, with the service's migrations applied.
pub async fn database(service: Service) -> Database {
    let database = empty_database(service).await;
    database.migrate(service).await.expect("the migrations apply to an empty database");
    database
}

/// Creates an empty database for one test.
pub async fn empty_database(service: Service) -> Database {
    let name = format!("test_{}_{}", service.name, Uuid::now_v7().simple());
    postgres::create_database(&stack().postgres, &name, service).await.expect("the shared Postgres runs")
}

/// Creates a database for one test, with these migrations applied. Returns a pool of connections of
/// the role that owns the tables, because tests also change tables.
pub async fn migrated_database(service: Service, migrations: &Migrator) -> PgPool {
    let url = empty_database(service).await.owner_url;
    let pool = PgPool::connect(&url).await.expect("the database was created just now");
    migrations.run(&pool).await.expect("the migrations apply to an empty database");
    pool
}

/// A prefix for the topics and consumer groups, or for the keys, of one test.
pub fn prefix() -> String {
    format!("t{}.", Uuid::now_v7().simple())
}

fn variable(name: &str) -> String {
    std::env::var(name).unwrap_or_else(|_| {
        panic!("{name} is not set: run the tests with `cargo xtask test`, which starts what they need")
    })
}
