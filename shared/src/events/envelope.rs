//! The envelope: CloudEvents 1.0 in Kafka's binary mode. Attributes are headers named `ce_…`; the
//! record's value is the data, unwrapped. Sources: CloudEvents 1.0.2, its Kafka protocol binding
//! §3.2, its sequence extension and its distributed tracing extension.

use std::fmt::Write as _;

use time::format_description::well_known::Rfc3339;
use time::{OffsetDateTime, UtcOffset};
use uuid::Uuid;

use super::DecodeError;

const SPEC_VERSION: &str = "1.0";
/// The major version of every event's schema. A release may only add fields to an event. Any other
/// change needs a new event type or a new major version.
const SCHEMA_MAJOR: &str = "1";
const JSON: &str = "application/json";
/// The length of a `traceparent` of version 00: `00-<trace id>-<span id>-<flags>`.
const TRACEPARENT_LENGTH: usize = 55;
/// The longest `tracestate` (bytes) and its most members, as W3C Trace Context requires.
const TRACESTATE_MAX_LENGTH: usize = 512;
const TRACESTATE_MAX_MEMBERS: usize = 32;
/// The most headers that an envelope has.
pub const MAX_HEADERS: usize = 14;
/// The longest time in RFC 3339 (bytes), with nanoseconds and an offset.
const TIME_LENGTH: usize = 35;
/// Bytes. Enough for the schema of most types; a longer text makes its buffer grow.
const TEXT_CAPACITY: usize = 64;

/// Identity and origin of an event. Every guarantee depends on these attributes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Envelope {
    /// Created once, in the producer's transaction. All copies of an event have the same id; an
    /// inbox recognises duplicates by it.
    pub id: Uuid,
    /// The event's type, for example `user.registered`.
    pub kind: String,
    /// The service that published the event, for example `/user`.
    pub source: String,
    /// The aggregate's id; equal to the record's key.
    pub key: Uuid,
    /// The aggregate's version after this event: 1, 2, 3, …
    pub version: i64,
    /// When the event happened, by the producer's clock. For people and reports; nothing is ordered
    /// by it.
    pub time: OffsetDateTime,
    pub cause: Cause,
    /// The W3C trace context of the request that caused the event.
    pub traceparent: Option<String>,
    pub tracestate: Option<String>,
}

/// What caused an event. All fields are ids that our services make, so they can be kept permanently
/// with a fact: never the text that a caller sent. An absent field is unknown: another program
/// wrote the event.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Cause {
    /// The id of the command or of the event whose handling caused this event.
    pub causation: Option<Uuid>,
    /// The id of the command at the beginning of the chain. All events that follow from one request
    /// have the same.
    pub correlation: Option<Uuid>,
    /// Who gave the command: a UUID, or a keyed hash in the form of a UUID (version 8). The type
    /// allows no name, address or other text of a token.
    pub actor: Option<Uuid>,
}

impl Cause {
    /// The cause of the events of a new command. `actor` is who gave it.
    pub fn command(actor: Option<Uuid>) -> Self {
        let command = mint_id();
        Self { causation: Some(command), correlation: Some(command), actor }
    }

    /// The cause of the events that a service publishes because of this one. No caller gave
    /// a command for them, so they have no actor. An event without a correlation id begins a chain.
    pub fn event(envelope: &Envelope) -> Self {
        let correlation = envelope.cause.correlation.unwrap_or(envelope.id);
        Self { causation: Some(envelope.id), correlation: Some(correlation), actor: None }
    }
}

/// A new id. It is a UUIDv7, so ids that are created one after another are adjacent in an index.
#[expect(clippy::disallowed_methods, reason = "the one place where ids are created")]
pub fn mint_id() -> Uuid {
    Uuid::now_v7()
}

/// The current time, for an event that happens now.
#[expect(clippy::disallowed_methods, reason = "the one place where the clock is read")]
pub fn now() -> OffsetDateTime {
    OffsetDateTime::now_utc()
}

