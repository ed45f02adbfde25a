//! A receiver of traces: OTLP over gRPC, as far as an exporter needs it. It is written on HTTP/2,
//! because a gRPC server would enable features of the services' dependencies, and everything would
//! be compiled twice.

use std::net::SocketAddr;
use std::sync::{Arc, Mutex};

use bytes::Bytes;
use h2::RecvStream;
use h2::server::SendResponse;
use http::{HeaderMap, HeaderValue, Response};
use opentelemetry_proto::tonic::collector::trace::v1::ExportTraceServiceRequest;
use opentelemetry_proto::tonic::common::v1::{AnyValue, any_value};
use opentelemetry_proto::tonic::trace::v1::ResourceSpans;
use prost::Message;
use tokio::net::{TcpListener, TcpStream};
use tokio::task::JoinHandle;

/// Length of the header of a gRPC message: one byte for compression (0: none) and four for the
/// length.
const FRAME_HEADER: usize = 5;

type Received = Arc<Mutex<Vec<ResourceSpans>>>;

/// Receives until it is dropped.
pub struct Otlp {
    received: Received,
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
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let received = Received::default();
        let server = tokio::spawn(accept(listener, received.clone()));
        Self { received, address, server }
    }

    /// The value for `OTEL_EXPORTER_OTLP_ENDPOINT`.
    pub fn url(&self) -> String {
        format!("http://{}", self.address)
    }

    pub fn spans(&self) -> Vec<Span> {
        self.received.lock().unwrap().iter().flat_map(spans).collect()
    }

    /// Everything that was received, as text, including attributes and events: to search it for
    /// data that must not be there.
    pub fn text(&self) -> String {
        format!("{:?}", self.received.lock().unwrap())
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

async fn accept(listener: TcpListener, received: Received) {
    while let Ok((stream, _)) = listener.accept().await {
        tokio::spawn(serve(stream, received.clone()));
    }
}

/// Serves one connection until the exporter closes it.
async fn serve(stream: TcpStream, received: Received) -> anyhow::Result<()> {
    let mut connection = h2::server::handshake(stream).await?;
    while let Some(request) = connection.accept().await {
        let (request, respond) = request?;
        tokio::spawn(take(request.into_body(), respond, received.clone()));
    }
    Ok(())
}

/// Receives one export and answers with an empty message.
async fn take(mut body: RecvStream, mut respond: SendResponse<Bytes>, received: Received) -> anyhow::Result<()> {
    let mut bytes = vec![];
    while let Some(chunk) = body.data().await {
        let chunk = chunk?;
        body.flow_control().release_capacity(chunk.len())?;
        bytes.extend_from_slice(&chunk);
    }
    let export = ExportTraceServiceRequest::decode(&bytes[FRAME_HEADER..])?;
    received.lock().unwrap().extend(export.resource_spans);
    let head = Response::builder().header("content-type", "application/grpc").body(())?;
    let mut answer = respond.send_response(head, false)?;
    answer.send_data(Bytes::from_static(&[0; FRAME_HEADER]), false)?;
    answer.send_trailers(HeaderMap::from_iter([(
        http::HeaderName::from_static("grpc-status"),
        HeaderValue::from_static("0"),
    )]))?;
    Ok(())
}
