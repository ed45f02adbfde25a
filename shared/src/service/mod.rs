//! The process: what every `main.rs` calls. A [`Service`] opens the admin port first, so that
//! `/status` can report what the process waits for. Every long-running task is a visible call in
//! `main`. A task that ends early ends the process.

mod command;
mod config;
mod create_topics;

pub use crate::messaging::AdminCommand;
pub use command::{Command, DatabaseCommand};
pub use config::ServiceConfig;
pub use create_topics::create_topics;

use std::net::SocketAddr;

use anyhow::Context;
use axum::Router;
use opentelemetry_sdk::trace::SdkTracerProvider;
use prometheus_client::metrics::counter::Counter;
use sqlx::PgPool;
use sqlx::migrate::Migrator;
use sqlx::postgres::PgConnectOptions;
use tokio::net::TcpListener;
use tokio::signal::unix::{SignalKind, signal};
use tokio::task::JoinSet;
use tokio::time::{Duration, sleep, timeout};
use tokio_util::sync::CancellationToken;

use crate::events::Topic;
use crate::messaging::{
    self, Consumer, ConsumerSetup, Declared, Handler, Operations, Relay, RelayConfig, Topics, Wake,
};
use crate::platform::access::{Gate, PublicRoutes, Rates, Tokens};
use crate::platform::admin::{self, Guard};
use crate::platform::health::{self, Health};
use crate::platform::http::Layers;
use crate::platform::metrics::Metrics;
use crate::platform::server::Server;
use crate::platform::{database, http, telemetry};

/// Connections to the admin port: those of probes, of a collector of metrics, and of people.
const ADMIN_CONNECTIONS: usize = 64;
/// How much earlier than SHUTDOWN_MS a port closes the connections whose request is not answered.
const CLOSE_BEFORE_SHUTDOWN: Duration = Duration::from_millis(500);
/// How long the export of the last spans may take.
const FLUSH_TIMEOUT: Duration = Duration::from_secs(1);
/// The component of `/readyz` that waits until `main` has started all tasks, including the public
/// port.
const START: &str = "start";
/// The component of `/readyz` that waits for the end of the process.
const STOP: &str = "stop";

/// A running process and its tasks.
pub struct Service {
    name: &'static str,
    config: ServiceConfig,
    topics: Topics,
    health: Health,
    metrics: Metrics,
    /// Checks the tokens of requests. `None`: none are required.
    tokens: Option<Tokens>,
    /// Cancelled by SIGTERM. The process is not ready any more, and still serves.
    draining: CancellationToken,
    /// Cancelled when the process stops.
    stop: CancellationToken,
    /// What operators do on the admin port.
    operations: Operations,
    /// Whether the tasks that all consumers need were started.
    consumes: bool,
    tasks: JoinSet<(String, anyhow::Result<()>)>,
    traces: SdkTracerProvider,
}

/// Stops the threads of a process whose start fails; otherwise the process would wait for them
/// indefinitely.
impl Drop for Service {
    fn drop(&mut self) {
        self.stop.cancel();
    }
}

impl Service {
    /// Installs telemetry and opens the admin port.
    ///
    /// # Errors
    /// The admin port is in use, a setting of telemetry or of the admin port is invalid, or two
    /// settings contradict each other.
    pub async fn start(name: &'static str, config: &ServiceConfig) -> anyhow::Result<Self> {
        config.check()?;
        config.http.reserve_files()?;
        let mut config = config.clone();
        config.kafka.kafka_client_id.get_or_insert_with(|| format!("waybill-{name}"));
        let metrics = Metrics::new(config.telemetry.exports_spans());
        let traces = telemetry::init(name, &config.telemetry, &metrics)?;
        let operations = Operations::new(&config.kafka, name);
        let topics = Topics::new(&config.kafka)?;
        let mut service = Self {
            name,
            config,
            topics,
            health: Health::default(),
            metrics,
            tokens: None,
            draining: CancellationToken::new(),
            stop: CancellationToken::new(),
            operations,
            consumes: false,
            tasks: JoinSet::new(),
            traces,
        };
        service.health.waiting(START, "all tasks of the process to start");
        let routes = health::router(service.health.clone(), service.metrics.clone());
        let routes = routes.merge(messaging::admin_routes(service.operations.clone()));
        let routes = http::with_whole_bodies(routes, service.config.http.read_timeout());
        let routes = admin::guarded(routes, Guard::new(&service.config.admin_tokens, service.config.admin_addr)?);
        let routes = http::identified(routes, service.draining.clone());
        let overloaded = http::identified(http::overloaded(), service.draining.clone());
        let admin = service.server(routes, overloaded, ADMIN_CONNECTIONS, Counter::default());
        service.listen("ADMIN_ADDR", service.config.admin_addr, admin).await?;
        service.watch_signals()?;
        service.watch_kafka();
        service.require_tokens().await?;
        Ok(service)
    }

