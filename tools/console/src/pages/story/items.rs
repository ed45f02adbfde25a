//! The steps of one trace, from its spans and records.

use std::collections::BTreeMap;
use std::sync::Arc;

use topology::SERVICES;

use super::steps::{Effect, Step};
use crate::kafka::Seen;
use crate::pages::diagram::color;
use crate::traces::{Span, hex};

/// One bar of a waterfall.
#[derive(Clone, Debug)]
pub struct Item {
    /// Unique within a story, and the same when the story is assembled again.
    pub id: String,
    pub service: String,
    pub step: Step,
    pub label: String,
    pub tags: Vec<String>,
    /// The color: `fact`, `state`, `mail`, `wait` or `bad`.
    pub class: &'static str,
    /// In nanoseconds since 1970.
    pub start: u64,
    pub end: u64,
    /// `None`: the bar follows from others.
    pub span: Option<Span>,
    /// The page of its record.
    pub href: Option<String>,
    /// The record that is handled, and by which group.
    pub handled: Option<(String, Place)>,
}

/// Topic, partition and offset of a record.
pub type Place = (String, i32, i64);

/// Names of span events. The user service records the first two in a command, and the email service
/// the last one when the mail server has accepted a mail.
const BEGUN: &str = "transaction begun";
const COMMITTED: &str = "transaction committed";
const ACCEPTED: &str = "mail accepted by the SMTP server";

/// Every step of a trace, in the order of their starts. `prefix` is the setting TOPIC_PREFIX, and
/// `now` the end of what still waits.
pub fn items(spans: Vec<Span>, records: &[Arc<Seen>], prefix: &str, now: u64) -> Vec<Item> {
    let mut items: Vec<Item> = records.iter().filter_map(|seen| record(seen, records)).collect();
    for span in spans {
        items.extend(transaction(&span));
        items.push(step(span, prefix));
    }
    items.sort_by_key(|item| (item.start, item.end));
    number_attempts(&mut items);
    let waits: Vec<Item> = pauses(&items).chain(outboxes(&items, now)).collect();
    items.extend(waits);
    // A span may say that it ended before it began.
    items.iter_mut().for_each(|item| item.end = item.end.max(item.start));
    // A longer bar first: what happens within it follows.
    items.sort_by_key(|item| (item.start, u64::MAX - item.end));
    items
}

fn item(span: Span, step: Step, label: String, class: &'static str) -> Item {
    let class = if span.error.is_some() { "bad" } else { class };
    Item {
        id: format!("span-{}-{}", span.service, hex(&span.id)),
        service: span.service.clone(),
        step,
        label,
        tags: vec![],
        class,
        start: span.start,
        end: span.end,
        href: None,
        handled: None,
        span: Some(span),
    }
}

fn step(span: Span, prefix: &str) -> Item {
    let text = |name: &str| span.text(name).to_owned();
    match &*span.name {
        "request" => {
            let label = format!("{} {}", text("http.request.method"), text("http.route"));
            let status = text("http.response.status_code");
            let class = if status.starts_with('5') { "bad" } else { "fact" };
            let mut request = item(span, Step::Request, label, class);
            request.tags.push(status);
            request
        }
        "publish" => {
            let count = text("messaging.batch.message_count");
            let (class, tag) = match &*count {
                "" => ("bad", "not published".to_owned()),
                "1" => ("fact", "1 record".to_owned()),
                count => ("fact", format!("{count} records")),
            };
            let mut round = item(span, Step::Round, "round of the relay".to_owned(), class);
            round.tags.push(tag);
            round
        }
        "send" => mail(span),
        "dead-letter" => {
            let place = place(&span, prefix);
            let group = text("messaging.consumer.group.name");
            let mut letter = item(span, Step::DeadLetter, format!("{group}: dead letter"), "bad");
            letter.class = "bad";
            letter.handled = place.map(|place| (group, place));
            letter
        }
        name if name.starts_with("process ") => handling(span, prefix),
        name => {
            let label = name.to_owned();
            item(span, Step::Other, label, "fact")
        }
    }
}

