//! The process: what every `main.rs` calls. A [`Service`] starts the admin port at once, so that `/readyz` can say what the
//! process waits for; every long-running part is a visible call in `main`; and a part that ends early ends the process.

mod config;
mod database;
mod health;
pub mod http;
pub mod metrics;
pub mod telemetry;

pub use config::{BreakerConfig, KafkaConfig, LogFormat, ServiceConfig};
pub use database::{bounded, pool};
pub use health::{Health, healthcheck};
pub use metrics::Metrics;

use std::net::SocketAddr;

use anyhow::Context;
use axum::Router;
use opentelemetry_sdk::trace::SdkTracerProvider;
use sqlx::PgPool;
use sqlx::migrate::Migrator;
use tokio::net::TcpListener;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::watch;
use tokio::task::JoinSet;
use tokio::time::{Duration, timeout};
use tokio_util::sync::CancellationToken;

use crate::events::Topic;
use crate::messaging::{self, Handler, Wake};

/// What is in hand when the signal comes is finished within this time. Container platforms give 10 s.
const SHUTDOWN_TIMEOUT: Duration = Duration::from_secs(8);
/// For the last spans.
const FLUSH_TIMEOUT: Duration = Duration::from_secs(1);
/// What readiness calls the time before every part of the process is there, the public port among them.
const START: &str = "start";

/// A running process and its parts.
pub struct Service {
    name: &'static str,
    config: ServiceConfig,
    health: Health,
    metrics: Metrics,
    stop: CancellationToken,
    /// Changes with each SIGUSR1.
    resumed: watch::Sender<()>,
    parts: JoinSet<(String, anyhow::Result<()>)>,
    traces: SdkTracerProvider,
}

/// A start that fails half-way ends the threads that run already; otherwise the process would wait for them for ever.
impl Drop for Service {
    fn drop(&mut self) {
        self.stop.cancel();
    }
}

impl Service {
    /// Installs telemetry and opens the admin port.
    ///
    /// # Errors
    /// The admin port is taken, or the telemetry settings cannot be read.
    pub async fn start(name: &'static str, config: &ServiceConfig) -> anyhow::Result<Self> {
        let traces = telemetry::init(name, config)?;
        let mut service = Self {
            name,
            config: config.clone(),
            health: Health::default(),
            metrics: Metrics::default(),
            stop: CancellationToken::new(),
            resumed: watch::Sender::new(()),
            parts: JoinSet::new(),
            traces,
        };
        service.health.waiting(START, "the rest of the process");
        let admin = health::router(service.health.clone(), service.metrics.clone());
        service.listen("ADMIN_ADDR", config.admin_addr, admin).await?;
        service.watch_signals()?;
        Ok(service)
    }

    /// Waits for the database and migrates it. From then on `/readyz` follows it.
    ///
    /// # Errors
    /// The URL is malformed, the server refuses us, a migration fails, or the process is told to stop.
    pub async fn database(&mut self, url: &str, migrations: &Migrator) -> anyhow::Result<PgPool> {
        let db = database::connect(url, migrations, &self.health, &self.stop).await?;
        self.spawn("database watch", database::watch(db.clone(), self.health.clone()));
        Ok(db)
    }

    /// Sees to it, beside everything else, that the topics this service owns exist as declared.
    pub fn own_topics(&mut self, topics: &'static [Topic]) {
        let kafka = self.config.kafka.clone();
        self.spawn("topics", async move {
            messaging::ensure_topics(&kafka, topics).await?;
            std::future::pending().await
        });
    }

    /// Publishes the outbox in `db`. The answer wakes the relay; call it after a commit that wrote to the outbox.
    pub fn relay(&mut self, db: &PgPool) -> Wake {
        let wake = Wake::default();
        let relay = messaging::Relay {
            source: format!("/{}", self.name),
            kafka: self.config.kafka.clone(),
            database: (*db.connect_options()).clone(),
            wake: wake.clone(),
            metrics: self.metrics.clone(),
            stop: self.stop.clone(),
        };
        self.thread("relay".to_owned(), move || relay.run());
        self.spawn("outbox size", messaging::measure_outbox(db.clone(), self.metrics.clone()));
        wake
    }

    /// Consumes the handler's topic as the consumer group `group`, on as many threads as configured.
    pub fn consume<H: Handler + Clone>(&mut self, group: &'static str, handler: H) {
        for number in 0..self.config.consumers {
            let consumer = messaging::Consumer {
                group: group.to_owned(),
                number,
                handler: handler.clone(),
                kafka: self.config.kafka.clone(),
                breaker: self.config.breaker.clone(),
                resumed: self.resumed.subscribe(),
                health: self.health.clone(),
                metrics: self.metrics.clone(),
                stop: self.stop.clone(),
            };
            // Said here, since its thread may come up after `run` has said that everything is there.
            self.health.waiting(&consumer.part("group"), "its thread");
            self.thread(format!("{group} consumer {number}"), move || consumer.run());
        }
        let (kafka, metrics, stop) = (self.config.kafka.clone(), self.metrics.clone(), self.stop.clone());
        self.thread(format!("{group} dead letters"), move || messaging::count_open(&kafka, group, &metrics, &stop));
    }

