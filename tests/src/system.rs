//! One Waybill for one test: services of its own on the shared components, kept apart by topic prefix, databases and key
//! prefix; or on components of its own, where the test breaks those.

use std::collections::BTreeMap;
use std::net::SocketAddr;

use sqlx::PgPool;
use xtask::process::{Logs, Scratch};
use xtask::services::{ANALYTICS, CACHE, EMAIL, Running, Service, USER};
use xtask::smtp_sink::SmtpSink;
use xtask::stack::{Ports, Stack};
use xtask::testing;

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
    services: BTreeMap<Part, Running>,
    ports: BTreeMap<Part, Service>,
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
        for part in Part::ALL {
            system.spawn(part, &[]);
        }
        system.ready(&Part::ALL).await;
        system
    }

    /// No service yet, on the shared components.
    pub async fn empty() -> Self {
        let shared = testing::stack();
        let databases = [
            ("USER_DATABASE_URL", testing::database("user").await),
            ("EMAIL_DATABASE_URL", testing::database("email").await),
            ("ANALYTICS_DATABASE_URL", testing::database("analytics").await),
        ];
        Self::new(shared.kafka, shared.valkey, databases.into(), None, None).await
    }

    /// No service yet, on a Kafka, a Postgres and a Valkey of this test's own.
    pub async fn empty_on_own_components() -> Self {
        let scratch = Scratch::create("own-components").unwrap();
        let logs = Logs::fresh(&format!("tests/components-{}", testing::prefix()), false).unwrap();
        let fetched = xtask::fetch::fetch().await.unwrap();
        let durability = xtask::postgres::Durability::Process;
        let stack = Stack::start(&fetched, scratch.path(), Ports::free(), durability, &logs).await.unwrap();
        let databases = [
            ("USER_DATABASE_URL", stack.postgres.service_url("user")),
            ("EMAIL_DATABASE_URL", stack.postgres.service_url("email")),
            ("ANALYTICS_DATABASE_URL", stack.postgres.service_url("analytics")),
        ];
        let (kafka, valkey) = (stack.kafka.address(), stack.redis.url());
        Self::new(kafka, valkey, databases.into(), Some(stack), Some(scratch)).await
    }

    /// All four services, ready, on components of this test's own.
    pub async fn start_on_own_components() -> Self {
        let mut system = Self::empty_on_own_components().await;
        for part in Part::ALL {
            system.spawn(part, &[]);
        }
        system.ready(&Part::ALL).await;
        system
    }

    async fn new(
        kafka: String,
        valkey: String,
        databases: Vec<(&str, String)>,
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
        let environment = settings.into_iter().chain(databases);
        Self {
            services: BTreeMap::new(),
            ports: Part::ALL.map(|part| (part, part.service().on_free_ports())).into(),
            environment: environment.map(|(name, value)| (name.to_owned(), value)).collect(),
            logs: Logs::fresh(&format!("tests/{prefix}"), false).unwrap(),
            prefix,
            kafka,
            valkey,
            sink,
            stack,
            _scratch: scratch,
        }
    }

    /// Starts a service, without waiting, with further settings such as `FAULT_AT`. One that runs is killed first.
    pub fn spawn(&mut self, part: Part, settings: &[(&str, &str)]) {
        self.services.remove(&part);
        let further = settings.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned()));
        let environment: Vec<_> = self.environment.iter().cloned().chain(further).collect();
        let running = self.ports[&part].spawn(&testing::stack().programs, &environment, &self.logs).unwrap();
        self.services.insert(part, running);
    }

    /// Starts a service and waits until it is ready.
    pub async fn restart(&mut self, part: Part, settings: &[(&str, &str)]) {
        self.spawn(part, settings);
        self.ready(&[part]).await;
    }

    pub async fn ready(&mut self, parts: &[Part]) {
        for part in parts {
            self.running(*part).until_ready().await.unwrap();
        }
    }

    /// Runs a subcommand of the service to its end, for example `redrive`; what it printed.
    pub async fn run(&self, part: Part, arguments: &[&str]) -> anyhow::Result<String> {
        let program = testing::stack().programs.join(part.service().name);
        let mut command = tokio::process::Command::new(program);
        command.args(arguments).envs(self.environment.iter().cloned()).kill_on_drop(true);
        let output = tokio::time::timeout(crate::DEADLINE, command.output()).await??;
        let printed = String::from_utf8_lossy(&output.stdout).into_owned();
        anyhow::ensure!(output.status.success(), "{printed}{}", String::from_utf8_lossy(&output.stderr));
        Ok(printed)
    }

    /// SIGKILL; the service is gone when this returns.
    pub fn kill(&mut self, part: Part) {
        self.running(part).process.kill();
    }

    /// SIGSTOP.
    pub fn freeze(&mut self, part: Part) {
        self.running(part).process.freeze();
    }

    /// SIGCONT.
    pub fn thaw(&mut self, part: Part) {
        self.running(part).process.thaw();
    }

    /// SIGUSR1: what its breaker has paused goes on.
    pub fn resume(&mut self, part: Part) {
        self.running(part).process.signal_user1();
    }

    /// SIGTERM, and waits for the end.
    pub async fn stop(&mut self, part: Part) {
        self.running(part).stop().await;
    }

    /// Whether the process has ended, by itself or by a fault point.
    pub fn has_ended(&mut self, part: Part) -> bool {
        self.running(part).process.ended().is_some()
    }

    /// Whether the process is stopped, by [`System::freeze`] or by a fault point. Linux only.
    pub fn is_frozen(&mut self, part: Part) -> bool {
        let stat = std::fs::read_to_string(format!("/proc/{}/stat", self.running(part).process.pid()));
        stat.is_ok_and(|stat| stat.rsplit(") ").next().is_some_and(|state| state.starts_with('T')))
    }

    pub fn pid(&mut self, part: Part) -> u32 {
        self.running(part).process.pid()
    }

    /// What the service has logged so far, over all its starts.
    pub fn log_of(&self, part: Part) -> String {
        std::fs::read_to_string(self.logs.file(part.service().name)).unwrap_or_default()
    }

    /// A further copy of a service, beside the first, on ports of its own.
    pub fn spawn_another(&self, part: Part, settings: &[(&str, &str)]) -> Running {
        let logs = Logs::fresh(&format!("tests/{}-{}", self.prefix, uuid::Uuid::now_v7().simple()), false).unwrap();
        let further = settings.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned()));
        let environment: Vec<_> = self.environment.iter().cloned().chain(further).collect();
        part.service().on_free_ports().spawn(&testing::stack().programs, &environment, &logs).unwrap()
    }

    /// Replaces a setting for every service that is started from now on.
    pub fn set(&mut self, name: &str, value: &str) {
        self.environment.retain(|(known, _)| known != name);
        self.environment.push((name.to_owned(), value.to_owned()));
    }

    /// The service's database, with the service's own rights.
    pub async fn database(&self, part: Part) -> PgPool {
        let name = format!("{}_DATABASE_URL", part.service().name.to_uppercase());
        let (_, url) = self.environment.iter().find(|(known, _)| *known == name).unwrap();
        PgPool::connect(url).await.unwrap()
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

    fn running(&mut self, part: Part) -> &mut Running {
        self.services.get_mut(&part).unwrap_or_else(|| panic!("{part:?} was not started"))
    }
}

impl Drop for System {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("the logs of this test's services: {}", self.logs.folder().display());
        }
    }
}
