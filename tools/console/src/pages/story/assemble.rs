//! A story as a page shows it: one chapter for each request about the user, the newest first.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;

use topology::SERVICES;

use super::items::{Item, items};
use super::scale::{Scale, WIDTH};
use super::steps::Step;
use crate::kafka::{Offsets, Seen};
use crate::pages::text::{clock, duration};
use crate::source::SourceUrl;
use crate::traces::{Event, Span, TraceId, hex};

/// Chapters of a story, the newest.
pub const CHAPTERS: usize = 10;
/// Bars of a chapter, the first ones.
pub const BARS: usize = 200;
/// Attributes that are not shown: they name the code and the thread, and the code is shown as a
/// link.
const HIDDEN: [&str; 2] = ["code.", "thread."];

/// What a story is assembled from.
pub struct Material<'a> {
    /// The records of the user, in any order.
    pub records: Vec<Arc<Seen>>,
    pub spans: HashMap<TraceId, Vec<Span>>,
    pub offsets: &'a Offsets,
    /// The setting TOPIC_PREFIX.
    pub prefix: &'a str,
    pub source: Option<&'a SourceUrl>,
    /// In nanoseconds since 1970.
    pub now: u64,
}

/// One request about the user, and all that followed.
pub struct Chapter {
    pub id: String,
    pub title: String,
    /// A time of day, in UTC.
    pub begun: String,
    pub took: String,
    pub pills: Vec<Pill>,
    pub lanes: Vec<Lane>,
    /// Bars that are left out.
    pub left_out: usize,
    /// Whether there are spans, and not only records.
    pub has_spans: bool,
}

/// A short statement, with its state: `good`, `wait` or `bad`.
#[derive(Clone)]
pub struct Pill {
    pub state: &'static str,
    pub text: String,
}

/// What happened in one service.
pub struct Lane {
    pub service: String,
    pub bars: Vec<Bar>,
}

pub struct Bar {
    pub id: String,
    pub label: String,
    pub tags: Vec<String>,
    pub class: &'static str,
    pub x: String,
    pub width: String,
    /// Since the beginning of the chapter.
    pub start: String,
    pub took: String,
    pub href: Option<String>,
    pub code: Option<Code>,
    pub fields: Vec<(String, String)>,
    pub lines: Vec<Line>,
    pub error: Option<String>,
    pub if_it_died: &'static str,
}

/// A file and a line.
pub struct Code {
    pub text: String,
    pub href: Option<String>,
}

/// A log line, or a note.
pub struct Line {
    pub time: String,
    pub level: String,
    pub text: String,
    pub fields: Vec<(String, String)>,
    pub code: Option<Code>,
}

/// The chapters of a user's story.
pub fn assemble(mut material: Material<'_>) -> Vec<Chapter> {
    let mut by_trace: BTreeMap<Option<TraceId>, Vec<Arc<Seen>>> = BTreeMap::new();
    for seen in std::mem::take(&mut material.records) {
        by_trace.entry(seen.trace).or_default().push(seen);
    }
    let begun = |records: &[Arc<Seen>]| records.iter().filter_map(|seen| seen.time).min();
    let mut traces: Vec<_> = by_trace.into_iter().collect();
    traces.sort_by_key(|(_, records)| std::cmp::Reverse(begun(records)));
    let chapters = traces.into_iter().take(CHAPTERS).map(|(trace, mut records)| {
        records.sort_by_key(|seen| (seen.topic, seen.partition, seen.offset));
        let spans = trace.and_then(|trace| material.spans.remove(&trace)).unwrap_or_default();
        chapter(trace, &records, spans, &material)
    });
    chapters.collect()
}

fn chapter(trace: Option<TraceId>, records: &[Arc<Seen>], spans: Vec<Span>, material: &Material<'_>) -> Chapter {
    let has_spans = !spans.is_empty();
    let mut items = items(spans, records, material.prefix, material.now);
    let left_out = items.len().saturating_sub(BARS);
    items.truncate(BARS);
    let begun = items.iter().map(|item| item.start).min().unwrap_or_default();
    let ended = items.iter().map(|item| item.end).max().unwrap_or_default();
    let is_pause = |step: Step| matches!(step, Step::Pause | Step::MailPause | Step::Outbox);
    let busy = items.iter().filter(|item| !is_pause(item.step)).map(|item| (item.start, item.end));
    let scale = Scale::of(busy.collect());
    let pills = pills(records, &items, material.offsets);
    let mut lanes: Vec<Lane> = vec![];
    for item in items {
        let service = item.service.clone();
        let bar = bar(item, begun, &scale, material.source);
        match lanes.iter_mut().find(|lane| lane.service == service) {
            Some(lane) => lane.bars.push(bar),
            None => lanes.push(Lane { service, bars: vec![bar] }),
        }
    }
    Chapter {
        id: trace.map_or("without-a-trace".to_owned(), |trace| hex(&trace)),
        title: title(records),
        begun: clock((begun / 1_000_000) as i64).unwrap_or_default(),
        took: took(ended - begun),
        pills,
        lanes,
        left_out,
        has_spans,
    }
}

