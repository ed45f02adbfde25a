//! Pages of open letters, for operators. They show no personal data: keys only if they are ids, and
//! no values.

use std::ops::ControlFlow;
use std::time::{Duration, Instant};

use clap::Args;
use serde::{Deserialize, Serialize};
use time::OffsetDateTime;
use time::format_description::well_known::Rfc3339;
use uuid::Uuid;

use super::index::LetterIndex;
use super::letter::DeadLetter;
use crate::events;
use crate::messaging::reader::TopicReader;
use crate::platform::settings::number;

/// Records of the letters' topic that are read for one page, at most. A filter that matches few
/// letters then answers with a short page, and with where to continue.
const SCAN_RECORDS: usize = 20_000;
/// How long the reading of one page may take.
const SCAN_TIME: Duration = Duration::from_secs(5);
/// Ten years.
const MINUTES_MAX: u32 = 10 * 366 * 24 * 60;
/// Characters of an event type that is shown. Any client may write any text into the header.
const TYPE_MAX: usize = 64;

/// An open letter. Programs read these fields, so their names do not change.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Line {
    pub group: String,
    /// `topic-partition-offset`, as `redrive --only` takes it.
    pub coordinates: String,
    pub topic: String,
    pub partition: i32,
    pub offset: i64,
    /// The key of the record, if it is an id.
    pub key: Option<Uuid>,
    /// The event type, if the letter has a copy of the record and the type has the form of one.
    #[serde(rename = "type")]
    pub kind: Option<String>,
    pub reason: String,
    pub attempts: u32,
    pub parked: bool,
    /// When the record was first dead-lettered, as RFC 3339 in UTC.
    pub since: Option<String>,
    pub age_seconds: Option<i64>,
}

impl Line {
    pub fn of(group: &str, letter: &DeadLetter) -> Self {
        let nanoseconds = |ms| i128::from(ms) * 1_000_000;
        let since = letter.since.and_then(|ms| OffsetDateTime::from_unix_timestamp_nanos(nanoseconds(ms)).ok());
        Self {
            group: group.to_owned(),
            coordinates: letter.coordinates.to_string(),
            topic: letter.coordinates.topic.clone(),
            partition: letter.coordinates.partition,
            offset: letter.coordinates.offset,
            key: letter.record_key().and_then(|key| Uuid::try_parse_ascii(key).ok()),
            kind: letter.record_kind().filter(|kind| is_event_type(kind)).map(str::to_owned),
            reason: letter.reason.clone(),
            attempts: letter.attempts,
            parked: letter.is_parked(),
            since: since.and_then(|since| since.format(&Rfc3339).ok()),
            // The difference of two clocks, which may be negative.
            age_seconds: since.map(|since| (events::now() - since).whole_seconds().max(0)),
        }
    }
}

/// Whether the text has the form of an event type, such as `user.registered`.
fn is_event_type(text: &str) -> bool {
    let in_type = |c: char| c.is_ascii_lowercase() || c == '_' || c == '.';
    text.len() <= TYPE_MAX && text.contains('.') && text.chars().all(in_type)
}

/// Which letters to show or to redrive. Without any field: all.
#[derive(Args, Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Filter {
    /// Only letters whose reason contains this text.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[arg(long, value_name = "TEXT")]
    pub reason_contains: Option<String>,
    /// Only letters about events of this type. Letters that are pointers have none.
    #[serde(default, rename = "type", skip_serializing_if = "Option::is_none")]
    #[arg(long = "type", value_name = "TYPE")]
    pub kind: Option<String>,
    /// Only letters about records with this key, if it is an id.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[arg(long, value_name = "UUID")]
    pub key: Option<Uuid>,
    /// Only letters that were first written at least this long ago.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[arg(long, value_name = "MINUTES", value_parser = number::<u32>(0..=MINUTES_MAX))]
    pub older_than_minutes: Option<u32>,
    /// Only letters that were first written less than this long ago.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[arg(long, value_name = "MINUTES", value_parser = number::<u32>(0..=MINUTES_MAX))]
    pub younger_than_minutes: Option<u32>,
}

