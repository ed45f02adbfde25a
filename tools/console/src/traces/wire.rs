//! Reads OTLP requests field by field, without decoding each message into a struct. A small request
//! can contain millions of empty messages, and the receiver has little time for each span.

use bytes::{Buf, BufMut, Bytes};
use prost::encoding::{DecodeContext, WireType, decode_key, decode_varint, skip_field};
use tonic::Status;
use tonic::codec::{Codec, DecodeBuf, Decoder, EncodeBuf, Encoder};

/// The path of the only call (opentelemetry.proto.collector.trace.v1).
pub const EXPORT: &str = "/opentelemetry.proto.collector.trace.v1.TraceService/Export";
/// Characters of a service's name that are kept.
const NAME_LIMIT: usize = 64;
/// `Span.kind` of a producer, which is how the relay marks its rounds.
const PRODUCER: u64 = 4;

/// What the store needs to know about a span.
pub struct Head<'a> {
    pub trace: &'a [u8],
    /// Whether it is a producer, so that it belongs to the traces that it links to.
    pub is_producer: bool,
    pub encoded: &'a [u8],
}

enum Value<'a> {
    Number(u64),
    Bytes(&'a [u8]),
}

/// Calls `take` with each span of an `ExportTraceServiceRequest` and the name of its service.
///
/// # Errors
/// The request is malformed.
pub fn each_span(request: &[u8], mut take: impl FnMut(&str, Head<'_>)) -> anyhow::Result<()> {
    for_each(request, 1, |resource_spans| {
        let mut service = String::new();
        for_each(resource_spans, 1, |resource| {
            service = service_of(resource)?.unwrap_or_default();
            Ok(())
        })?;
        for_each(resource_spans, 2, |scope_spans| {
            for_each(scope_spans, 2, |span| {
                take(&service, head(span)?);
                Ok(())
            })
        })
    })
}

fn head(span: &[u8]) -> anyhow::Result<Head<'_>> {
    let mut head = Head { trace: &[], is_producer: false, encoded: span };
    each_field(span, |tag, value| {
        match (tag, value) {
            (1, Value::Bytes(trace)) => head.trace = trace,
            (6, Value::Number(kind)) => head.is_producer = kind == PRODUCER,
            _ => {}
        }
        Ok(())
    })?;
    Ok(head)
}

/// The attribute `service.name` of a `Resource`.
fn service_of(resource: &[u8]) -> anyhow::Result<Option<String>> {
    let mut found = None;
    for_each(resource, 1, |attribute| {
        let mut is_name = false;
        for_each(attribute, 1, |key| {
            is_name = key == b"service.name";
            Ok(())
        })?;
        for_each(attribute, 2, |value| {
            for_each(value, 1, |text| {
                if is_name {
                    found = Some(String::from_utf8_lossy(text).chars().take(NAME_LIMIT).collect());
                }
                Ok(())
            })
        })
    })?;
    Ok(found)
}

/// Calls `take` with each field of a message that has this tag and a length.
fn for_each<'a>(
    message: &'a [u8],
    wanted: u32,
    mut take: impl FnMut(&'a [u8]) -> anyhow::Result<()>,
) -> anyhow::Result<()> {
    each_field(message, |tag, value| match value {
        Value::Bytes(bytes) if tag == wanted => take(bytes),
        _ => Ok(()),
    })
}

fn each_field<'a>(
    mut message: &'a [u8],
    mut take: impl FnMut(u32, Value<'a>) -> anyhow::Result<()>,
) -> anyhow::Result<()> {
    while !message.is_empty() {
        let (tag, kind) = decode_key(&mut message)?;
        match kind {
            WireType::Varint => take(tag, Value::Number(decode_varint(&mut message)?))?,
            WireType::LengthDelimited => {
                let length = usize::try_from(decode_varint(&mut message)?)?;
                anyhow::ensure!(length <= message.len(), "a field is longer than its message");
                let (bytes, rest) = message.split_at(length);
                message = rest;
                take(tag, Value::Bytes(bytes))?;
            }
            other => skip_field(other, tag, &mut message, DecodeContext::default())?,
        }
    }
    Ok(())
}