/// What the request was, from the fact that it caused.
fn title(records: &[Arc<Seen>]) -> String {
    let facts = records.iter().filter(|seen| !seen.topic.contains(".state."));
    let kind = facts.map(|seen| &*seen.kind).find(|kind| kind.starts_with("user."));
    match kind {
        Some("user.registered") => "Registration".to_owned(),
        Some("user.profile_changed") => "Change of the profile".to_owned(),
        Some("user.email_changed") => "Change of the address".to_owned(),
        Some("user.deleted") => "Erasure".to_owned(),
        Some(other) => other.to_owned(),
        None => "Records without a fact of the user".to_owned(),
    }
}

/// What each group did with the records: as its spans say, or else as far as it has committed.
fn pills(records: &[Arc<Seen>], items: &[Item], offsets: &Offsets) -> Vec<Pill> {
    let mut pills = vec![];
    let published = records.iter().any(|seen| seen.topic.starts_with("user."));
    let (state, text) = if published { ("good", "in the topics") } else { ("wait", "not in the topics yet") };
    pills.push(Pill { state, text: text.to_owned() });
    for group in SERVICES.iter().flat_map(|service| service.groups) {
        let of_topic: Vec<&Arc<Seen>> = records.iter().filter(|seen| seen.topic == group.topic).collect();
        if of_topic.is_empty() {
            continue;
        }
        let states = of_topic.iter().map(|seen| {
            let is_about = |item: &&Item| {
                let about = item.handled.as_ref();
                about.is_some_and(|(name, place)| {
                    name == group.name
                        && (place.0.as_str(), place.1, place.2) == (seen.topic, seen.partition, seen.offset)
                })
            };
            let about: Vec<&Item> = items.iter().filter(is_about).collect();
            let next = offsets.committed.get(group.name).and_then(|next| next.get(&seen.partition));
            if about.iter().any(|item| item.step == Step::DeadLetter) {
                Handled::Rejected
            } else if about.iter().any(|item| item.class != "bad") {
                Handled::Done
            } else if !about.is_empty() {
                Handled::Failing
            } else if next.is_some_and(|next| *next > seen.offset) {
                Handled::Done
            } else {
                Handled::Waits
            }
        });
        let worst = states.max().unwrap_or(Handled::Waits);
        let (state, text) = match worst {
            Handled::Done => ("good", "handled"),
            Handled::Waits => ("wait", "not handled yet"),
            Handled::Failing => ("wait", "fails and is retried"),
            Handled::Rejected => ("bad", "dead letter"),
        };
        pills.push(Pill { state, text: format!("{}: {text}", group.name) });
    }
    pills.extend(mailed(records, items));
    pills
}

/// From best to worst: a group gets the worst one of its records.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Handled {
    Done,
    Waits,
    Failing,
    Rejected,
}

/// Whether the mail of a registration was sent.
fn mailed(records: &[Arc<Seen>], items: &[Item]) -> Option<Pill> {
    let has = |kind: &str| records.iter().any(|seen| seen.kind == kind);
    if !has("user.registered") {
        return None;
    }
    let attempts = items.iter().filter(|item| item.step == Step::Mail).count();
    let accepted = items.iter().filter(|item| item.step == Step::Mail && item.class == "mail").count();
    let after = if attempts > 1 { format!(" after {attempts} attempts") } else { String::new() };
    let (state, text) = match (has("email.sent"), has("email.failed")) {
        (true, _) if accepted > 1 => ("good", format!("mailed, {accepted} copies with one Message-ID")),
        (true, _) => ("good", format!("mailed{after}")),
        (_, true) => ("bad", format!("the mail failed{after}")),
        _ if accepted > 0 => ("wait", "mailed, and not published yet".to_owned()),
        _ if attempts > 1 => ("wait", format!("not mailed yet, after {attempts} attempts")),
        _ => ("wait", "not mailed yet".to_owned()),
    };
    Some(Pill { state, text })
}

