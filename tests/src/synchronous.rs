//! The synchronous version of Waybill (`tests/synchronous`) as processes, for its own tests and for
//! the comparison.

use std::collections::BTreeMap;
use std::fmt;
use std::path::Path;
use std::time::Duration;

use reqwest::{Client, RequestBuilder, StatusCode};
use serde_json::json;
use sqlx::PgPool;
use testbed::postgres::create_database;
use testbed::process::{Logs, Process, command};
use testbed::services::SYNCHRONOUS;
use testbed::testing;
use topology::{ANALYTICS, USER};
use uuid::Uuid;

use crate::http::{Answer, send};
use crate::mail::Mail;
use crate::stores::count;

/// Its migrations, and on a busy machine the start itself, take seconds.
const READY_LIMIT: Duration = Duration::from_secs(60);
/// Longer than it waits for its requests in progress.
const STOP_LIMIT: Duration = Duration::from_secs(20);

/// How the receivers are called.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Variant {
    Sequential,
    Parallel,
    Resilient,
    Background,
}

impl Variant {
    /// Those that do nothing after the answer.
    pub const WITHIN_THE_REQUEST: [Self; 3] = [Self::Sequential, Self::Parallel, Self::Resilient];

    pub fn name(self) -> &'static str {
        match self {
            Self::Sequential => "sequential",
            Self::Parallel => "parallel",
            Self::Resilient => "resilient",
            Self::Background => "background",
        }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Role {
    User,
    Analytics,
    Cache,
    /// Only in the program with a fourth receiver, see [`Synchronous::add_search`].
    Search,
}

impl Role {
    /// Those of the program as it is.
    pub const ALL: [Self; 3] = [Self::User, Self::Analytics, Self::Cache];
}

/// The name of the subcommand.
impl fmt::Display for Role {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::User => "user",
            Self::Analytics => "analytics",
            Self::Cache => "cache",
            Self::Search => "search",
        })
    }
}

/// One process of each role. They end when this is dropped.
pub struct Synchronous {
    pub mail: Mail,
    environment: Vec<(String, String)>,
    ports: BTreeMap<Role, u16>,
    running: BTreeMap<Role, Process>,
    /// The URLs of the databases, as the role that owns the tables.
    users: String,
    counts: String,
    logs: Logs,
}

impl Synchronous {
    /// All roles, ready, on the shared components.
    pub async fn start(variant: Variant) -> Self {
        let mut synchronous = Self::empty(variant).await;
        synchronous.start_all().await;
        synchronous
    }

    /// No process yet, on the shared components.
    pub async fn empty(variant: Variant) -> Self {
        let shared = testing::stack();
        let id = Uuid::now_v7().simple();
        let database = async |role: &str, service| {
            let name = format!("synchronous_{role}_{id}");
            create_database(&shared.postgres, &name, service).await.expect("the shared Postgres runs").owner_url
        };
        let users = database("user", USER).await;
        let counts = database("analytics", ANALYTICS).await;
        let mail = Mail::start().await;
        let roles = Role::ALL.into_iter().chain([Role::Search]);
        let ports: BTreeMap<Role, u16> = roles.map(|role| (role, testing::free_port())).collect();
        let url = |role| format!("http://127.0.0.1:{}", ports[&role]);
        let settings = [
            ("VARIANT", variant.name().to_owned()),
            ("USER_DATABASE_URL", users.clone()),
            ("ANALYTICS_DATABASE_URL", counts.clone()),
            ("VALKEY_URL", shared.valkey),
            ("KEY_PREFIX", testing::prefix()),
            ("SMTP_HOST", mail.address().ip().to_string()),
            ("SMTP_PORT", mail.address().port().to_string()),
            ("IDEMPOTENCY_SECRET", "a secret of the tests, long enough for a secret".to_owned()),
            ("USER_URL", url(Role::User)),
            ("ANALYTICS_URL", url(Role::Analytics)),
            ("CACHE_URL", url(Role::Cache)),
            ("SEARCH_URL", url(Role::Search)),
        ];
        let environment = settings.map(|(name, value)| (name.to_owned(), value)).into();
        let logs = Logs::to_files(&format!("tests/synchronous-{id}")).unwrap();
        Self { mail, environment, ports, running: BTreeMap::new(), users, counts, logs }
    }

    /// Starts all roles and waits until they are ready.
    pub async fn start_all(&mut self) {
        for role in Role::ALL {
            self.start_role(role).await;
        }
    }

    /// Starts a role, or starts it again, and waits until it is ready.
    pub async fn start_role(&mut self, role: Role) {
        self.start_from(role, &testing::stack().programs).await;
    }

