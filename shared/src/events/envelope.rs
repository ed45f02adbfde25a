//! The envelope: CloudEvents 1.0 in Kafka's binary mode. Attributes are headers named `ce_…`; the
//! record's value is the data, unwrapped. Sources: CloudEvents 1.0.2, its Kafka protocol binding
//! §3.2, its sequence extension and its distributed tracing extension.

use time::OffsetDateTime;
use time::format_description::well_known::Rfc3339;
use uuid::Uuid;

use super::DecodeError;

const SPEC_VERSION: &str = "1.0";
/// The major version of every event's schema. A release may only add fields to an event. Any other
/// change needs a new event type or a new major version.
const SCHEMA_MAJOR: &str = "1";
const JSON: &str = "application/json";

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
    /// The W3C trace context of the request that caused the event.
    pub traceparent: Option<String>,
    pub tracestate: Option<String>,
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
    /// The record's headers. An absent optional attribute has no header.
    pub fn headers(&self) -> Vec<(&'static str, String)> {
        let time = self.time.format(&Rfc3339).expect("the year of an event has four digits");
        let mut headers = vec![
            ("ce_specversion", SPEC_VERSION.to_owned()),
            ("ce_id", self.id.to_string()),
            ("ce_type", self.kind.clone()),
            ("ce_source", self.source.clone()),
            ("ce_subject", self.key.to_string()),
            ("ce_time", time),
            ("ce_dataschema", format!("urn:waybill:{}:{SCHEMA_MAJOR}", self.kind)),
            ("ce_sequence", self.version.to_string()),
            ("content-type", JSON.to_owned()),
        ];
        headers.extend(self.traceparent.clone().map(|value| ("traceparent", value)));
        headers.extend(self.tracestate.clone().map(|value| ("tracestate", value)));
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
        if headers.optional("content-type")?.is_some_and(|value| !value.starts_with(JSON)) {
            return Err(DecodeError::new("content-type", "not application/json"));
        }
        let schema = headers.optional("ce_dataschema")?;
        if schema.is_some_and(|urn| urn.rsplit(':').next() != Some(SCHEMA_MAJOR)) {
            return Err(DecodeError::new("ce_dataschema", "a major version that this release cannot read"));
        }
        let key = key.ok_or(DecodeError::new("key", "missing"))?;
        Ok(Self {
            id: headers.uuid("ce_id")?,
            kind: headers.required("ce_type")?.to_owned(),
            source: headers.required("ce_source")?.to_owned(),
            key: Uuid::try_parse_ascii(key).map_err(|_| DecodeError::new("key", "not a UUID"))?,
            version: headers.version("ce_sequence")?,
            time: OffsetDateTime::parse(headers.required("ce_time")?, &Rfc3339)
                .map_err(|_| DecodeError::new("ce_time", "not an RFC 3339 time"))?,
            // A malformed trace context is treated as absent: it is no reason to reject an event.
            traceparent: headers.optional("traceparent").ok().flatten().map(str::to_owned),
            tracestate: headers.optional("tracestate").ok().flatten().map(str::to_owned),
        })
    }
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

    fn required(&self, name: &'static str) -> Result<&'a str, DecodeError> {
        match self.optional(name)? {
            Some(value) if !value.is_empty() => Ok(value),
            _ => Err(DecodeError::new(name, "missing")),
        }
    }

    fn uuid(&self, name: &'static str) -> Result<Uuid, DecodeError> {
        Uuid::try_parse(self.required(name)?).map_err(|_| DecodeError::new(name, "not a UUID"))
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
            traceparent: Some("00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01".to_owned()),
            tracestate: None,
        }
    }

    fn parse(key: Option<&str>, headers: &[(&'static str, String)]) -> Result<Envelope, DecodeError> {
        let headers: Vec<_> = headers.iter().map(|(name, value)| (*name, Some(value.as_bytes()))).collect();
        Envelope::parse(key.map(str::as_bytes), &headers)
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
