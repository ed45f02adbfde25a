//! Records: as a client reads them from a topic, and as a test writes them.

use std::collections::BTreeSet;
use std::time::Duration;

use serde_json::json;
use time::OffsetDateTime;
use time::format_description::well_known::Rfc3339;
use uuid::Uuid;

/// A record of a topic.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Record {
    pub partition: i32,
    pub offset: i64,
    pub key: Option<Vec<u8>>,
    pub value: Option<Vec<u8>>,
    pub headers: Vec<(String, Option<Vec<u8>>)>,
}

impl Record {
    /// The first header of this name, as text.
    pub fn header(&self, name: &str) -> Option<&str> {
        let (_, value) = self.headers.iter().find(|(key, _)| key == name)?;
        std::str::from_utf8(value.as_deref()?).ok()
    }

    pub fn key_text(&self) -> String {
        text(&self.key)
    }

    pub fn version(&self) -> i64 {
        self.header("ce_sequence").and_then(|version| version.parse().ok()).expect("an event has a version")
    }

    /// Key, value and headers as text, to search for data that must not be there.
    pub fn text(&self) -> String {
        let headers = self.headers.iter().map(|(key, value)| format!("{key}: {}", text(value)));
        format!("{} {} {}", self.key_text(), text(&self.value), headers.collect::<Vec<_>>().join(" "))
    }

    /// A draft of the same record, to write it again at a new offset, as a relay does after a
    /// crash.
    pub fn to_draft(&self) -> Draft {
        Draft {
            partition: Some(self.partition),
            key: self.key.clone(),
            value: self.value.clone(),
            headers: self.headers.clone(),
        }
    }
}

fn text(bytes: &Option<Vec<u8>>) -> String {
    String::from_utf8_lossy(bytes.as_deref().unwrap_or_default()).into_owned()
}

/// How many records are copies of an earlier one.
pub fn copies(records: &[Record]) -> usize {
    records.len() - records.iter().map(|record| record.header("ce_id")).collect::<BTreeSet<_>>().len()
}

/// A record to be written. Without a partition, the hash of the key chooses one.
#[derive(Clone, Debug, Default)]
pub struct Draft {
    pub partition: Option<i32>,
    pub key: Option<Vec<u8>>,
    pub value: Option<Vec<u8>>,
    pub headers: Vec<(String, Option<Vec<u8>>)>,
}

impl Draft {
    /// A well-formed fact about `user`, as the user service would write it.
    pub fn user_event(kind: &str, user: Uuid, version: i64) -> Self {
        let value = json!({ "user_id": user }).to_string();
        Self::envelope(kind, user, version).with_value(value.as_bytes())
    }

    /// The state of `user` at this version. Without an address it is the tombstone.
    pub fn user_state(user: Uuid, version: i64, email: Option<&str>) -> Self {
        let state = Self::envelope("user.state", user, version);
        let Some(email) = email else { return state };
        let value = json!({ "email": email, "display_name": format!("Version {version}") }).to_string();
        state.with_value(value.as_bytes())
    }

    /// Key and headers of an event that happened now, without a value.
    pub fn envelope(kind: &str, key: Uuid, version: i64) -> Self {
        let headers = [
            ("ce_specversion", "1.0".to_owned()),
            ("ce_id", Uuid::now_v7().to_string()),
            ("ce_type", kind.to_owned()),
            ("ce_source", "/test".to_owned()),
            ("ce_subject", key.to_string()),
            ("ce_time", rfc3339(Duration::ZERO)),
            ("ce_dataschema", format!("urn:waybill:{kind}:1")),
            ("ce_sequence", version.to_string()),
            ("content-type", "application/json".to_owned()),
        ];
        let headers = headers.map(|(key, value)| (key.to_owned(), Some(value.into_bytes())));
        Self { partition: None, key: Some(key.to_string().into_bytes()), value: None, headers: headers.into() }
    }

    /// The event happened this long ago.
    pub fn happened_before(self, age: Duration) -> Self {
        self.replace_header("ce_time", rfc3339(age).as_bytes())
    }

    pub fn on(mut self, partition: i32) -> Self {
        self.partition = Some(partition);
        self
    }

    pub fn with_value(mut self, value: &[u8]) -> Self {
        self.value = Some(value.to_vec());
        self
    }

    pub fn with_header(mut self, header: &str, value: &[u8]) -> Self {
        self.headers.push((header.to_owned(), Some(value.to_vec())));
        self
    }

    pub fn without_header(mut self, header: &str) -> Self {
        self.headers.retain(|(name, _)| name != header);
        self
    }

    pub fn replace_header(self, header: &str, value: &[u8]) -> Self {
        self.without_header(header).with_header(header, value)
    }

    /// The event id, if the record has a valid one.
    pub fn event_id(&self) -> Option<Uuid> {
        let (_, id) = self.headers.iter().find(|(name, _)| name == "ce_id")?;
        Uuid::try_parse_ascii(id.as_deref()?).ok()
    }
}

fn rfc3339(age: Duration) -> String {
    (OffsetDateTime::now_utc() - age).format(&Rfc3339).unwrap()
}