impl Envelope {
    /// Hands each header of the record to `add`: its name and its value. An absent optional
    /// attribute has no header. There are at most [`MAX_HEADERS`].
    ///
    /// The relay writes millions of records, so each value is formatted into one buffer.
    pub fn each_header(&self, mut add: impl FnMut(&'static str, &str)) {
        let mut id = Uuid::encode_buffer();
        let mut time = [0; TIME_LENGTH];
        // The length comes from the rest of the buffer: `format_into` returns less than it has
        // written.
        let mut rest = &mut time[..];
        self.time.format_into(&mut rest, &Rfc3339).expect("the year of an event has four digits");
        let length = TIME_LENGTH - rest.len();
        let time = std::str::from_utf8(&time[..length]).expect("RFC 3339 is ASCII");
        let mut text = String::with_capacity(TEXT_CAPACITY);
        add("ce_specversion", SPEC_VERSION);
        add("ce_id", self.id.hyphenated().encode_lower(&mut id));
        add("ce_type", &self.kind);
        add("ce_source", &self.source);
        add("ce_subject", self.key.hyphenated().encode_lower(&mut id));
        add("ce_time", time);
        write(&mut text, format_args!("urn:waybill:{}:{SCHEMA_MAJOR}", self.kind));
        add("ce_dataschema", &text);
        write(&mut text, format_args!("{}", self.version));
        add("ce_sequence", &text);
        add("content-type", JSON);
        let Cause { causation, correlation, actor } = self.cause;
        for (name, cause) in [("ce_causationid", causation), ("ce_correlationid", correlation), ("ce_actor", actor)] {
            if let Some(cause) = cause {
                add(name, cause.hyphenated().encode_lower(&mut id));
            }
        }
        for (name, value) in [("traceparent", &self.traceparent), ("tracestate", &self.tracestate)] {
            if let Some(value) = value {
                add(name, value);
            }
        }
    }

    /// The record's headers, as [`Envelope::each_header`] hands them over.
    pub fn headers(&self) -> Vec<(&'static str, String)> {
        let mut headers = vec![];
        self.each_header(|name, value| headers.push((name, value.to_owned())));
        headers
    }

    /// Reads the key and the headers of a record. Unknown headers are ignored.
    ///
    /// # Errors
    /// A required attribute is missing, duplicated or malformed. Or this release cannot read the
    /// event, because it has another version of the specification, another major version of the
    /// schema, or another encoding.
    pub fn parse(key: Option<&[u8]>, headers: &[(&str, Option<&[u8]>)]) -> Result<Self, DecodeError> {
        let headers = Headers(headers);
        if headers.required("ce_specversion")? != SPEC_VERSION {
            return Err(DecodeError::new("ce_specversion", "not 1.0"));
        }
        if headers.optional("content-type")?.is_some_and(|value| !is_json(value)) {
            return Err(DecodeError::new("content-type", "not application/json"));
        }
        let schema = headers.optional("ce_dataschema")?;
        if schema.is_some_and(|urn| urn.rsplit(':').next() != Some(SCHEMA_MAJOR)) {
            return Err(DecodeError::new("ce_dataschema", "a major version that this release cannot read"));
        }
        let key = key.ok_or(DecodeError::new("key", "missing"))?;
        let (traceparent, tracestate) = trace_context(headers.lenient("traceparent"), headers.lenient("tracestate"));
        // An attribute that no effect depends on is no reason to reject an event. If it is
        // malformed, it is treated as absent.
        let id = |name| headers.lenient(name).and_then(|value| Uuid::try_parse(value).ok());
        Ok(Self {
            id: headers.uuid("ce_id")?,
            kind: headers.required("ce_type")?.to_owned(),
            source: headers.required("ce_source")?.to_owned(),
            key: Uuid::try_parse_ascii(key).map_err(|_| DecodeError::new("key", "not a UUID"))?,
            version: headers.version("ce_sequence")?,
            time: headers.time("ce_time")?,
            cause: Cause {
                causation: id("ce_causationid"),
                correlation: id("ce_correlationid"),
                actor: id("ce_actor"),
            },
            traceparent: traceparent.map(str::to_owned),
            tracestate: tracestate.map(str::to_owned),
        })
    }
}

/// Replaces the text.
fn write(text: &mut String, value: std::fmt::Arguments<'_>) {
    text.clear();
    text.write_fmt(value).expect("writing to a string cannot fail");
}

/// The same time in UTC. `None` if its year in UTC is not between 1 and 9999. Another year cannot
/// be written as RFC 3339, and computing with it can overflow.
pub fn in_utc(time: OffsetDateTime) -> Option<OffsetDateTime> {
    time.checked_to_offset(UtcOffset::UTC).filter(|utc| (1..=9999).contains(&utc.year()))
}

/// A `traceparent` and its `tracestate` without what is malformed: a trace context comes from other
/// programs, and any text in it would be stored with the events. A `tracestate` has no meaning
/// without a `traceparent`.
pub(crate) fn trace_context<'a>(
    traceparent: Option<&'a str>,
    tracestate: Option<&'a str>,
) -> (Option<&'a str>, Option<&'a str>) {
    let Some(traceparent) = traceparent.filter(|text| is_traceparent(text)) else { return (None, None) };
    (Some(traceparent), tracestate.filter(|text| is_tracestate(text)))
}

