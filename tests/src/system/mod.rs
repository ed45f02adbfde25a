//! One Waybill for one test: its own services on the shared components. The tests are isolated by
//! topic prefix, database and key prefix. A test that breaks a component starts its own.

mod drain;
mod own;
mod secured;
mod stack;

use std::collections::BTreeMap;

use redis::Client;
use testbed::postgres::Database;
use testbed::process::Logs;
use testbed::services;
use testbed::stack::Ports;
use testbed::testing;
use topology::{CONSOLE, EMAIL, Service, USER};

use crate::kafka::Kafka;
use crate::mail::Mail;
use crate::processes::Processes;
use crate::stores::Stores;
use crate::users::Users;
use stack::OwnStack;

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
    own: Option<OwnStack>,
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

    /// As [`System::start_only`], with further variables for these services.
    pub async fn start_with(services: &[Service], settings: &[(&str, &str)]) -> Self {
        let mut system = Self::empty().await;
        system.processes.set_all(settings);
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
        let client = Client::open(shared.valkey.as_str()).unwrap();
        let kafka = Kafka::new(shared.kafka, testing::prefix());
        Self::of(kafka, Mail::start().await, Valkey { client, url: shared.valkey }, databases, None)
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
        let own = OwnStack::start(ports, |_| None).await;
        let databases = own.migrated_databases().await;
        let kafka = Kafka::new(own.stack.kafka_addresses(), testing::prefix());
        let url = own.stack.redis.url();
        let client = Client::open(url.as_str()).unwrap();
        Self::of(kafka, Mail::of(own.stack.sink.clone()), Valkey { client, url }, databases, Some(own))
    }

    fn of(
        kafka: Kafka,
        mail: Mail,
        valkey: Valkey,
        databases: BTreeMap<&'static str, Database>,
        own: Option<OwnStack>,
    ) -> Self {
        let prefix = kafka.prefixed("");
        let mut environment = vec![
            ("KAFKA_BROKERS".to_owned(), kafka.address.clone()),
            ("TOPIC_PREFIX".to_owned(), prefix.clone()),
            ("VALKEY_URL".to_owned(), valkey.url),
            ("SMTP_HOST".to_owned(), mail.address().ip().to_string()),
            ("SMTP_PORT".to_owned(), mail.address().port().to_string()),
            ("IDEMPOTENCY_SECRET".to_owned(), "a secret of the tests, long enough for a secret".to_owned()),
            ("BACKOFF_MS".to_owned(), "200".to_owned()),
        ];
        for service in topology::with_database() {
            environment.push((service.database_url_setting(), databases[service.name].url.clone()));
        }
        let logs = if prefix.is_empty() { testing::prefix() } else { prefix.clone() };
        let processes = Processes::new(environment, Logs::to_files(&format!("tests/{logs}")).unwrap());
        Self {
            users: Users::new(processes.addresses()),
            kafka,
            mail,
            stores: Stores::new(databases, valkey.client, prefix),
            processes,
            seed: seed(),
            own,
        }
    }
}

impl System {
    /// The variables with which the console finds this system, and where it logs.
    pub(crate) fn for_console(&self) -> (Vec<(String, String)>, &Logs) {
        let (mut environment, logs) = self.processes.for_console();
        // On secured components it logs in as itself.
        let own = self.own.iter().zip(CONSOLE);
        environment.extend(own.flat_map(|(own, console)| services::environment_of_console(console, &own.stack)));
        (environment, logs)
    }
}

/// The Valkey of a system, as the services and as the tests connect to it.
struct Valkey {
    url: String,
    client: Client,
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