fn bar(item: Item, begun: u64, scale: &Scale, source: Option<&SourceUrl>) -> Bar {
    let (x, width) = scale.bar(item.start, item.end);
    debug_assert!(x + width <= WIDTH + 1.0);
    let (code, fields, lines, error) = match item.span {
        None => (None, vec![], vec![], None),
        Some(span) => {
            let lines = span.events.iter().map(|event| line(event, begun, source)).collect();
            (code(&span.attributes, source), fields(&span.attributes, &[]), lines, span.error)
        }
    };
    Bar {
        id: item.id,
        label: item.label,
        tags: item.tags,
        class: item.class,
        x: format!("{x:.1}"),
        width: format!("{width:.1}"),
        start: took(item.start - begun),
        took: if item.end > item.start { took(item.end - item.start) } else { "–".to_owned() },
        href: item.href,
        code,
        fields,
        lines,
        error,
        if_it_died: item.step.if_it_died(),
    }
}

fn line(event: &Event, begun: u64, source: Option<&SourceUrl>) -> Line {
    Line {
        time: took(event.time.saturating_sub(begun)),
        level: event.attributes.get("level").cloned().unwrap_or_else(|| "NOTE".to_owned()),
        text: event.name.clone(),
        fields: fields(&event.attributes, &["level", "target"]),
        code: code(&event.attributes, source),
    }
}

fn fields(attributes: &BTreeMap<String, String>, without: &[&str]) -> Vec<(String, String)> {
    let shown = attributes
        .iter()
        .filter(|(name, _)| !without.contains(&name.as_str()) && !HIDDEN.iter().any(|hidden| name.starts_with(hidden)));
    shown.map(|(name, value)| (name.clone(), value.clone())).collect()
}

fn code(attributes: &BTreeMap<String, String>, source: Option<&SourceUrl>) -> Option<Code> {
    let file = attributes.get("code.file.path")?;
    let line = attributes.get("code.line.number")?.parse().ok()?;
    let href = source.and_then(|source| source.link(file, line));
    Some(Code { text: format!("{file}:{line}"), href })
}

/// A time in the unit that fits, with tenths of a millisecond.
fn took(nanoseconds: u64) -> String {
    let milliseconds = nanoseconds as f64 / 1e6;
    if milliseconds < 100.0 { format!("{milliseconds:.1} ms") } else { duration(milliseconds / 1e3) }
}

#[cfg(test)]
mod tests {
    use uuid::Uuid;

    use super::*;

    const TRACE: TraceId = [7; 16];
    /// The beginning of the story, in nanoseconds.
    const BEGUN: u64 = 1_700_000_000_000_000_000;

    fn seen(topic: &'static str, offset: i64, kind: &str, milliseconds: i64) -> Arc<Seen> {
        Arc::new(Seen {
            number: 0,
            topic,
            partition: 2,
            offset,
            time: Some((BEGUN / 1_000_000) as i64 + milliseconds),
            key: Some(Uuid::from_u128(7)),
            kind: kind.to_owned(),
            version: "1".to_owned(),
            size: 10,
            event: Some(Uuid::from_u128(9)),
            trace: Some(TRACE),
            is_tombstone: false,
        })
    }

    /// A span from and to these milliseconds.
    fn span(service: &str, name: &str, from: u64, to: u64, attributes: &[(&str, &str)]) -> Span {
        Span {
            service: service.to_owned(),
            name: name.to_owned(),
            id: [from.to_be_bytes(), to.to_be_bytes()].concat(),
            start: BEGUN + from * 1_000_000,
            end: BEGUN + to * 1_000_000,
            attributes: attributes.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect(),
            ..Span::default()
        }
    }

    fn event(name: &str, at: u64, attributes: &[(&str, &str)]) -> Event {
        let Span { start, attributes, .. } = span("", "", at, at, attributes);
        Event { time: start, name: name.to_owned(), attributes }
    }

    fn handling(from: u64, group: &str, offset: &str, outcome: &str) -> Span {
        let service = group.split('.').next().unwrap();
        let attributes = [
            ("messaging.consumer.group.name", group),
            ("messaging.destination.name", "p.user.events.v1"),
            ("messaging.destination.partition.id", "2"),
            ("messaging.kafka.offset", offset),
            ("messaging.batch.message_count", "1"),
            ("event.type", "user.registered"),
            (outcome, "1"),
        ];
        span(service, "process user.registered", from, from + 2, &attributes)
    }

