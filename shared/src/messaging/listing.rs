//! What an operator sees of the dead letters. Nothing personal: a key is shown only if it is an id, a value never.

use std::io::Write;

use anyhow::Context;
use clap::Args;
use serde::Serialize;
use time::OffsetDateTime;
use time::format_description::well_known::Rfc3339;
use uuid::Uuid;

use super::dead_letters::{self, DeadLetter};
use crate::events;
use crate::service::KafkaConfig;

/// The subcommand `dead-letters`.
#[derive(Args, Clone, Copy, Debug)]
pub struct ListDeadLetters {
    /// One JSON object a line instead of a table; its fields are described in docs/operations.md.
    #[arg(long)]
    pub json: bool,
}

/// An open letter. The names of its fields are what programs read, so they stay.
#[derive(Serialize)]
struct Line<'a> {
    group: &'a str,
    /// `topic-partition-offset`: what `redrive --only` takes.
    source: String,
    topic: &'a str,
    partition: i32,
    offset: i64,
    /// The record's key, if it is an id.
    key: Option<Uuid>,
    reason: &'a str,
    attempts: u32,
    parked: bool,
    /// When it was first set aside, RFC 3339 in UTC.
    since: Option<String>,
    age_seconds: Option<i64>,
}

/// Prints the open letters of all the groups of a service.
///
/// # Errors
/// Kafka does not answer, or a group has never run and so has no letters' topic.
pub fn list_dead_letters(kafka: &KafkaConfig, groups: &[&str], options: ListDeadLetters) -> anyhow::Result<()> {
    let mut letters = vec![];
    for group in groups {
        letters.push((*group, tokio::task::block_in_place(|| dead_letters::open(kafka, group))?));
    }
    let lines = letters.iter().flat_map(|(group, letters)| letters.iter().map(|letter| line(group, letter)));
    let mut out = std::io::stdout().lock();
    let printed = if options.json { json(&mut out, lines) } else { table(&mut out, lines.collect(), groups) };
    printed.context("cannot print the dead letters")
}

fn line<'a>(group: &'a str, letter: &'a DeadLetter) -> Line<'a> {
    let since = letter.since.and_then(|ms| OffsetDateTime::from_unix_timestamp_nanos(i128::from(ms) * 1_000_000).ok());
    Line {
        group,
        source: letter.source.to_string(),
        topic: &letter.source.topic,
        partition: letter.source.partition,
        offset: letter.source.offset,
        key: dead_letters::source_key(&letter.message).and_then(|key| Uuid::try_parse_ascii(key).ok()),
        reason: &letter.reason,
        attempts: letter.attempts,
        parked: letter.parked(),
        since: since.and_then(|since| since.format(&Rfc3339).ok()),
        // Two clocks are compared here, so it is never less than none.
        age_seconds: since.map(|since| (events::now() - since).whole_seconds().max(0)),
    }
}

fn json<'a>(out: &mut impl Write, lines: impl Iterator<Item = Line<'a>>) -> anyhow::Result<()> {
    for line in lines {
        writeln!(out, "{}", serde_json::to_string(&line)?)?;
    }
    Ok(())
}

/// Columns as wide as their widest entry, the reason at the end, since it is the one that may be long; then a line per group.
fn table(out: &mut impl Write, lines: Vec<Line<'_>>, groups: &[&str]) -> anyhow::Result<()> {
    if !lines.is_empty() {
        let mut rows = vec![["GROUP", "SOURCE", "KEY", "AGE", "ATTEMPTS", "REASON"].map(str::to_owned)];
        rows.extend(lines.iter().map(|line| {
            [
                line.group.to_owned(),
                line.source.clone(),
                line.key.map_or("-".to_owned(), |key| key.to_string()),
                line.age_seconds.map_or("-".to_owned(), age),
                format!("{}{}", line.attempts, if line.parked { ", parked" } else { "" }),
                line.reason.to_owned(),
            ]
        }));
        let width = |column: usize| rows.iter().map(|row| row[column].chars().count()).max().unwrap_or(0);
        let widths: Vec<usize> = (0..5).map(width).collect();
        for [columns @ .., reason] in &rows {
            for (column, width) in columns.iter().zip(&widths) {
                write!(out, "{column:width$}  ")?;
            }
            writeln!(out, "{reason}")?;
        }
    }
    for group in groups {
        let open = lines.iter().filter(|line| line.group == *group);
        let (open, parked) = open.fold((0, 0), |(open, parked), line| (open + 1, parked + usize::from(line.parked)));
        writeln!(out, "{group}: {open} open, {parked} of them parked")?;
    }
    Ok(())
}

/// The largest unit that there is one of.
fn age(seconds: i64) -> String {
    let units = [(86_400, "d"), (3_600, "h"), (60, "min"), (1, "s")];
    let (length, unit) = units.into_iter().find(|(length, _)| seconds >= *length).unwrap_or((1, "s"));
    format!("{} {unit}", seconds / length)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_age_has_one_unit() {
        let ages = [0, 59, 60, 3_599, 3_600, 86_399, 86_400, 400 * 86_400].map(age);
        assert_eq!(ages, ["0 s", "59 s", "1 min", "59 min", "1 h", "23 h", "1 d", "400 d"]);
    }

    #[test]
    fn a_table_is_aligned_and_summed_up() {
        let line = |group, offset, parked| Line {
            group,
            source: format!("some.events.v1-0-{offset}"),
            topic: "some.events.v1",
            partition: 0,
            offset,
            key: None,
            reason: "SQLSTATE 23514",
            attempts: if parked { 5 } else { 1 },
            parked,
            since: None,
            age_seconds: Some(90),
        };
        let mut out = vec![];
        table(&mut out, vec![line("a.b", 7, false), line("a.b", 12, true)], &["a.b", "a.c"]).unwrap();
        let expected = "\
GROUP  SOURCE               KEY  AGE    ATTEMPTS   REASON
a.b    some.events.v1-0-7   -    1 min  1          SQLSTATE 23514
a.b    some.events.v1-0-12  -    1 min  5, parked  SQLSTATE 23514
a.b: 2 open, 1 of them parked
a.c: 0 open, 0 of them parked
";
        assert_eq!(String::from_utf8(out).unwrap(), expected);
    }
}
