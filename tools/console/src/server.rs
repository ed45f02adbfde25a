//! Starts the watchers and serves the pages, until SIGTERM or SIGINT.

use std::net::SocketAddr;
use std::sync::Arc;

use anyhow::Context;
use axum::{Router, middleware};
use shared::platform::health::{self, Health};
use shared::platform::metrics::Metrics;
use shared::platform::server::Server;
use shared::platform::telemetry;
use tokio::net::TcpListener;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::watch;
use tokio::task::JoinSet;
use tokio::time::{Duration, Instant};
use tokio_util::sync::CancellationToken;
use uuid::Uuid;

use crate::config::{Config, ServiceAddress};
use crate::kafka::{Offsets, Reader, Recent, follow, watch_offsets};
use crate::laboratory::{self, Laboratory, Sources};
use crate::pages::{self, App, View, draw};
use crate::safety;
use crate::sessions::Sessions;
use crate::system::{self, Operations, Survey, Users};
use crate::traces::{Forward, Receiver, Traces, TracesConfig, forward, receive};

/// Open connections per port. Each open page has one for its live updates.
const CONNECTIONS: usize = 64;
/// How long a browser may take to send the head of a request.
const READ_TIMEOUT: Duration = Duration::from_secs(10);
/// How long requests in progress may take after the stop.
const SHUTDOWN: Duration = Duration::from_secs(3);

