//! A receiver of traces: OTLP over gRPC, as far as an exporter needs it. It is written on HTTP/2,
//! because a gRPC server would enable features of the services' dependencies, and everything would
//! be compiled twice.

use std::future::poll_fn;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex};

use anyhow::Context;
use bytes::Bytes;
use h2::RecvStream;
use h2::server::SendResponse;
use http::{HeaderMap, HeaderValue, Response};
use opentelemetry_proto::tonic::collector::trace::v1::ExportTraceServiceRequest;
use opentelemetry_proto::tonic::common::v1::{AnyValue, any_value};
use opentelemetry_proto::tonic::trace::v1::ResourceSpans;
use prost::Message;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpListener, TcpStream};
use tokio::task::{JoinHandle, JoinSet};
use tokio_rustls::TlsAcceptor;
use tokio_rustls::rustls::ServerConfig;

use crate::waiting::eventually;

/// Length of the header of a gRPC message: one byte for compression (0: none) and four for the
/// length.
const FRAME_HEADER: usize = 5;

/// Codes of gRPC.
const OK: &str = "0";
const UNAUTHENTICATED: &str = "16";

type Received = Arc<Mutex<Exports>>;

#[derive(Default)]
struct Exports {
    spans: Vec<ResourceSpans>,
    /// The headers of the last export.
    headers: HeaderMap,
    /// The value of `authorization` that an export needs.
    required: Option<String>,
}

impl Exports {
    /// Keeps the export, if its caller may send one.
    fn take(&mut self, export: ExportTraceServiceRequest, headers: HeaderMap) -> bool {
        let given = headers.get("authorization").map(HeaderValue::as_bytes);
        let accepted = self.required.as_ref().is_none_or(|required| given == Some(required.as_bytes()));
        if accepted {
            self.spans.extend(export.resource_spans);
            self.headers = headers;
        }
        accepted
    }
}

/// Sends a request to a receiver without TLS, and returns the code of gRPC with which it answers.
///
/// # Errors
/// The receiver does not answer.
pub async fn send(url: &str, request: &[u8]) -> anyhow::Result<String> {
    const PATH: &str = "/opentelemetry.proto.collector.trace.v1.TraceService/Export";
    let address = url.strip_prefix("http://").unwrap();
    let (client, connection) = h2::client::handshake(TcpStream::connect(address).await?).await?;
    let connection = tokio::spawn(connection);
    let head = http::Request::post(format!("{url}{PATH}")).header("content-type", "application/grpc");
    let (answer, mut body) = client.ready().await?.send_request(head.body(())?, false)?;
    let mut message = Bytes::from([&[0], &u32::try_from(request.len())?.to_be_bytes()[..], request].concat());
    while !message.is_empty() {
        body.reserve_capacity(message.len());
        // A receiver that refuses the request does not read all of it.
        let Some(Ok(room)) = poll_fn(|context| body.poll_capacity(context)).await else { break };
        let part = message.split_to(room.min(message.len()));
        body.send_data(part, message.is_empty())?;
    }
    let (head, mut body) = answer.await?.into_parts();
    while let Some(chunk) = body.data().await {
        body.flow_control().release_capacity(chunk?.len())?;
    }
    let trailers = body.trailers().await?.unwrap_or_default();
    let code = trailers.get("grpc-status").or_else(|| head.headers.get("grpc-status")).cloned();
    connection.abort();
    Ok(code.context("an answer without a code of gRPC")?.to_str()?.to_owned())
}

/// Receives until it is dropped.
pub struct Otlp {
    received: Received,
    scheme: &'static str,
    address: SocketAddr,
    server: JoinHandle<()>,
}

/// The fields of a span that tests check. Ids are hexadecimal. The parent of a root span is empty.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Span {
    pub service: String,
    pub name: String,
    pub trace: String,
    pub id: String,
    pub parent: String,
    /// Trace and span of each link.
    pub links: Vec<(String, String)>,
}

impl Otlp {
    pub async fn start() -> Self {
        Self::listen("127.0.0.1:0", None).await
    }

    /// A collector with TLS, on this port of `localhost`.
    pub async fn start_secured(port: u16, mut tls: ServerConfig) -> Self {
        tls.alpn_protocols = vec![b"h2".to_vec()];
        Self::listen(&format!("127.0.0.1:{port}"), Some(TlsAcceptor::from(Arc::new(tls)))).await
    }

