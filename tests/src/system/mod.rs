//! One Waybill for one test: its own services on the shared components. The tests are isolated by
//! topic prefix, database and key prefix. A test that breaks a component starts its own.

mod drain;
mod own;

use std::collections::BTreeMap;

use testbed::postgres::Database;
use testbed::process::{Logs, Scratch};
use testbed::stack::{Ports, Stack};
use testbed::testing;
use topology::{EMAIL, Service, USER};

use crate::kafka::Kafka;
use crate::mail::Mail;
use crate::processes::Processes;
use crate::stores::Stores;
use crate::users::Users;

pub use own::Own;

/// Its facets are fields, so a test can wait on one of them while it changes another.
pub struct System {
    pub users: Users,
    pub kafka: Kafka,
    pub mail: Mail,
    pub stores: Stores,
    pub processes: Processes,
    /// The random choices of a test follow from the seed. Set `WAYBILL_SEED` to repeat a run.
    pub seed: u64,
    /// The components of this system. `None` on the shared components.
    stack: Option<Stack>,
    _scratch: Option<Scratch>,
}

impl System {
    /// All four services, ready, on the shared components.
    pub async fn start() -> Self {
        let mut system = Self::empty().await;
        system.processes.start_all().await;
        system
    }

    /// These services, ready, on the shared components.
    pub async fn start_only(services: &[Service]) -> Self {
        let mut system = Self::empty().await;
        system.processes.start(services).await;
        system
    }

    /// The user service and the email service, ready, the latter with further variables. Every
    /// state of every delivery is recorded.
    pub async fn start_mailing(settings: &[(&str, &str)]) -> Self {
        let mut system = Self::start_only(&[USER, EMAIL]).await;
        system.stores.record_deliveries().await;
        // A second start, because the recording needs the tables and must begin before a fault
        // point is reached.
        if !settings.is_empty() {
            system.processes.start_with(EMAIL, settings).await;
        }
        system
    }

    /// No service yet, on the shared components.
    pub async fn empty() -> Self {
        let shared = testing::stack();
        let mut databases = BTreeMap::new();
        for service in topology::with_database() {
            databases.insert(service.name, testing::database(service).await);
        }
        Self::new(shared.kafka, shared.valkey, databases, None, None).await
    }

    /// No service yet, on a Kafka, a Postgres and a Valkey of its own.
    pub async fn empty_on_own_components() -> Self {
        Self::empty_on(Ports::free()).await
    }

    /// No service yet, on three Kafka brokers, a Postgres and a Valkey of its own.
    pub async fn empty_on_three_brokers() -> Self {
        Self::empty_on(Ports::free_three_brokers()).await
    }

    async fn empty_on(ports: Ports) -> Self {
        let scratch = Scratch::create("own-components").unwrap();
        let logs = Logs::to_files(&format!("tests/components-{}", testing::prefix())).unwrap();
        let fetched = testbed::fetch::fetch().await.unwrap();
        let durability = testbed::postgres::Durability::Process;
        let stack = Stack::start(&fetched, scratch.path(), ports, durability, &logs).await.unwrap();
        let mut databases = BTreeMap::new();
        for service in topology::with_database() {
            let database = stack.postgres.database(service);
            database.migrate(service).await.unwrap();
            databases.insert(service.name, database);
        }
        Self::new(stack.kafka_addresses(), stack.redis.url(), databases, Some(stack), Some(scratch)).await
    }

    async fn new(
        kafka: String,
        valkey: String,
        databases: BTreeMap<&'static str, Database>,
        stack: Option<Stack>,
        scratch: Option<Scratch>,
    ) -> Self {
        let prefix = testing::prefix();
        let mail = Mail::start().await;
        let mut environment = vec![
            ("KAFKA_BROKERS".to_owned(), kafka.clone()),
            ("TOPIC_PREFIX".to_owned(), prefix.clone()),
            ("VALKEY_URL".to_owned(), valkey.clone()),
            ("SMTP_HOST".to_owned(), mail.address().ip().to_string()),
            ("SMTP_PORT".to_owned(), mail.address().port().to_string()),
            ("IDEMPOTENCY_SECRET".to_owned(), "a secret of the tests, long enough for a secret".to_owned()),
            ("BACKOFF_MS".to_owned(), "200".to_owned()),
        ];
        for service in topology::with_database() {
            environment.push((service.database_url_setting(), databases[service.name].url.clone()));
        }
        let processes = Processes::new(environment, Logs::to_files(&format!("tests/{prefix}")).unwrap());
        Self {
            users: Users::new(processes.addresses()),
            kafka: Kafka::new(kafka, prefix.clone()),
            mail,
            stores: Stores::new(databases, valkey, prefix),
            processes,
            seed: seed(),
            stack,
            _scratch: scratch,
        }
    }
}

/// `WAYBILL_SEED`, or a random number.
fn seed() -> u64 {
    match std::env::var("WAYBILL_SEED") {
        Ok(seed) => seed.parse().expect("WAYBILL_SEED is a number"),
        Err(_) => fastrand::u64(..),
    }
}

impl Drop for System {
    fn drop(&mut self) {
        if std::thread::panicking() {
            let logs = self.processes.folder().display();
            eprintln!("the logs of this test's services: {logs}; to repeat it: WAYBILL_SEED={}", self.seed);
        }
    }
}
