//! One Waybill for one test: services of its own on the shared components, kept apart by topic prefix, databases and key
//! prefix; or on components of its own, where the test breaks those.

mod processes;
mod run;

use std::collections::{BTreeMap, BTreeSet};
use std::net::SocketAddr;
use std::sync::Mutex;
use std::sync::atomic::AtomicBool;

use sqlx::PgPool;
use testbed::process::{Logs, Scratch};
use testbed::services::{ANALYTICS, CACHE, EMAIL, Instance, RunningService, SERVICES, Service, USER};
use testbed::smtp_sink::SmtpSink;
use testbed::stack::{Ports, Stack};
use testbed::testing;
use uuid::Uuid;

pub use processes::is_frozen;

use crate::proxy::Proxy;

/// A service's name, as in `services/<name>`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Part {
    User,
    Email,
    Analytics,
    Cache,
}

impl Part {
    pub const ALL: [Self; 4] = [Self::User, Self::Email, Self::Analytics, Self::Cache];

    fn service(self) -> Service {
        match self {
            Self::User => USER,
            Self::Email => EMAIL,
            Self::Analytics => ANALYTICS,
            Self::Cache => CACHE,
        }
    }
}

pub struct System {
    services: BTreeMap<Part, RunningService>,
    ports: BTreeMap<Part, Instance>,
    /// How often each service was started, and which of them ended by themselves.
    starts: BTreeMap<Part, usize>,
    ended: Vec<String>,
    /// Started with a fault point, so that their end is wanted.
    expected_to_end: BTreeSet<Part>,
    /// Killed or stopped, and not started again.
    stopped: BTreeSet<Part>,
    copies: AtomicBool,
    copies_logs: Mutex<Vec<Logs>>,
    compacted: AtomicBool,
    by_hand: Mutex<BTreeSet<Uuid>>,
    /// What is random in a test follows from it. Set `WAYBILL_SEED` to repeat a run.
    pub seed: u64,
    environment: Vec<(String, String)>,
    logs: Logs,
    pub prefix: String,
    pub kafka: String,
    pub valkey: String,
    pub sink: SmtpSink,
    /// Only of a system on components of its own.
    pub stack: Option<Stack>,
    _scratch: Option<Scratch>,
}

impl System {
    /// All four services, ready, on the shared components.
    pub async fn start() -> Self {
        let mut system = Self::empty().await;
        system.start_all().await;
        system
    }

    /// No service yet, on the shared components.
    pub async fn empty() -> Self {
        let shared = testing::stack();
        let mut databases = vec![];
        for service in SERVICES.into_iter().filter(|service| service.has_database) {
            databases.push((service.database_url_setting(), testing::database(service).await));
        }
        Self::new(shared.kafka, shared.valkey, databases, None, None).await
    }

    /// No service yet, on a Kafka, a Postgres and a Valkey of this test's own.
    pub async fn empty_on_own_components() -> Self {
        Self::empty_on(Ports::free()).await
    }

    /// The same with three brokers.
    pub async fn empty_on_three_brokers() -> Self {
        Self::empty_on(Ports::free_three()).await
    }

    async fn empty_on(ports: Ports) -> Self {
        let scratch = Scratch::create("own-components").unwrap();
        let logs = Logs::to_files(&format!("tests/components-{}", testing::prefix())).unwrap();
        let fetched = testbed::fetch::fetch().await.unwrap();
        let durability = testbed::postgres::Durability::Process;
        let stack = Stack::start(&fetched, scratch.path(), ports, durability, &logs).await.unwrap();
        let databases = stack.postgres.database_urls().collect();
        let (kafka, valkey) = (stack.kafka_addresses(), stack.redis.url());
        Self::new(kafka, valkey, databases, Some(stack), Some(scratch)).await
    }

    /// All four services, ready, on components of this test's own.
    pub async fn start_on_own_components() -> Self {
        let mut system = Self::empty_on_own_components().await;
        system.start_all().await;
        system
    }

