//! A span as a story shows it. All text in it comes from a service, or from any program that can
//! reach the receiver.

use std::collections::BTreeMap;

use opentelemetry_proto::tonic::common::v1::{AnyValue, KeyValue, any_value::Value};
use opentelemetry_proto::tonic::trace::v1::Span as Sent;
use opentelemetry_proto::tonic::trace::v1::status::StatusCode;
use prost::Message;

/// Characters of a text that are shown.
const TEXT_LIMIT: usize = 300;
/// How many attributes and events of a span are shown.
const ATTRIBUTES: usize = 40;
const EVENTS: usize = 40;

#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Span {
    pub service: String,
    pub name: String,
    pub id: Vec<u8>,
    /// In nanoseconds since 1970.
    pub start: u64,
    pub end: u64,
    pub attributes: BTreeMap<String, String>,
    pub events: Vec<Event>,
    /// Why it failed. May be empty.
    pub error: Option<String>,
}

/// What happened within a span: a log line, or a note.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Event {
    pub time: u64,
    pub name: String,
    pub attributes: BTreeMap<String, String>,
}

impl Span {
    /// `None`: the bytes are no span.
    pub fn decode(service: &str, encoded: &[u8]) -> Option<Self> {
        let sent = Sent::decode(encoded).ok()?;
        let status = sent.status.unwrap_or_default();
        let events = sent.events.into_iter().take(EVENTS).map(|event| Event {
            time: event.time_unix_nano,
            name: shown(event.name),
            attributes: texts(event.attributes),
        });
        Some(Self {
            service: service.to_owned(),
            name: shown(sent.name),
            id: sent.span_id,
            start: sent.start_time_unix_nano,
            end: sent.end_time_unix_nano.max(sent.start_time_unix_nano),
            attributes: texts(sent.attributes),
            events: events.collect(),
            error: (status.code == StatusCode::Error as i32).then(|| shown(status.message)),
        })
    }

    /// An attribute, or an empty text.
    pub fn text(&self, name: &str) -> &str {
        self.attributes.get(name).map_or("", String::as_str)
    }
}

fn texts(attributes: Vec<KeyValue>) -> BTreeMap<String, String> {
    let texts = attributes
        .into_iter()
        .take(ATTRIBUTES)
        .filter_map(|KeyValue { key, value, .. }| Some((shown(key), shown(text(value?)?))));
    texts.collect()
}

/// Lists are not shown: no service sends any.
fn text(value: AnyValue) -> Option<String> {
    match value.value? {
        Value::StringValue(text) => Some(text),
        Value::BoolValue(value) => Some(value.to_string()),
        Value::IntValue(number) => Some(number.to_string()),
        Value::DoubleValue(number) => Some(number.to_string()),
        _ => None,
    }
}

fn shown(text: String) -> String {
    if text.len() <= TEXT_LIMIT { text } else { text.chars().take(TEXT_LIMIT).collect() }
}