type Tasks = JoinSet<(&'static str, anyhow::Result<()>)>;

/// # Errors
/// A setting is wrong, a port is in use, or a watcher failed.
pub async fn run(config: Config) -> anyhow::Result<()> {
    let services = config.services()?;
    let mut kafka = config.kafka.clone();
    kafka.kafka_client_id.get_or_insert_with(|| "waybill-console".to_owned());
    // `false`: the metrics of the console have no exemplars.
    let metrics = Metrics::new(false);
    let own_traces = telemetry::init("console", &config.telemetry, &metrics)?;
    let stop = CancellationToken::new();
    let mut tasks = Tasks::new();

    let surveys = watch::Sender::new(Arc::new(Survey { at: Instant::now(), processes: vec![] }));
    let offsets = watch::Sender::new(Arc::new(Offsets::default()));
    let views = watch::Sender::new(Arc::new(View::default()));
    let recent = Recent::default();
    let Receiver { traces, forward } = start_receiver(&config.traces, &mut tasks, &stop).await?;
    let operations = Operations::new()?;
    let sources = Sources {
        surveys: surveys.subscribe(),
        offsets: offsets.subscribe(),
        recent: recent.clone(),
        operations: operations.clone(),
    };
    let (laboratory, further) = start_laboratory(&mut tasks, &stop, &config, sources)?;
    let app = App {
        views: views.subscribe(),
        surveys: surveys.subscribe(),
        offsets: offsets.subscribe(),
        recent: recent.clone(),
        reader: Reader::new(kafka.clone()),
        operations,
        sessions: Sessions::default(),
        users: Users::new(config.public_services()?)?,
        traces,
        forward,
        source: config.source_url.clone().map(Arc::new),
        prefix: kafka.prefixed("").into(),
        admin_token: config.admin_token.get().cloned(),
        page_token: Uuid::new_v4().to_string().into(),
        laboratory,
        stop: stop.clone(),
    };
    spawn(&mut tasks, &stop, "drawing", draw(surveys.subscribe(), offsets.subscribe(), recent.clone(), views));
    spawn(&mut tasks, &stop, "survey", system::watch(services, further, surveys));
    thread(&mut tasks, "offsets", {
        let (kafka, stop) = (kafka.clone(), stop.clone());
        move || watch_offsets(&kafka, &offsets, &stop)
    });
    thread(&mut tasks, "tail", {
        let stop = stop.clone();
        move || follow(&kafka, &recent, &stop)
    });

    serve(&mut tasks, &stop, &config, app, metrics).await?;
    tracing::info!(address = %config.http_addr, "started");

    let ended = wait(&mut tasks).await;
    stop.cancel();
    while tasks.join_next().await.is_some() {}
    let _ = own_traces.shutdown_with_timeout(SHUTDOWN);
    ended
}

/// Starts to serve the pages and the admin port.
async fn serve(
    tasks: &mut Tasks,
    stop: &CancellationToken,
    config: &Config,
    app: App,
    metrics: Metrics,
) -> anyhow::Result<()> {
    let hosts: Arc<[String]> = config.console_hosts.clone().into();
    let routes = pages::routes(app).layer(middleware::from_fn_with_state(hosts, safety::guarded));
    let admin = health::router(Health::default(), metrics);
    for (name, setting, address, routes) in
        [("pages", "HTTP_ADDR", config.http_addr, routes), ("admin port", "ADMIN_ADDR", config.admin_addr, admin)]
    {
        let listener = listen(address, setting).await?;
        let server = server(routes);
        let stop = stop.clone();
        tasks.spawn(async move { (name, server.run(listener, stop).await) });
    }
    Ok(())
}

/// Starts to receive traces, and to pass them on if there is another collector.
async fn start_receiver(
    config: &TracesConfig,
    tasks: &mut Tasks,
    stop: &CancellationToken,
) -> anyhow::Result<Receiver> {
    let forward = config.target()?.map(|target| {
        let (sender, queue) = Forward::new();
        spawn(tasks, stop, "forwarding of traces", forward(queue, target));
        sender
    });
    let receiver = Receiver { traces: Traces::default(), forward };
    let tls = config.tls()?;
    let listener = listen(config.otlp_addr, "OTLP_ADDR").await?;
    let receiving = receive(listener, tls, receiver.clone(), stop.clone());
    tasks.spawn(async move { ("receiver of traces", receiving.await) });
    Ok(receiver)
}

/// Starts the tasks of the Laboratory, if it is on. Returns it with the processes that it has
/// started.
fn start_laboratory(
    tasks: &mut Tasks,
    stop: &CancellationToken,
    config: &Config,
    sources: Sources,
) -> anyhow::Result<(Option<Laboratory>, watch::Receiver<Vec<ServiceAddress>>)> {
    let (sender, further) = watch::channel(vec![]);
    if !config.laboratory.laboratory {
        return Ok((None, further));
    }
    let (laboratory, ends) = Laboratory::new(&config.laboratory, config.public_services()?)?;
    spawn(tasks, stop, "jobs of the laboratory", laboratory::run_jobs(laboratory.clone(), ends.jobs));
    spawn(tasks, stop, "laboratory", laboratory::watch(laboratory.clone(), sources, sender, ends.findings));
    Ok((Some(laboratory), further))
}

async fn listen(address: SocketAddr, setting: &str) -> anyhow::Result<TcpListener> {
    let listener = TcpListener::bind(address).await;
    listener.with_context(|| format!("cannot listen on {address}: set {setting} to a free address"))
}

fn server(routes: Router) -> Server {
    Server {
        routes,
        overloaded: Router::new(),
        connections: CONNECTIONS,
        read_timeout: READ_TIMEOUT,
        shutdown: SHUTDOWN,
        refused: Default::default(),
    }
}

/// Waits for a signal to stop, or for a task that ends too early.
async fn wait(tasks: &mut Tasks) -> anyhow::Result<()> {
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    tokio::select! {
        _ = terminate.recv() => Ok(()),
        _ = interrupt.recv() => Ok(()),
        Some(ended) = tasks.join_next() => {
            let (task, result) = ended.context("a task panicked")?;
            result.with_context(|| format!("the task {task} failed"))?;
            anyhow::bail!("the task {task} ended early")
        }
    }
}

fn spawn(
    tasks: &mut Tasks,
    stop: &CancellationToken,
    name: &'static str,
    task: impl Future<Output = anyhow::Result<()>> + Send + 'static,
) {
    let stop = stop.clone();
    tasks.spawn(async move { (name, stop.run_until_cancelled(task).await.unwrap_or(Ok(()))) });
}

/// Runs a task on a thread of its own, because calls of librdkafka block.
fn thread(tasks: &mut Tasks, name: &'static str, task: impl FnOnce() -> anyhow::Result<()> + Send + 'static) {
    tasks.spawn_blocking(move || (name, task()));
}