    fn story(records: Vec<Arc<Seen>>, spans: Vec<Span>) -> Chapter {
        let source = "https://git.example.com/{file}#L{line}".parse().unwrap();
        let mut chapters = assemble(Material {
            records,
            spans: HashMap::from([(TRACE, spans)]),
            offsets: &Offsets::default(),
            prefix: "p.",
            source: Some(&source),
            now: BEGUN + 60_000_000_000,
        });
        assert_eq!(chapters.len(), 1);
        chapters.remove(0)
    }

    /// The bars of a service as `label [tags] class`.
    fn bars(chapter: &Chapter, service: &str) -> Vec<String> {
        let lane = chapter.lanes.iter().find(|lane| lane.service == service);
        let bars = lane.iter().flat_map(|lane| &lane.bars);
        bars.map(|bar| format!("{} [{}] {}", bar.label, bar.tags.join(", "), bar.class)).collect()
    }

    fn pill<'a>(chapter: &'a Chapter, text: &str) -> &'a str {
        let found = chapter.pills.iter().find(|pill| pill.text == text);
        found
            .unwrap_or_else(|| panic!("no {text}: {:?}", chapter.pills.iter().map(|p| &p.text).collect::<Vec<_>>()))
            .state
    }

    fn request() -> Span {
        let place = [("code.file.path", "services/user/src/http.rs"), ("code.line.number", "150")];
        let events = vec![event("transaction begun", 1, &place), event("transaction committed", 4, &place)];
        let attributes = [
            ("http.request.method", "POST"),
            ("http.route", "/users"),
            ("http.response.status_code", "201"),
            ("thread.id", "3"),
        ];
        Span { events, ..span("user", "request", 0, 5, &attributes) }
    }

    #[test]
    fn a_registration_is_told_from_the_request_to_each_effect() {
        let records = vec![
            seen("user.events.v1", 10, "user.registered", 8),
            seen("user.state.v1", 3, "user.state", 8),
            seen("email.events.v1", 1, "email.sent", 30),
        ];
        let accepted = event("mail accepted by the SMTP server", 20, &[("attempt", "1"), ("level", "INFO")]);
        let spans = vec![
            request(),
            span("user", "publish", 6, 9, &[("messaging.batch.message_count", "2")]),
            handling(10, "email.welcome", "10", "records.applied"),
            Span { events: vec![accepted], ..span("email", "send", 13, 22, &[("delivery.id", "d")]) },
            handling(10, "analytics.users", "10", "records.duplicate"),
        ];
        let chapter = story(records, spans);
        assert_eq!(
            (chapter.title.as_str(), chapter.begun.as_str(), chapter.took.as_str()),
            ("Registration", "22:13:20.000", "30.0 ms")
        );
        assert_eq!(
            bars(&chapter, "user"),
            [
                "POST /users [201] fact",
                "transaction [committed] fact",
                "in the outbox [] wait",
                "round of the relay [2 records] fact",
                "user.registered [user.events.v1 2@10, version 1] fact",
                "user.state [user.state.v1 2@3, version 1] state",
            ]
        );
        let email = bars(&chapter, "email");
        assert_eq!(email[..2], ["email.welcome: user.registered [applied] fact", "mail, attempt 1 [accepted] mail"],);
        assert!(email[2].starts_with("email.sent"), "{email:?}");
        assert_eq!(bars(&chapter, "analytics"), ["analytics.users: user.registered [recognised duplicate] fact"]);
        for text in ["in the topics", "email.welcome: handled", "analytics.users: handled", "mailed"] {
            assert_eq!(pill(&chapter, text), "good");
        }
        assert_eq!(pill(&chapter, "cache.profiles: not handled yet"), "wait");

        let request = &chapter.lanes[0].bars[0];
        assert_eq!(request.lines.len(), 2);
        let code = request.lines[0].code.as_ref().unwrap();
        assert_eq!(code.href.as_deref(), Some("https://git.example.com/services/user/src/http.rs#L150"));
        assert!(request.fields.iter().all(|(name, _)| !name.starts_with("thread.")), "{:?}", request.fields);
        for bar in chapter.lanes.iter().flat_map(|lane| &lane.bars) {
            assert_ne!(bar.if_it_died, Step::Other.if_it_died(), "{}", bar.label);
        }
    }

    #[test]
    fn attempts_and_what_waited_between_them_are_shown() {
        let deferred =
            event("mail server deferred the mail; will retry", 14, &[("attempt", "1"), ("smtp.code", "451")]);
        let accepted = event("mail accepted by the SMTP server", 5_010, &[("attempt", "2")]);
        let mut failed = handling(2, "email.welcome", "10", "");
        failed.error = Some("SQLSTATE 57P01".to_owned());
        let spans = vec![
            failed,
            handling(8, "email.welcome", "10", "records.applied"),
            Span { events: vec![deferred], ..span("email", "send", 12, 15, &[("delivery.id", "d")]) },
            Span { events: vec![accepted], ..span("email", "send", 5_000, 5_020, &[("delivery.id", "d")]) },
        ];
        let chapter = story(vec![seen("user.events.v1", 10, "user.registered", 1)], spans);
        assert_eq!(
            bars(&chapter, "email"),
            [
                "email.welcome: user.registered [attempt 1, failed] bad",
                "waits [] wait",
                "email.welcome: user.registered [attempt 2, applied] fact",
                "mail, attempt 1 [451] bad",
                "waits [] wait",
                "mail, attempt 2 [accepted] mail",
                "in the outbox [waits for the relay] wait",
            ]
        );
        assert_eq!(pill(&chapter, "email.welcome: handled"), "good");
        assert_eq!(pill(&chapter, "mailed, and not published yet"), "wait");
    }

    #[test]
    fn copies_letters_and_rounds_that_failed_are_recognised() {
        let records = vec![
            seen("user.events.v1", 10, "user.deleted", 8),
            seen("user.events.v1", 14, "user.deleted", 20),
            Arc::new(Seen { is_tombstone: true, ..(*seen("user.state.v1", 3, "user.state", 8)).clone() }),
        ];
        let letter = [
            ("messaging.consumer.group.name", "analytics.users"),
            ("messaging.destination.name", "p.user.events.v1"),
            ("messaging.destination.partition.id", "2"),
            ("messaging.kafka.offset", "10"),
        ];
        let spans = vec![span("user", "publish", 6, 9, &[]), span("analytics", "dead-letter", 10, 12, &letter)];
        let chapter = story(records, spans);
        assert_eq!(chapter.title, "Erasure");
        let user = bars(&chapter, "user");
        assert_eq!(user[0], "round of the relay [not published] bad");
        assert!(user.contains(&"user.deleted [user.events.v1 2@14, version 1, copy] fact".to_owned()), "{user:?}");
        assert!(user.contains(&"user.state (tombstone) [user.state.v1 2@3, version 1] state".to_owned()), "{user:?}");
        assert_eq!(bars(&chapter, "analytics"), ["analytics.users: dead letter [] bad"]);
        assert_eq!(pill(&chapter, "analytics.users: dead letter"), "bad");
    }

    #[test]
    fn a_story_is_bounded_and_text_of_spans_is_any_text() {
        let hostile = "<img src=x onerror=alert(1)>\"'&";
        let mut spans: Vec<Span> =
            (0..1_000).map(|at| span(hostile, hostile, at, u64::MAX / 2_000_000, &[(hostile, hostile)])).collect();
        spans.push(Span { end: 0, ..span("user", "process ", 0, 0, &[("messaging.kafka.offset", "-1")]) });
        let chapter = story(vec![seen("user.events.v1", 1, hostile, -1)], spans);
        let shown: usize = chapter.lanes.iter().map(|lane| lane.bars.len()).sum();
        assert_eq!((shown, chapter.left_out), (BARS, 802));
    }

    #[test]
    fn without_spans_the_offsets_of_the_groups_say_what_was_handled() {
        let mut offsets = Offsets::default();
        offsets.committed.insert("analytics.users", BTreeMap::from([(2, 11)]));
        offsets.committed.insert("email.welcome", BTreeMap::from([(2, 10)]));
        let chapters = assemble(Material {
            records: vec![seen("user.events.v1", 10, "user.registered", 8)],
            spans: HashMap::new(),
            offsets: &offsets,
            prefix: "",
            source: None,
            now: BEGUN,
        });
        assert!(!chapters[0].has_spans);
        assert_eq!(pill(&chapters[0], "analytics.users: handled"), "good");
        assert_eq!(pill(&chapters[0], "email.welcome: not handled yet"), "wait");
    }
}