    /// Makes the public routes require tokens, if the settings say whose.
    async fn require_tokens(&mut self) -> anyhow::Result<()> {
        match Tokens::start(&self.config.auth, self.health.clone()).await? {
            Some((tokens, reading)) => {
                self.tokens = Some(tokens);
                self.spawn("token keys", reading);
            }
            None => tracing::warn!(
                "requests need no token: any caller may read and change everything; set AUTH_JWKS_FILE or AUTH_JWKS_URL"
            ),
        }
        Ok(())
    }

    /// Reports whether Kafka can be reached, and ends the process when a file of its login changes.
    fn watch_kafka(&mut self) {
        let kafka = self.config.kafka.clone();
        let health = self.health.clone();
        let stop = self.stop.clone();
        // Reported here, because the thread may start after the process has reported that it runs.
        messaging::report_unknown_connection(&health);
        self.thread("Kafka connection".to_owned(), move || messaging::watch_connection(&kafka, &health, &stop));
        self.spawn("Kafka files", messaging::watch_files(self.config.kafka.clone()));
    }

    /// Waits until the database has the migrations of this release; applies them if the role may.
    /// From then on `/readyz` reports whether the database answers, and `/status` whether it is
    /// writable.
    ///
    /// # Errors
    /// The URL is malformed, the server rejects the login, a migration fails or was applied with
    /// another text, or the process is stopped.
    pub async fn database(&mut self, url: &str, migrations: &Migrator) -> anyhow::Result<PgPool> {
        let db = database::connect(url, migrations, &self.health, &self.stop).await?;
        self.spawn("database watch", database::watch(db.clone(), self.health.clone()));
        Ok(db)
    }

    /// Creates the topics that this service owns, or checks that they are as declared. Then watches
    /// them. Runs in the background.
    pub fn own_topics(&mut self, topics: &'static [Topic]) {
        let declared: Vec<Declared> = topics.iter().map(|topic| Declared::of(&self.config.kafka, topic)).collect();
        let topics = self.topics.clone();
        let health = self.health.clone();
        let metrics = self.metrics.clone();
        metrics.register_topics();
        self.spawn("topics", async move {
            topics.ensure(&declared).await?;
            tracing::info!("the topics of this service exist as declared");
            topics.watch(&declared, &health, &metrics).await
        });
    }

    /// Publishes the outbox in `db`. Call `notify` on the result after each commit that wrote to
    /// the outbox.
    pub fn relay(&mut self, db: &PgPool, config: &RelayConfig) -> Wake {
        self.metrics.register_outbox();
        let wake = Wake::default();
        let database: PgConnectOptions = (*db.connect_options()).clone();
        let relay = Relay {
            source: format!("/{}", self.name),
            config: config.clone(),
            kafka: self.config.kafka.clone(),
            topics: self.topics.clone(),
            database: database.clone(),
            wake: wake.clone(),
            health: self.health.clone(),
            metrics: self.metrics.clone(),
            stop: self.stop.clone(),
        };
        self.thread("relay".to_owned(), move || relay.run());
        let listening = messaging::listen_for_wake(database, config.outbox_name.clone(), wake.clone());
        self.spawn("outbox notifications", listening);
        wake
    }