fn is_traceparent(text: &str) -> bool {
    let hexadecimal = |byte: u8| byte.is_ascii_digit() || (b'a'..=b'f').contains(&byte);
    text.len() == TRACEPARENT_LENGTH
        && text.bytes().enumerate().all(|(index, byte)| match index {
            2 | 35 | 52 => byte == b'-',
            _ => hexadecimal(byte),
        })
}

fn is_tracestate(text: &str) -> bool {
    let is_member = |member: &str| {
        let (key, value) = member.trim().split_once('=').unwrap_or_default();
        !key.is_empty() && !value.is_empty()
    };
    text.len() <= TRACESTATE_MAX_LENGTH
        && text.bytes().all(|byte| byte == b' ' || byte.is_ascii_graphic())
        && text.split(',').count() <= TRACESTATE_MAX_MEMBERS
        && text.split(',').all(is_member)
}

/// Whether a media type is JSON. Media types are not case-sensitive and may have parameters.
fn is_json(media_type: &str) -> bool {
    media_type.split(';').next().is_some_and(|essence| essence.trim().eq_ignore_ascii_case(JSON))
}

struct Headers<'a>(&'a [(&'a str, Option<&'a [u8]>)]);

impl<'a> Headers<'a> {
    fn optional(&self, name: &'static str) -> Result<Option<&'a str>, DecodeError> {
        let mut values = self.0.iter().filter(|(key, _)| *key == name).map(|(_, value)| value);
        let value = values.next();
        if values.next().is_some() {
            return Err(DecodeError::new(name, "given twice"));
        }
        let Some(Some(bytes)) = value else { return Ok(None) };
        std::str::from_utf8(bytes).map(Some).map_err(|_| DecodeError::new(name, "not UTF-8"))
    }

    /// As [`Headers::optional`], for an attribute whose errors are ignored.
    fn lenient(&self, name: &'static str) -> Option<&'a str> {
        self.optional(name).ok().flatten()
    }

    fn required(&self, name: &'static str) -> Result<&'a str, DecodeError> {
        match self.optional(name)? {
            Some(value) if !value.is_empty() => Ok(value),
            _ => Err(DecodeError::new(name, "missing")),
        }
    }

    fn uuid(&self, name: &'static str) -> Result<Uuid, DecodeError> {
        Uuid::try_parse(self.required(name)?).map_err(|_| DecodeError::new(name, "not a UUID"))
    }

    fn time(&self, name: &'static str) -> Result<OffsetDateTime, DecodeError> {
        let time = OffsetDateTime::parse(self.required(name)?, &Rfc3339)
            .map_err(|_| DecodeError::new(name, "not an RFC 3339 time"))?;
        in_utc(time).ok_or(DecodeError::new(name, "not between the years 1 and 9999 in UTC"))
    }

    fn version(&self, name: &'static str) -> Result<i64, DecodeError> {
        match self.required(name)?.parse() {
            Ok(version) if version > 0 => Ok(version),
            _ => Err(DecodeError::new(name, "not a positive number")),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn envelope() -> Envelope {
        Envelope {
            id: mint_id(),
            kind: "user.registered".to_owned(),
            source: "/user".to_owned(),
            key: mint_id(),
            version: 1,
            time: now(),
            cause: Cause::command(Some(mint_id())),
            traceparent: Some("00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01".to_owned()),
            tracestate: None,
        }
    }

    fn parse(key: Option<&str>, headers: &[(&'static str, String)]) -> Result<Envelope, DecodeError> {
        let headers: Vec<_> = headers.iter().map(|(name, value)| (*name, Some(value.as_bytes()))).collect();
        Envelope::parse(key.map(str::as_bytes), &headers)
    }

    #[test]
    fn an_envelope_has_at_most_the_declared_number_of_headers() {
        let tracestate = Some("a=1".to_owned());
        assert_eq!(Envelope { tracestate, ..envelope() }.headers().len(), MAX_HEADERS);
    }

    #[test]
    fn parse_reads_what_headers_writes() {
        let envelope = envelope();
        assert_eq!(parse(Some(&envelope.key.to_string()), &envelope.headers()), Ok(envelope));
    }

    #[test]
    fn a_missing_or_duplicated_required_header_is_an_error_that_names_the_header() {
        let envelope = envelope();
        let key = envelope.key.to_string();
        for name in ["ce_specversion", "ce_id", "ce_type", "ce_source", "ce_time", "ce_sequence"] {
            let mut headers = envelope.headers();
            headers.retain(|(header, _)| *header != name);
            assert_eq!(parse(Some(&key), &headers), Err(DecodeError::new(name, "missing")));
            let mut headers = envelope.headers();
            headers.push((name, "twice".to_owned()));
            assert_eq!(parse(Some(&key), &headers), Err(DecodeError::new(name, "given twice")));
        }
        assert_eq!(parse(None, &envelope.headers()), Err(DecodeError::new("key", "missing")));
    }

    fn parsed_with(header: &'static str, value: &str) -> Result<Envelope, DecodeError> {
        let envelope = envelope();
        let mut headers = envelope.headers();
        headers.retain(|(name, _)| *name != header);
        headers.push((header, value.to_owned()));
        parse(Some(&envelope.key.to_string()), &headers)
    }

    #[test]
    fn a_malformed_trace_context_is_treated_as_absent() {
        let valid = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01";
        assert_eq!(parsed_with("traceparent", valid).unwrap().traceparent.as_deref(), Some(valid));
        let long = "a".repeat(100_000);
        for malformed in ["", "nonsense", &valid.to_uppercase(), &format!("{valid}\0"), &format!("{valid}-1"), &long] {
            let envelope = parsed_with("traceparent", malformed).unwrap();
            assert_eq!((envelope.traceparent, envelope.tracestate), (None, None), "{malformed}");
        }
        assert_eq!(parsed_with("tracestate", "a=1, b=2").unwrap().tracestate.as_deref(), Some("a=1, b=2"));
        let many = ["a=1"; TRACESTATE_MAX_MEMBERS + 1].join(",");
        for malformed in ["", "a=1\0", "nonsense", "=", "é=1", &format!("a={long}"), &many] {
            let envelope = parsed_with("tracestate", malformed).unwrap();
            assert!(envelope.traceparent.is_some() && envelope.tracestate.is_none(), "{malformed}");
        }
    }

    #[test]
    fn a_malformed_cause_is_treated_as_absent() {
        for header in ["ce_causationid", "ce_correlationid", "ce_actor"] {
            let cause = parsed_with(header, "ada@example.com").unwrap().cause;
            let ids = [cause.causation, cause.correlation, cause.actor];
            assert_eq!(ids.iter().flatten().count(), 2, "{header}");
        }
    }

    #[test]
    fn an_event_follows_from_another_event_of_the_same_command() {
        let first = envelope();
        let command = first.cause.correlation;
        assert_eq!(Cause::event(&first), Cause { causation: Some(first.id), correlation: command, actor: None });
        let foreign = Envelope { cause: Cause::default(), ..first };
        assert_eq!(Cause::event(&foreign).correlation, Some(foreign.id));
    }

    #[test]
    fn media_types_are_compared_as_such() {
        for json in ["application/json", "Application/JSON; charset=UTF-8", "application/json;charset=utf-8"] {
            assert!(parsed_with("content-type", json).is_ok(), "{json}");
        }
        for other in ["application/jsonp", "application/json-seq", "text/json", "application/avro", ""] {
            assert_eq!(parsed_with("content-type", other).unwrap_err().field, "content-type", "{other}");
        }
    }

    #[test]
    fn a_time_has_a_year_between_1_and_9999_in_utc() {
        for time in ["0001-01-01T00:00:00Z", "9999-12-31T23:59:59.999999999Z", "9999-12-31T23:59:59-00:00"] {
            assert!(parsed_with("ce_time", time).is_ok(), "{time}");
        }
        let extremes = [
            "0000-01-01T00:00:00+01:00",
            "0000-12-31T23:59:59Z",
            "0001-01-01T00:00:00+00:01",
            "9999-12-31T23:59:59.9999999-05:00",
        ];
        for time in extremes {
            assert_eq!(parsed_with("ce_time", time).unwrap_err().field, "ce_time", "{time}");
        }
    }

    #[test]
    fn an_event_with_a_newer_major_version_is_not_decoded() {
        let envelope = envelope();
        let mut headers = envelope.headers();
        for (name, value) in &mut headers {
            if *name == "ce_dataschema" {
                *value = "urn:waybill:user.registered:2".to_owned();
            }
        }
        assert_eq!(parse(Some(&envelope.key.to_string()), &headers).unwrap_err().field, "ce_dataschema");
    }
}