/// Takes and gives messages as bytes, so that they are passed on unchanged.
#[derive(Clone, Copy, Default)]
pub struct Raw;

impl Codec for Raw {
    type Encode = Bytes;
    type Decode = Bytes;
    type Encoder = Self;
    type Decoder = Self;

    fn encoder(&mut self) -> Self {
        *self
    }

    fn decoder(&mut self) -> Self {
        *self
    }
}

impl Encoder for Raw {
    type Item = Bytes;
    type Error = Status;

    fn encode(&mut self, message: Bytes, buffer: &mut EncodeBuf<'_>) -> Result<(), Status> {
        buffer.put(message);
        Ok(())
    }
}

impl Decoder for Raw {
    type Item = Bytes;
    type Error = Status;

    fn decode(&mut self, buffer: &mut DecodeBuf<'_>) -> Result<Option<Bytes>, Status> {
        Ok(Some(buffer.copy_to_bytes(buffer.remaining())))
    }
}

#[cfg(test)]
pub mod tests {
    use opentelemetry_proto::tonic::collector::trace::v1::ExportTraceServiceRequest;
    use opentelemetry_proto::tonic::common::v1::{AnyValue, KeyValue, any_value};
    use opentelemetry_proto::tonic::resource::v1::Resource;
    use opentelemetry_proto::tonic::trace::v1::{ResourceSpans, ScopeSpans, Span};
    use prost::Message;

    use super::*;

    fn attribute(key: &str, value: &str) -> KeyValue {
        let value = AnyValue { value: Some(any_value::Value::StringValue(value.to_owned())) };
        KeyValue { key: key.to_owned(), value: Some(value), ..KeyValue::default() }
    }

    /// A span with an attribute of so many bytes.
    pub fn span(trace: u128, bytes: usize) -> Span {
        Span {
            trace_id: trace.to_be_bytes().to_vec(),
            span_id: vec![1; 8],
            name: "request".to_owned(),
            attributes: vec![attribute("text", &"x".repeat(bytes))],
            ..Span::default()
        }
    }

    pub fn request(service: &str, spans: Vec<Span>) -> ExportTraceServiceRequest {
        let resource = Resource { attributes: vec![attribute("service.name", service)], ..Resource::default() };
        let scope_spans = vec![ScopeSpans { spans, ..ScopeSpans::default() }];
        let resource_spans = vec![ResourceSpans { resource: Some(resource), scope_spans, ..ResourceSpans::default() }];
        ExportTraceServiceRequest { resource_spans }
    }

    #[test]
    fn spans_are_found_with_the_name_of_their_service() {
        let sent = request("user", vec![span(1, 10), span(2, 20)]).encode_to_vec();
        let mut found = vec![];
        each_span(&sent, |service, head| found.push((service.to_owned(), head.trace.to_vec(), head.encoded.to_vec())))
            .unwrap();
        let expected = [(1, span(1, 10)), (2, span(2, 20))]
            .map(|(trace, span)| ("user".to_owned(), u128::to_be_bytes(trace).to_vec(), span.encode_to_vec()));
        assert_eq!(found, expected);
    }

    #[test]
    fn malformed_requests_are_refused_and_empty_ones_have_no_spans() {
        let spans = |request: &[u8]| {
            let mut count = 0;
            each_span(request, |_, _| count += 1).map(|()| count)
        };
        assert_eq!(spans(&[]).unwrap(), 0);
        assert_eq!(spans(&ExportTraceServiceRequest::default().encode_to_vec()).unwrap(), 0);
        for wrong in [&b"\x0a\xff\xff\xff\xff\x0f"[..], b"\x0a\x05\x0a", b"\xff", b"\x0b"] {
            assert!(spans(wrong).is_err(), "{wrong:?}");
        }
        let cut = request("user", vec![span(1, 10)]).encode_to_vec();
        assert!(spans(&cut[..cut.len() - 1]).is_err());
    }
}