    async fn listen(address: &str, tls: Option<TlsAcceptor>) -> Self {
        // An earlier collector on the port ends a moment after it was dropped.
        let listener = eventually("the port is free", async || TcpListener::bind(address).await.ok()).await;
        let address = listener.local_addr().unwrap();
        let received = Received::default();
        let scheme = if tls.is_some() { "https" } else { "http" };
        let server = tokio::spawn(accept(listener, tls, received.clone()));
        Self { received, scheme, address, server }
    }

    /// The value for `OTEL_EXPORTER_OTLP_ENDPOINT`.
    pub fn url(&self) -> String {
        format!("{}://{}", self.scheme, self.address)
    }

    /// From now on exports need this value of `authorization`.
    pub fn require(&self, authorization: &str) {
        self.received.lock().unwrap().required = Some(authorization.to_owned());
    }

    /// A header of the last export.
    pub fn header(&self, name: &str) -> Option<String> {
        Some(self.received.lock().unwrap().headers.get(name)?.to_str().unwrap().to_owned())
    }

    pub fn spans(&self) -> Vec<Span> {
        self.received.lock().unwrap().spans.iter().flat_map(spans).collect()
    }

    /// Everything that was received, as text, including attributes and events: to search it for
    /// data that must not be there.
    pub fn text(&self) -> String {
        format!("{:?}", self.received.lock().unwrap().spans)
    }
}

impl Drop for Otlp {
    fn drop(&mut self) {
        self.server.abort();
    }
}

fn spans(of: &ResourceSpans) -> Vec<Span> {
    let attributes = of.resource.iter().flat_map(|resource| &resource.attributes);
    let service =
        attributes.filter(|attribute| attribute.key == "service.name").find_map(|attribute| text(&attribute.value));
    let service = service.expect("a resource has a service.name");
    let spans = of.scope_spans.iter().flat_map(|scope| &scope.spans);
    let spans = spans.map(|span| Span {
        service: service.clone(),
        name: span.name.clone(),
        trace: hex(&span.trace_id),
        id: hex(&span.span_id),
        parent: hex(&span.parent_span_id),
        links: span.links.iter().map(|link| (hex(&link.trace_id), hex(&link.span_id))).collect(),
    });
    spans.collect()
}

fn text(value: &Option<AnyValue>) -> Option<String> {
    match value.as_ref()?.value.as_ref()? {
        any_value::Value::StringValue(text) => Some(text.clone()),
        _ => None,
    }
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// The connections end with the listener.
async fn accept(listener: TcpListener, tls: Option<TlsAcceptor>, received: Received) {
    let mut connections = JoinSet::new();
    while let Ok((stream, _)) = listener.accept().await {
        connections.spawn(connection(stream, tls.clone(), received.clone()));
    }
}

async fn connection(stream: TcpStream, tls: Option<TlsAcceptor>, received: Received) -> anyhow::Result<()> {
    match tls {
        None => serve(stream, received).await,
        Some(tls) => serve(tls.accept(stream).await?, received).await,
    }
}

/// Serves one connection until the exporter closes it.
async fn serve(stream: impl AsyncRead + AsyncWrite + Unpin, received: Received) -> anyhow::Result<()> {
    let mut connection = h2::server::handshake(stream).await?;
    while let Some(request) = connection.accept().await {
        let (request, respond) = request?;
        let (head, body) = request.into_parts();
        tokio::spawn(take(head.headers, body, respond, received.clone()));
    }
    Ok(())
}

/// Receives one export and answers with an empty message.
async fn take(
    headers: HeaderMap,
    mut body: RecvStream,
    mut respond: SendResponse<Bytes>,
    received: Received,
) -> anyhow::Result<()> {
    let mut bytes = vec![];
    while let Some(chunk) = body.data().await {
        let chunk = chunk?;
        body.flow_control().release_capacity(chunk.len())?;
        bytes.extend_from_slice(&chunk);
    }
    let export = ExportTraceServiceRequest::decode(&bytes[FRAME_HEADER..])?;
    let accepted = received.lock().unwrap().take(export, headers);
    let head = Response::builder().header("content-type", "application/grpc").body(())?;
    let mut answer = respond.send_response(head, false)?;
    answer.send_data(Bytes::from_static(&[0; FRAME_HEADER]), false)?;
    answer.send_trailers(HeaderMap::from_iter([(
        http::HeaderName::from_static("grpc-status"),
        HeaderValue::from_static(if accepted { OK } else { UNAUTHENTICATED }),
    )]))?;
    Ok(())
}