    /// Consumes the handler's topic as its consumer group, on as many threads as configured.
    pub fn consume<H: Handler + Clone>(&mut self, handler: H) {
        let group = H::GROUP;
        self.record_actions();
        self.metrics.register_consumers();
        let group_metrics = self.metrics.of_group(group);
        for number in 0..self.config.consumers {
            let setup = ConsumerSetup {
                number,
                handler: handler.clone(),
                kafka: self.config.kafka.clone(),
                topics: self.topics.clone(),
                breaker: self.config.breaker.clone(),
                batch_records: self.config.batch_records,
                exports_spans: self.config.telemetry.exports_spans(),
                resumed: self.operations.resumed().subscribe(),
                paused: self.operations.paused().subscribe(),
                blocked_records: self.operations.blocked_records().clone(),
                health: self.health.clone(),
                metrics: self.metrics.clone(),
                group_metrics: group_metrics.clone(),
                stop: self.stop.clone(),
            };
            // Reported here, because the thread may start after `run` has reported that all tasks
            // have started.
            self.health.report(&setup.component("group"), "its thread to start");
            self.thread(format!("{group} consumer {number}"), move || Consumer::run(setup));
        }
        let topic = messaging::dead_letter_topic(&self.config.kafka, group);
        self.keep_topic(&format!("{group} dead-letter topic"), topic);
        let (index, redriver, jobs) = self.operations.add(handler, &self.stop);
        let kafka = self.config.kafka.clone();
        let metrics = self.metrics.clone();
        let stop = self.stop.clone();
        self.thread(format!("{group} dead letters"), move || index.follow(&kafka, group, &metrics, &stop));
        self.thread(format!("{group} redrives"), move || redriver.run(jobs));
    }

    /// Keeps the topic in which the actions of operators are recorded, and waits at the stop for
    /// those in progress. Only once, with the first consumer group.
    fn record_actions(&mut self) {
        if std::mem::replace(&mut self.consumes, true) {
            return;
        }
        self.keep_topic("topic of the operators' actions", messaging::actions_topic(&self.config.kafka));
        self.spawn_draining("actions of operators", self.operations.clone().finish(self.stop.clone()));
    }

    /// Creates a topic that every service with consumers writes, or checks it, and then watches it.
    fn keep_topic(&mut self, task: &str, topic: Declared) {
        let topics = self.topics.clone();
        let health = self.health.clone();
        let metrics = self.metrics.clone();
        self.spawn(task, async move {
            let declared = [topic];
            topics.ensure(&declared).await?;
            topics.watch(&declared, &health, &metrics).await
        });
    }

    /// Serves the public routes.
    ///
    /// # Errors
    /// The port is in use.
    pub async fn http(&mut self, addr: SocketAddr, routes: PublicRoutes) -> anyhow::Result<()> {
        let limits = &self.config.http;
        let layers = Layers {
            metrics: self.metrics.clone(),
            gate: Gate {
                tokens: self.tokens.clone(),
                rates: Rates::of_requests(&self.config.rates, &self.metrics),
                trusted_proxies: self.config.rates.trusted_proxies.clone().into(),
            },
            trust_trace_context: self.config.telemetry.trust_trace_context,
            body_timeout: limits.read_timeout(),
            requests: limits.http_requests as usize,
            draining: self.draining.clone(),
        };
        let connections = limits.http_connections as usize;
        let routes = http::layered(routes, &layers);
        let overloaded = http::observed_by(http::overloaded(), &layers);
        let server = self.server(routes, overloaded, connections, self.metrics.http_connections_refused.clone());
        self.listen("HTTP_ADDR", addr, server).await
    }

    fn server(&self, routes: Router, overloaded: Router, connections: usize, refused: Counter) -> Server {
        Server {
            routes,
            overloaded,
            connections,
            read_timeout: self.config.http.read_timeout(),
            shutdown: self.config.shutdown() - CLOSE_BEFORE_SHUTDOWN,
            refused,
        }
    }

    /// Runs a task of the service. The task is cancelled when the process stops; it must not end
    /// before.
    pub fn spawn(&mut self, name: &str, task: impl Future<Output = anyhow::Result<()>> + Send + 'static) {
        let name = name.to_owned();
        let stop = self.stop.clone();
        self.tasks.spawn(async move {
            tokio::select! {
                result = task => (name, result),
                () = stop.cancelled() => (name, Ok(())),
            }
        });
    }

    /// Runs a task that must not be cancelled in the middle of its work. It watches
    /// [`Service::stopping`] itself and returns soon after.
    pub fn spawn_draining(&mut self, name: &str, task: impl Future<Output = anyhow::Result<()>> + Send + 'static) {
        let name = name.to_owned();
        self.tasks.spawn(async move { (name, task.await) });
    }

