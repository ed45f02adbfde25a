//! Components that belong to one system.

use std::collections::BTreeMap;
use std::path::Path;

use testbed::fetch::{Fetched, fetch};
use testbed::postgres::{Database, Durability};
use testbed::process::{Logs, Scratch};
use testbed::secured::Secured;
use testbed::stack::{Access, Ports, Stack};
use testbed::testing;

/// A Kafka, a Postgres, a Valkey and a mail server. They end when this is dropped.
pub struct OwnStack {
    pub stack: Stack,
    pub fetched: Fetched,
    pub logs: Logs,
    _scratch: Scratch,
}

impl OwnStack {
    /// `secured` may make certificates and passwords in a folder; then the stack is secured.
    pub async fn start(ports: Ports, secured: impl FnOnce(&Path) -> Option<Secured>) -> Self {
        let scratch = Scratch::create("own-components").unwrap();
        let logs = Logs::to_files(&format!("tests/components-{}", testing::prefix())).unwrap();
        let fetched = fetch().await.unwrap();
        let secured = secured(scratch.path());
        let access = secured.as_ref().map_or(Access::Open, Access::Secured);
        let stack = Stack::start(&fetched, scratch.path(), ports, Durability::Process, access, &logs).await.unwrap();
        Self { stack, fetched, logs, _scratch: scratch }
    }

    /// The database of each service that has one, with its migrations applied.
    pub async fn migrated_databases(&self) -> BTreeMap<&'static str, Database> {
        let mut databases = BTreeMap::new();
        for service in topology::with_database() {
            let database = self.stack.database(service);
            database.migrate(service).await.unwrap();
            databases.insert(service.name, database);
        }
        databases
    }
}
