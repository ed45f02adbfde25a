//! The list of dead letters, for operators. It shows no personal data: keys only if they are ids,
//! and no values.

use std::io::Write;

use anyhow::Context;
use clap::Args;
use serde::Serialize;
use time::OffsetDateTime;
use time::format_description::well_known::Rfc3339;
use uuid::Uuid;

use super::letter::DeadLetter;
use super::table;
use crate::events;
use crate::messaging::kafka::KafkaConfig;

/// The subcommand `dead-letters`.
#[derive(Args, Clone, Copy, Debug)]
pub struct ListDeadLetters {
    /// Print one JSON object per line instead of a table. docs/operations.md describes the fields.
    #[arg(long)]
    pub json: bool,
}

/// An open letter. Programs read these fields, so their names do not change.
#[derive(Serialize)]
struct Line<'a> {
    group: &'a str,
    /// `topic-partition-offset`, as `redrive --only` takes it.
    coordinates: String,
    topic: &'a str,
    partition: i32,
    offset: i64,
    /// The key of the record, if it is an id.
    key: Option<Uuid>,
    reason: &'a str,
    attempts: u32,
    parked: bool,
    /// When the record was first dead-lettered, as RFC 3339 in UTC.
    since: Option<String>,
    age_seconds: Option<i64>,
}

/// Prints the open letters of all groups of a service.
///
/// # Errors
/// Kafka does not answer, or a topic does not exist because its group has never run.
pub fn list_dead_letters(kafka: &KafkaConfig, groups: &[&str], options: ListDeadLetters) -> anyhow::Result<()> {
    let mut letters = vec![];
    for group in groups {
        letters.push((*group, tokio::task::block_in_place(|| table::open(kafka, group))?));
    }
    let lines = letters.iter().flat_map(|(group, letters)| letters.iter().map(|letter| line(group, letter)));
    let mut out = std::io::stdout().lock();
    let printed =
        if options.json { print_json(&mut out, lines) } else { print_table(&mut out, lines.collect(), groups) };
    printed.context("cannot print the dead letters")
}

fn line<'a>(group: &'a str, letter: &'a DeadLetter) -> Line<'a> {
    let since = letter.since.and_then(|ms| OffsetDateTime::from_unix_timestamp_nanos(i128::from(ms) * 1_000_000).ok());
    Line {
        group,
        coordinates: letter.coordinates.to_string(),
        topic: &letter.coordinates.topic,
        partition: letter.coordinates.partition,
        offset: letter.coordinates.offset,
        key: letter.record_key().and_then(|key| Uuid::try_parse_ascii(key).ok()),
        reason: &letter.reason,
        attempts: letter.attempts,
        parked: letter.is_parked(),
        since: since.and_then(|since| since.format(&Rfc3339).ok()),
        // The difference of two clocks, which may be negative.
        age_seconds: since.map(|since| (events::now() - since).whole_seconds().max(0)),
    }
}

fn print_json<'a>(out: &mut impl Write, lines: impl Iterator<Item = Line<'a>>) -> anyhow::Result<()> {
    for line in lines {
        writeln!(out, "{}", serde_json::to_string(&line)?)?;
    }
    Ok(())
}

/// Prints aligned columns, then a summary line per group. The reason is last, because it may be
/// long.
fn print_table(out: &mut impl Write, lines: Vec<Line<'_>>, groups: &[&str]) -> anyhow::Result<()> {
    if !lines.is_empty() {
        let mut rows = vec![["GROUP", "COORDINATES", "KEY", "AGE", "ATTEMPTS", "REASON"].map(str::to_owned)];
        rows.extend(lines.iter().map(|line| {
            [
                line.group.to_owned(),
                line.coordinates.clone(),
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
        let letters = lines.iter().filter(|line| line.group == *group);
        let open = letters.clone().count();
        let parked = letters.filter(|line| line.parked).count();
        writeln!(out, "{group}: {open} open, {parked} of them parked")?;
    }
    Ok(())
}

/// An age in whole units of the largest unit that fits into it.
fn age(seconds: i64) -> String {
    let units = [(86_400, "d"), (3_600, "h"), (60, "min"), (1, "s")];
    let (length, unit) = units.into_iter().find(|(length, _)| seconds >= *length).unwrap_or((1, "s"));
    format!("{} {unit}", seconds / length)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_age_is_printed_in_one_unit() {
        let ages = [0, 59, 60, 3_599, 3_600, 86_399, 86_400, 400 * 86_400].map(age);
        assert_eq!(ages, ["0 s", "59 s", "1 min", "59 min", "1 h", "23 h", "1 d", "400 d"]);
    }

    #[test]
    fn the_table_is_aligned_and_ends_with_a_summary_per_group() {
        let line = |group, offset, parked| Line {
            group,
            coordinates: format!("some.events.v1-0-{offset}"),
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
        print_table(&mut out, vec![line("a.b", 7, false), line("a.b", 12, true)], &["a.b", "a.c"]).unwrap();
        let expected = "\
GROUP  COORDINATES          KEY  AGE    ATTEMPTS   REASON
a.b    some.events.v1-0-7   -    1 min  1          SQLSTATE 23514
a.b    some.events.v1-0-12  -    1 min  5, parked  SQLSTATE 23514
a.b: 2 open, 1 of them parked
a.c: 0 open, 0 of them parked
";
        assert_eq!(String::from_utf8(out).unwrap(), expected);
    }
}