impl Filter {
    pub fn matches(&self, line: &Line) -> bool {
        let minutes = |limit: u32| i64::from(limit) * 60;
        self.reason_contains.as_ref().is_none_or(|part| line.reason.contains(part.as_str()))
            && self.kind.as_ref().is_none_or(|kind| line.kind.as_ref() == Some(kind))
            && self.key.is_none_or(|key| line.key == Some(key))
            && self.older_than_minutes.is_none_or(|limit| line.age_seconds.is_some_and(|age| age >= minutes(limit)))
            && self.younger_than_minutes.is_none_or(|limit| line.age_seconds.is_some_and(|age| age < minutes(limit)))
    }
}

/// Some open letters of one group, in the order of their topic.
pub struct Page {
    pub lines: Vec<Line>,
    /// Offset of the letters' topic at which the next page begins.
    pub next: i64,
}

/// Reads the letters from offset `from` on and before `end` that match, until there are `limit`, or
/// until enough was read for one page. A letter that is written again while an operator reads the
/// pages comes again on a later page. Blocks the calling thread.
///
/// # Errors
/// Kafka refuses or does not answer.
pub fn page(
    reader: &mut TopicReader,
    (group, letters_topic): (&str, &str),
    index: &LetterIndex,
    (from, end): (i64, i64),
    filter: &Filter,
    limit: usize,
) -> anyhow::Result<Page> {
    let started = Instant::now();
    let mut lines = vec![];
    let mut read = 0;
    let next = reader.scan(letters_topic, from, end, |message| {
        read += 1;
        if let Some(record) = index.record_of(&message) {
            let line = Line::of(group, &DeadLetter::read(record, message));
            lines.extend(filter.matches(&line).then_some(line));
        }
        if lines.len() >= limit || read >= SCAN_RECORDS || started.elapsed() >= SCAN_TIME {
            ControlFlow::Break(())
        } else {
            ControlFlow::Continue(())
        }
    })?;
    Ok(Page { lines, next })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn line() -> Line {
        Line {
            group: "a.b".to_owned(),
            coordinates: "some.events.v1-0-7".to_owned(),
            topic: "some.events.v1".to_owned(),
            partition: 0,
            offset: 7,
            key: Some(Uuid::nil()),
            kind: Some("user.registered".to_owned()),
            reason: "SQLSTATE 23514".to_owned(),
            attempts: 1,
            parked: false,
            since: None,
            age_seconds: Some(3_600),
        }
    }

    #[test]
    fn every_field_of_a_filter_must_match() {
        let all = Filter {
            reason_contains: Some("23514".to_owned()),
            kind: Some("user.registered".to_owned()),
            key: Some(Uuid::nil()),
            older_than_minutes: Some(60),
            younger_than_minutes: Some(61),
        };
        assert!(all.matches(&line()) && Filter::default().matches(&line()));
        let wrong = [
            Filter { reason_contains: Some("22".to_owned()), ..all.clone() },
            Filter { kind: Some("user".to_owned()), ..all.clone() },
            Filter { key: Some(Uuid::max()), ..all.clone() },
            Filter { older_than_minutes: Some(61), ..all.clone() },
            Filter { younger_than_minutes: Some(60), ..all.clone() },
        ];
        for filter in wrong {
            assert!(!filter.matches(&line()), "{filter:?}");
        }
        let unknown = Line { key: None, kind: None, age_seconds: None, ..line() };
        assert!(!all.matches(&unknown) && Filter::default().matches(&unknown));
    }

    #[test]
    fn a_type_is_shown_only_if_it_has_the_form_of_one() {
        assert!(is_event_type("user.profile_changed"));
        for wrong in ["", "ada@example.com", "Ada.Lovelace", "user", "user.\u{1b}[2J", &"a.".repeat(40)] {
            assert!(!is_event_type(wrong), "{wrong:?}");
        }
    }
}