    /// Serves the public routes.
    ///
    /// # Errors
    /// The port is taken.
    pub async fn http(&mut self, addr: SocketAddr, routes: Router) -> anyhow::Result<()> {
        let routes = http::layered(routes, self.metrics.clone());
        self.listen("HTTP_ADDR", addr, routes).await
    }

    /// A part of the service's own. It may end only after [`Service::stopping`].
    pub fn spawn(&mut self, name: &str, part: impl Future<Output = anyhow::Result<()>> + Send + 'static) {
        let (name, stop) = (name.to_owned(), self.stop.clone());
        self.parts.spawn(async move {
            tokio::select! {
                result = part => (name, result),
                () = stop.cancelled() => (name, Ok(())),
            }
        });
    }

    /// A part that must not be cut off in the middle: it watches the token itself and returns soon after.
    pub fn spawn_draining(&mut self, name: &str, part: impl Future<Output = anyhow::Result<()>> + Send + 'static) {
        let name = name.to_owned();
        self.parts.spawn(async move { (name, part.await) });
    }

    /// Cancelled when the process is told to stop.
    pub fn stopping(&self) -> CancellationToken {
        self.stop.clone()
    }

    pub fn metrics(&self) -> Metrics {
        self.metrics.clone()
    }

    /// Runs until SIGTERM, SIGINT or the end of a part, then lets every part finish what it has in hand.
    ///
    /// # Errors
    /// A part failed or ended by itself. The process then ends with a non-zero status: what restarts it is its supervisor.
    pub async fn run(mut self) -> anyhow::Result<()> {
        self.health.ready(START);
        tracing::info!(service.name = self.name, "started");
        let mut early = None;
        tokio::select! {
            () = self.stop.cancelled() => {}
            Some(ended) = self.parts.join_next() => early = Some(ended),
        }
        let early = early.filter(|_| !self.stop.is_cancelled());
        self.stop.cancel();
        let drained = timeout(SHUTDOWN_TIMEOUT, async { while self.parts.join_next().await.is_some() {} }).await;
        let _ = self.traces.shutdown_with_timeout(FLUSH_TIMEOUT); // spans that nobody takes must not keep us
        let result = match early {
            None => Ok(()),
            Some(Ok((part, Ok(())))) => Err(anyhow::anyhow!("{part} ended by itself")),
            Some(Ok((part, Err(error)))) => Err(error.context(format!("{part} failed"))),
            Some(Err(panic)) => Err(anyhow::Error::new(panic).context("a part panicked")),
        };
        if drained.is_err() {
            // A thread hangs in a call to something that does not answer, and the runtime would wait for it for ever. Nothing
            // is lost: every part is written for a crash at any line.
            tracing::warn!("some parts did not finish in time");
            if let Err(error) = &result {
                tracing::error!(error = %format!("{error:#}"), "stopping");
            }
            std::process::exit(i32::from(result.is_err()));
        }
        tracing::info!(service.name = self.name, "stopped");
        result
    }

    /// An OS thread for what blocks: librdkafka's calls. It gets the runtime's handle for the async calls in between.
    fn thread(&mut self, name: String, part: impl FnOnce() -> anyhow::Result<()> + Send + 'static) {
        self.parts.spawn_blocking(move || (name, part()));
    }

    async fn listen(&mut self, setting: &str, addr: SocketAddr, routes: Router) -> anyhow::Result<()> {
        let listener = TcpListener::bind(addr)
            .await
            .with_context(|| format!("cannot listen on {addr}: set {setting} to a free one"))?;
        let stop = self.stop.clone();
        self.spawn_draining(setting, async move {
            axum::serve(listener, routes).with_graceful_shutdown(stop.cancelled_owned()).await?;
            Ok(())
        });
        Ok(())
    }

    /// SIGTERM and SIGINT stop the process. SIGUSR1 lets consumers go on whose breaker is open; it never ends a process, also one
    /// that has no consumers.
    fn watch_signals(&mut self) -> anyhow::Result<()> {
        let (mut terminate, mut interrupt) = (signal(SignalKind::terminate())?, signal(SignalKind::interrupt())?);
        let mut resume = signal(SignalKind::user_defined1())?;
        let (stop, resumed) = (self.stop.clone(), self.resumed.clone());
        self.spawn_draining("signals", async move {
            loop {
                tokio::select! {
                    _ = terminate.recv() => break,
                    _ = interrupt.recv() => break,
                    () = stop.cancelled() => break,
                    _ = resume.recv() => {
                        tracing::info!("SIGUSR1: consumers whose breaker is open go on");
                        resumed.send_replace(());
                    }
                }
            }
            stop.cancel();
            Ok(())
        });
        Ok(())
    }
}
