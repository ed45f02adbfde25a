//! The receiver: OTLP over gRPC, traces only. It asks for no login, so it belongs on loopback or on
//! the network of the containers.

use std::future::{Ready, ready};
use std::sync::Arc;
use std::time::Duration;

use axum::body::Body;
use axum::extract::{Request, State};
use axum::response::Response;
use axum::{Router, routing};
use bytes::Bytes;
use hyper::server::conn::http2;
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use hyper_util::service::TowerToHyperService;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::task::JoinSet;
use tokio::time::{sleep, timeout};
use tokio_rustls::TlsAcceptor;
use tokio_util::sync::CancellationToken;
use tonic::Status;
use tonic::server::{Grpc, UnaryService};

use super::forward::Forward;
use super::store::Traces;
use super::wire::{EXPORT, Raw};

/// Open connections. Each process of a service has one.
const CONNECTIONS: usize = 64;
/// Bytes of a request. An exporter sends at most 512 spans, usually 0.4 MB.
const REQUEST_SIZE: usize = 4 * 1024 * 1024;
/// Requests that are read at the same time. Exporters wait, so this bounds the memory.
const REQUESTS: usize = 2;
/// How long a request may take. An exporter gives up after 10 s.
const REQUEST_LIMIT: Duration = Duration::from_secs(10);
/// Bytes that an exporter may send ahead, per request and per connection.
const WINDOW: u32 = 256 * 1024;
/// How long a TLS handshake may take.
const HANDSHAKE_LIMIT: Duration = Duration::from_secs(5);
/// How often an idle exporter gets an HTTP/2 ping, and how long it may take to answer.
const PING_INTERVAL: Duration = Duration::from_secs(30);
const PING_LIMIT: Duration = Duration::from_secs(10);
/// The wait after a failed accept: the process has no free file descriptor.
const ACCEPT_RETRY: Duration = Duration::from_secs(1);

/// Where received spans go.
#[derive(Clone)]
pub struct Receiver {
    pub traces: Traces,
    pub forward: Option<Forward>,
}

#[derive(Clone)]
struct Serving {
    receiver: Receiver,
    places: Arc<Semaphore>,
}

/// Receives until the stop. Then requests in progress are given up: their exporters send them
/// again, or lose traces only.
pub async fn receive(
    listener: TcpListener,
    tls: Option<TlsAcceptor>,
    receiver: Receiver,
    stop: CancellationToken,
) -> anyhow::Result<()> {
    let serving = Serving { receiver, places: Arc::new(Semaphore::new(REQUESTS)) };
    let routes = Router::new()
        .route(EXPORT, routing::post(export))
        .fallback(async || refusal(Status::unimplemented("the console receives traces only")))
        .with_state(serving);
    let connections = Arc::new(Semaphore::new(CONNECTIONS));
    let mut open = JoinSet::new();
    loop {
        // Beyond the limit, connections wait to be accepted.
        let next = async {
            let place = connections.clone().acquire_owned().await?;
            anyhow::Ok((place, listener.accept().await))
        };
        let (place, accepted) = tokio::select! {
            () = stop.cancelled() => return Ok(()),
            Some(_) = open.join_next() => continue,
            next = next => next?,
        };
        match accepted {
            Ok((stream, _)) => drop(open.spawn(connection(stream, tls.clone(), routes.clone(), place))),
            Err(error) => {
                tracing::warn!(%error, "cannot accept a connection of an exporter; will retry");
                stop.run_until_cancelled(sleep(ACCEPT_RETRY)).await;
            }
        }
    }
}

/// Logs a broken connection at debug only, because the exporter reports it.
async fn connection(stream: TcpStream, tls: Option<TlsAcceptor>, routes: Router, _place: OwnedSemaphorePermit) {
    match tls {
        None => serve(stream, routes).await,
        Some(tls) => match timeout(HANDSHAKE_LIMIT, tls.accept(stream)).await {
            Ok(Ok(stream)) => serve(stream, routes).await,
            Ok(Err(error)) => tracing::debug!(%error, "no TLS handshake with an exporter"),
            Err(_) => tracing::debug!("an exporter did not finish its TLS handshake in time"),
        },
    }
}

async fn serve(stream: impl AsyncRead + AsyncWrite + Send + Unpin + 'static, routes: Router) {
    let mut builder = http2::Builder::new(TokioExecutor::new());
    builder
        .timer(TokioTimer::new())
        .keep_alive_interval(PING_INTERVAL)
        .keep_alive_timeout(PING_LIMIT)
        .max_concurrent_streams(REQUESTS as u32)
        .initial_stream_window_size(WINDOW)
        .initial_connection_window_size(WINDOW);
    let served = builder.serve_connection(TokioIo::new(stream), TowerToHyperService::new(routes)).await;
    if let Err(error) = served {
        tracing::debug!(%error, "the connection of an exporter broke");
    }
}

async fn export(State(serving): State<Serving>, request: Request) -> Response {
    let Ok(_place) = serving.places.acquire().await else { return refusal(Status::unavailable("the console stops")) };
    let mut grpc = Grpc::new(Raw).max_decoding_message_size(REQUEST_SIZE);
    match timeout(REQUEST_LIMIT, grpc.unary(serving.receiver, request)).await {
        Ok(answer) => answer.map(Body::new),
        Err(_) => refusal(Status::deadline_exceeded("the request did not arrive in time")),
    }
}

impl UnaryService<Bytes> for Receiver {
    type Response = Bytes;
    type Future = Ready<Result<tonic::Response<Bytes>, Status>>;

    /// A malformed request is not passed on.
    fn call(&mut self, request: tonic::Request<Bytes>) -> Self::Future {
        let request = request.into_inner();
        if let Err(error) = self.traces.add(&request) {
            return ready(Err(Status::invalid_argument(format!("{error:#}"))));
        }
        if let Some(forward) = &self.forward {
            forward.pass_on(request);
        }
        // An empty ExportTraceServiceResponse: everything was accepted.
        ready(Ok(tonic::Response::new(Bytes::new())))
    }
}

fn refusal(status: Status) -> Response {
    status.into_http::<Body>()
}