fn handling(span: Span, prefix: &str) -> Item {
    let group = span.text("messaging.consumer.group.name").to_owned();
    let label = format!("{group}: {}", span.text("event.type"));
    let place = place(&span, prefix);
    let topic = place.as_ref().map_or("", |(topic, ..)| topic);
    let step = Step::Handling(Effect::of(&span.service));
    let mut tags = vec![];
    for (attribute, text) in [
        ("records.applied", "applied"),
        ("records.duplicate", "recognised duplicate"),
        ("records.stale", "older version"),
    ] {
        let count = span.text(attribute);
        match (count, span.text("messaging.batch.message_count")) {
            ("", _) => {}
            ("1", "1") => tags.push(text.to_owned()),
            (count, all) => tags.push(format!("batch of {all}: {count} {text}")),
        }
    }
    if span.error.is_some() {
        tags.push("failed".to_owned());
    }
    let class = if topic.is_empty() { "fact" } else { color(topic) };
    let mut handling = item(span, step, label, class);
    handling.tags = tags;
    handling.handled = place.map(|place| (group, place));
    handling
}

/// The dialogue with the mail server, and how it ended.
fn mail(span: Span) -> Item {
    let of_last = |name: &str| span.events.iter().rev().find_map(|event| event.attributes.get(name)).cloned();
    let attempt = of_last("attempt").map_or("mail".to_owned(), |attempt| format!("mail, attempt {attempt}"));
    let code = of_last("smtp.code").or_else(|| of_last("failure"));
    let is_accepted = span.events.iter().any(|event| event.name == ACCEPTED);
    let tag = if is_accepted { "accepted".to_owned() } else { code.unwrap_or_else(|| "not accepted".to_owned()) };
    let class = if is_accepted { "mail" } else { "bad" };
    let mut mail = item(span, Step::Mail, attempt, class);
    mail.class = class;
    mail.tags.push(tag);
    mail
}

/// The transaction of a command, from what its span notes.
fn transaction(span: &Span) -> Option<Item> {
    let at = |name: &str| span.events.iter().find(|event| event.name == name).cloned();
    let begun = at(BEGUN)?;
    let committed = at(COMMITTED);
    let is_committed = committed.is_some();
    let end = committed.as_ref().map_or(span.end, |event| event.time);
    // The code of the bar is where the transaction ended.
    let note = committed.unwrap_or_else(|| begun.clone());
    let part =
        Span { attributes: note.attributes, events: vec![], start: begun.time, end, error: None, ..span.clone() };
    let class = if is_committed { "fact" } else { "wait" };
    let mut transaction = item(part, Step::Transaction, "transaction".to_owned(), class);
    transaction.id.push_str("-transaction");
    transaction.tags.push(if is_committed { "committed" } else { "not committed" }.to_owned());
    Some(transaction)
}

fn place(span: &Span, prefix: &str) -> Option<Place> {
    let topic = span.text("messaging.destination.name");
    let topic = topic.strip_prefix(prefix).unwrap_or(topic).to_owned();
    let partition = span.text("messaging.destination.partition.id").parse().ok()?;
    Some((topic, partition, span.text("messaging.kafka.offset").parse().ok()?))
}