    async fn new(
        kafka: String,
        valkey: String,
        databases: Vec<(String, String)>,
        stack: Option<Stack>,
        scratch: Option<Scratch>,
    ) -> Self {
        let prefix = testing::prefix();
        let sink = SmtpSink::start(SocketAddr::from(([127, 0, 0, 1], 0))).await.unwrap();
        let settings = [
            ("KAFKA_BROKERS", kafka.clone()),
            ("TOPIC_PREFIX", prefix.clone()),
            ("VALKEY_URL", valkey.clone()),
            ("SMTP_HOST", sink.address().ip().to_string()),
            ("SMTP_PORT", sink.address().port().to_string()),
            ("IDEMPOTENCY_SECRET", "a secret of the tests, long enough for a secret".to_owned()),
            ("BACKOFF_MS", "200".to_owned()),
        ];
        let settings = settings.map(|(name, value)| (name.to_owned(), value));
        let environment = settings.into_iter().chain(databases);
        Self {
            services: BTreeMap::new(),
            ports: Part::ALL.map(|part| (part, Instance::on_free_ports(part.service()))).into(),
            starts: BTreeMap::new(),
            ended: vec![],
            expected_to_end: BTreeSet::new(),
            stopped: BTreeSet::new(),
            copies: AtomicBool::new(false),
            copies_logs: Mutex::default(),
            compacted: AtomicBool::new(false),
            by_hand: Mutex::default(),
            seed: seed(),
            environment: environment.collect(),
            logs: Logs::to_files(&format!("tests/{prefix}")).unwrap(),
            prefix,
            kafka,
            valkey,
            sink,
            stack,
            _scratch: scratch,
        }
    }

    /// Replaces a setting for every service that is started from now on.
    pub fn set(&mut self, name: &str, value: &str) {
        self.environment.retain(|(known, _)| known != name);
        self.environment.push((name.to_owned(), value.to_owned()));
    }

    /// What the services are told under this name.
    pub fn setting(&self, name: &str) -> &str {
        let (_, value) = self.environment.iter().find(|(known, _)| known == name).unwrap();
        value
    }

    /// A proxy before the service's database, and the settings with which a copy of the service goes through it.
    pub async fn proxied_database(&self, part: Part) -> (Proxy, (String, String)) {
        let name = database_url(part);
        let (proxy, through) = Proxy::before_url(self.setting(&name)).await;
        (proxy, (name, through))
    }

    /// The service's database, with the service's own rights.
    pub async fn database(&self, part: Part) -> PgPool {
        PgPool::connect(self.setting(&database_url(part))).await.unwrap()
    }

    pub async fn valkey(&self) -> redis::aio::MultiplexedConnection {
        redis::Client::open(self.valkey.as_str()).unwrap().get_multiplexed_async_connection().await.unwrap()
    }

    /// A topic's or group's name on the broker.
    pub fn prefixed(&self, name: &str) -> String {
        format!("{}{name}", self.prefix)
    }

    pub fn url(&self, part: Part, path: &str) -> String {
        format!("{}{path}", self.ports[&part].url())
    }

    pub fn admin_url(&self, part: Part, path: &str) -> String {
        format!("{}{path}", self.ports[&part].admin_url())
    }

    fn running(&mut self, part: Part) -> &mut RunningService {
        self.services.get_mut(&part).unwrap_or_else(|| panic!("{part:?} was not started"))
    }
}

/// `WAYBILL_SEED`, or another one each time.
fn seed() -> u64 {
    match std::env::var("WAYBILL_SEED") {
        Ok(seed) => seed.parse().expect("WAYBILL_SEED is a number"),
        Err(_) => fastrand::u64(..),
    }
}

fn database_url(part: Part) -> String {
    part.service().database_url_setting()
}

impl Drop for System {
    fn drop(&mut self) {
        if std::thread::panicking() {
            let logs = self.logs.folder().display();
            eprintln!("the logs of this test's services: {logs}; to repeat it: WAYBILL_SEED={}", self.seed);
        }
    }
}