    /// Cancelled when the process stops.
    pub fn stopping(&self) -> CancellationToken {
        self.stop.clone()
    }

    pub fn metrics(&self) -> Metrics {
        self.metrics.clone()
    }

    pub fn health(&self) -> Health {
        self.health.clone()
    }

    /// Runs until a stop signal or the end of a task. Then waits until every task has finished its
    /// work in progress, for at most SHUTDOWN_MS.
    ///
    /// # Errors
    /// A task failed or ended early. The process then exits with a non-zero status, and its
    /// supervisor restarts it.
    pub async fn run(mut self) -> anyhow::Result<()> {
        self.health.ready(START);
        tracing::info!(service.name = self.name, "started");
        let mut early = None;
        tokio::select! {
            () = self.stop.cancelled() => {}
            Some(ended) = self.tasks.join_next() => early = Some(ended),
        }
        let early = early.filter(|_| !self.stop.is_cancelled());
        self.stop.cancel();
        let drained = timeout(self.config.shutdown(), async { while self.tasks.join_next().await.is_some() {} }).await;
        // A collector that does not answer must not delay the exit.
        let _ = self.traces.shutdown_with_timeout(FLUSH_TIMEOUT);
        let result = match early {
            None => Ok(()),
            Some(Ok((task, Ok(())))) => Err(anyhow::anyhow!("the task {task} ended early")),
            Some(Ok((task, Err(error)))) => Err(error.context(format!("the task {task} failed"))),
            Some(Err(panic)) => Err(anyhow::Error::new(panic).context("a task panicked")),
        };
        if drained.is_err() {
            // A thread is blocked in a call to a dependency that does not answer, and the runtime
            // would wait for it indefinitely. Nothing is lost: every task tolerates a crash at any
            // line.
            tracing::warn!("some tasks did not finish in time; exiting without them");
            if let Err(error) = &result {
                tracing::error!(error = %format!("{error:#}"), "the service failed");
            }
            std::process::exit(i32::from(result.is_err()));
        }
        tracing::info!(service.name = self.name, "stopped");
        result
    }

    /// Runs a task on its own OS thread, because calls of librdkafka block. The runtime's handle is
    /// available there.
    fn thread(&mut self, name: String, task: impl FnOnce() -> anyhow::Result<()> + Send + 'static) {
        self.tasks.spawn_blocking(move || (name, task()));
    }

    async fn listen(&mut self, setting: &str, addr: SocketAddr, server: Server) -> anyhow::Result<()> {
        let listener = TcpListener::bind(addr)
            .await
            .with_context(|| format!("cannot listen on {addr}: set {setting} to a free address"))?;
        self.spawn_draining(setting, server.run(listener, self.stop.clone()));
        Ok(())
    }

    /// SIGTERM stops the process after DRAIN_MS, a second signal or SIGINT at once. SIGUSR1 resumes
    /// the consumers whose breaker is open. It never ends a process, not even one without
    /// consumers.
    fn watch_signals(&mut self) -> anyhow::Result<()> {
        let mut terminate = signal(SignalKind::terminate())?;
        let mut interrupt = signal(SignalKind::interrupt())?;
        let mut resume = signal(SignalKind::user_defined1())?;
        let stop = self.stop.clone();
        let draining = self.draining.clone();
        let health = self.health.clone();
        let resumed = self.operations.resumed().clone();
        let drain = self.config.drain();
        self.spawn_draining("signals", async move {
            loop {
                tokio::select! {
                    _ = terminate.recv() => break,
                    _ = interrupt.recv() => stop.cancel(),
                    () = stop.cancelled() => return Ok(()),
                    _ = resume.recv() => {
                        tracing::info!("SIGUSR1: resuming the consumers whose breaker is open");
                        resumed.send_replace(());
                    }
                }
            }
            tracing::info!(drain_ms = drain.as_millis(), "SIGTERM: not ready any more, and stopping soon");
            health.waiting(STOP, "the process to stop");
            draining.cancel();
            tokio::select! {
                () = sleep(drain) => {}
                _ = terminate.recv() => {}
                _ = interrupt.recv() => {}
                () = stop.cancelled() => {}
            }
            stop.cancel();
            Ok(())
        });
        Ok(())
    }
}