/// A record, in the lane of the service that writes its topic.
fn record(seen: &Seen, all: &[Arc<Seen>]) -> Option<Item> {
    let Seen { topic, partition, offset, .. } = *seen;
    let writer = SERVICES.iter().find(|service| service.writes.contains(&topic))?;
    let time = u64::try_from(seen.time?).ok()?.saturating_mul(1_000_000);
    let kind = if seen.kind.is_empty() { "record without a type" } else { &seen.kind };
    let what = if seen.is_tombstone { " (tombstone)" } else { "" };
    let mut tags = vec![format!("{topic} {partition}@{offset}")];
    if !seen.version.is_empty() {
        tags.push(format!("version {}", seen.version));
    }
    let is_copy = |other: &Arc<Seen>| {
        other.topic == topic && other.partition == partition && other.offset < offset && other.event == seen.event
    };
    if seen.event.is_some() && all.iter().any(is_copy) {
        tags.push("copy".to_owned());
    }
    Some(Item {
        id: format!("record-{topic}-{partition}-{offset}"),
        service: writer.name.to_owned(),
        step: Step::Record,
        label: format!("{kind}{what}"),
        tags,
        class: color(topic),
        start: time,
        end: time,
        span: None,
        href: Some(format!("/events/{topic}/{partition}/{offset}")),
        handled: None,
    })
}

/// Groups the bars that are attempts at the same work: a group that handles one record, or the
/// email service that sends one mail. Returns the indices of each group's bars.
fn attempts(items: &[Item]) -> BTreeMap<String, Vec<usize>> {
    let mut attempts: BTreeMap<String, Vec<usize>> = BTreeMap::new();
    for (index, item) in items.iter().enumerate() {
        let key = match (item.step, &item.handled, &item.span) {
            (Step::Handling(_), Some((group, place)), _) => format!("{group} {place:?}"),
            (Step::Mail, _, Some(span)) => format!("mail {}", span.text("delivery.id")),
            _ => continue,
        };
        attempts.entry(key).or_default().push(index);
    }
    attempts
}

fn number_attempts(items: &mut [Item]) {
    for indices in attempts(items).into_values().filter(|indices| indices.len() > 1) {
        for (number, index) in (1..).zip(indices) {
            // The label of a mail already contains the number of its attempt.
            if items[index].step != Step::Mail {
                items[index].tags.insert(0, format!("attempt {number}"));
            }
        }
    }
}

/// What waited between two attempts.
fn pauses(items: &[Item]) -> impl Iterator<Item = Item> {
    let pairs = attempts(items).into_values().flat_map(|indices| {
        let pairs: Vec<_> = indices.windows(2).map(|pair| (pair[0], pair[1])).collect();
        pairs
    });
    pairs.filter_map(|(before, after)| {
        let (before, after) = (&items[before], &items[after]);
        let step = if before.step == Step::Mail { Step::MailPause } else { Step::Pause };
        let id = format!("{}-pause", after.id);
        (after.start > before.end).then(|| wait(id, &before.service, step, "waits", before.end, after.start))
    })
}

/// The time from the commit of a change until the relay's next round: of a command, and of a mail
/// that was sent.
fn outboxes(items: &[Item], now: u64) -> impl Iterator<Item = Item> {
    let ends = items.iter().filter(|item| match item.step {
        Step::Transaction => item.class == "fact",
        Step::Mail => item.class == "mail",
        _ => false,
    });
    ends.filter_map(move |end| {
        let of_service = || items.iter().filter(|item| item.service == end.service);
        let round = of_service().find(|item| item.step == Step::Round && item.start >= end.end);
        let is_published = of_service().any(|item| matches!(item.step, Step::Record | Step::Round));
        let id = format!("{}-outbox", end.id);
        match round {
            Some(round) => Some(wait(id, &end.service, Step::Outbox, "in the outbox", end.end, round.start)),
            // The records are there, so the round has ended. Only its span has not arrived yet.
            None if is_published => None,
            None => {
                let mut waiting = wait(id, &end.service, Step::Outbox, "in the outbox", end.end, now.max(end.end));
                waiting.tags.push("waits for the relay".to_owned());
                Some(waiting)
            }
        }
    })
}

fn wait(id: String, service: &str, step: Step, label: &str, start: u64, end: u64) -> Item {
    Item {
        id,
        service: service.to_owned(),
        step,
        label: label.to_owned(),
        tags: vec![],
        class: "wait",
        start,
        end,
        span: None,
        href: None,
        handled: None,
    }
}