    /// As [`Synchronous::start_role`], with the program in another folder.
    pub async fn start_from(&mut self, role: Role, programs: &Path) {
        self.running.remove(&role);
        let mut command = command(programs.join(SYNCHRONOUS));
        command.arg(role.to_string()).envs(self.environment.iter().map(|(name, value)| (name, value)));
        command.env("HTTP_ADDR", format!("127.0.0.1:{}", self.ports[&role]));
        let mut process = Process::spawn(&role.to_string(), command, &self.logs).unwrap();
        let client = Client::new();
        let url = self.url(role, "/readyz");
        let is_ready = async || client.get(&url).send().await.is_ok_and(|answer| answer.status().is_success());
        process.until_ready(READY_LIMIT, is_ready).await.unwrap();
        self.running.insert(role, process);
    }

    /// Adds the fourth receiver while the others run: starts it, and replaces the registering
    /// process by one that calls it. `programs` is the folder of the program with `tests/compare`
    /// applied. Returns the database of the index.
    pub async fn add_search(&mut self, programs: &Path) -> PgPool {
        let name = format!("synchronous_search_{}", Uuid::now_v7().simple());
        let database = create_database(&testing::stack().postgres, &name, ANALYTICS).await.unwrap();
        self.set("SEARCH_DATABASE_URL", &database.owner_url);
        self.start_from(Role::Search, programs).await;
        let user = self.running.get_mut(&Role::User).expect("the role runs");
        user.signal_terminate();
        tokio::time::timeout(STOP_LIMIT, user.wait()).await.expect("it ends after the requests in progress");
        self.start_from(Role::User, programs).await;
        PgPool::connect(&database.owner_url).await.unwrap()
    }

    /// SIGKILL. The process has ended when this returns.
    pub fn kill(&mut self, role: Role) {
        self.running.remove(&role);
    }

    /// Sets a variable for every process that is started from now on.
    pub fn set(&mut self, name: &str, value: &str) {
        self.environment.retain(|(known, _)| known != name);
        self.environment.push((name.to_owned(), value.to_owned()));
    }

    pub fn setting(&self, name: &str) -> &str {
        let (_, value) = self.environment.iter().find(|(known, _)| known == name).unwrap();
        value
    }

    pub fn pids(&self) -> Vec<u32> {
        self.running.values().map(Process::pid).collect()
    }

    pub fn url(&self, role: Role, path: &str) -> String {
        format!("http://127.0.0.1:{}{path}", self.ports[&role])
    }

    /// `POST /users`, not yet sent.
    pub fn registration(&self, email: &str, key: Option<&str>) -> RequestBuilder {
        let body = json!({ "email": email, "display_name": "Ada Lovelace" });
        let request = Client::new().post(self.url(Role::User, "/users")).json(&body);
        match key {
            Some(key) => request.header("idempotency-key", key),
            None => request,
        }
    }

    /// Registers a user. Returns its id, and the receivers that the answer names as missing.
    pub async fn register(&self, email: &str, key: &str) -> (Uuid, Vec<String>) {
        let answer = send(self.registration(email, Some(key))).await.unwrap();
        assert_eq!(answer.status, StatusCode::CREATED, "{answer:?}");
        (answer.id(), missing(&answer))
    }

    /// `GET /profiles/{id}`.
    pub async fn profile(&self, id: Uuid) -> reqwest::Result<Answer> {
        send(Client::new().get(self.url(Role::Cache, &format!("/profiles/{id}")))).await
    }

    /// The database of the role `user`.
    pub async fn users(&self) -> PgPool {
        PgPool::connect(&self.users).await.unwrap()
    }

    /// The database of the role `analytics`.
    pub async fn counts(&self) -> PgPool {
        PgPool::connect(&self.counts).await.unwrap()
    }

    /// The number of users.
    pub async fn registered(&self) -> i64 {
        count(&self.users().await, "select count(*) from users").await
    }

    /// The registrations that analytics has counted.
    pub async fn counted(&self) -> i64 {
        count(&self.counts().await, "select coalesce(sum(registrations), 0)::bigint from registrations").await
    }

    /// The calls with an outcome that the running process of the role `user` has counted.
    pub async fn calls(&self, outcome: &str) -> f64 {
        let page = Client::new().get(self.url(Role::User, "/metrics")).send().await.unwrap().text().await.unwrap();
        let outcome = format!("outcome=\"{outcome}\"");
        let lines = page.lines().filter(|line| line.starts_with("calls_total{") && line.contains(&outcome));
        lines.filter_map(|line| line.rsplit_once(' ')?.1.parse::<f64>().ok()).sum()
    }
}

/// The receivers that an answer names as missing.
pub fn missing(answer: &Answer) -> Vec<String> {
    let missing = answer.body["missing"].as_array().cloned().unwrap_or_default();
    missing.iter().filter_map(|name| name.as_str().map(str::to_owned)).collect()
}
