//! `GET /dead-letters`: the open letters, in pages.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::Arc;

use axum::extract::rejection::QueryRejection;
use axum::extract::{Query, State};
use axum::response::{IntoResponse, Response};
use axum::{Json, Router, routing};
use clap::Args;
use serde::{Deserialize, Serialize};
use tokio::task::block_in_place;
use uuid::Uuid;

use super::client::{aligned, get, printable, query};
use super::operations::{Group, Operations, Refused};
use crate::messaging::dead_letters::{Filter, Line, page};
use crate::platform::problem::{INVALID_QUERY, IntoProblem};
use crate::platform::settings::number;

const PAGE_DEFAULT: usize = 100;
const PAGE_MAX: usize = 1_000;

pub(super) fn routes() -> Router<Operations> {
    Router::new().route("/dead-letters", routing::get(list))
}

/// The parameters of the query string.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Parameters {
    group: Option<String>,
    reason_contains: Option<String>,
    #[serde(rename = "type")]
    kind: Option<String>,
    key: Option<Uuid>,
    older_than_minutes: Option<u32>,
    younger_than_minutes: Option<u32>,
    /// Letters of a page.
    limit: Option<usize>,
    /// Where the page begins: `next` of the page before.
    cursor: Option<String>,
}

/// A page of letters.
#[derive(Serialize, Deserialize)]
pub(super) struct Listed {
    /// The groups that the request is about, with all their open letters.
    pub groups: Vec<GroupLetters>,
    /// The letters that match. There may be fewer than asked for, or none, although there is a next
    /// page: a request reads a limited part of a topic.
    pub letters: Vec<Line>,
    /// The cursor of the next page. `null`: this is the last page.
    pub next: Option<String>,
    /// How far the reading is in the topics of the letters, in records.
    pub read: i64,
    pub of: i64,
}

#[derive(Serialize, Deserialize)]
pub(super) struct GroupLetters {
    pub group: String,
    /// The topic that the group reads.
    pub topic: String,
    pub open: usize,
}

/// Reads at most one page of one topic, so the answer takes a limited time however many letters
/// there are and however few match.
async fn list(
    State(operations): State<Operations>,
    parameters: Result<Query<Parameters>, QueryRejection>,
) -> Result<Json<Listed>, Response> {
    let Query(parameters) = parameters.map_err(|rejection| rejection.into_problem().into_response())?;
    let limit = parameters.limit.unwrap_or(PAGE_DEFAULT);
    if !(1..=PAGE_MAX).contains(&limit) {
        let detail = format!("limit: a page has 1 to {PAGE_MAX} letters");
        return Err(Refused::new(INVALID_QUERY, detail).into_response());
    }
    listed(&operations, parameters, limit).await.map(Json).map_err(Refused::into_response)
}

async fn listed(operations: &Operations, parameters: Parameters, limit: usize) -> Result<Listed, Refused> {
    let groups = operations.groups_named(parameters.group.as_deref())?;
    let (first, from) = place(&groups, parameters.cursor.as_deref())?;
    let filter = Filter {
        reason_contains: parameters.reason_contains,
        kind: parameters.kind,
        key: parameters.key,
        older_than_minutes: parameters.older_than_minutes,
        younger_than_minutes: parameters.younger_than_minutes,
    };
    let (mut reader, _permit) = operations.reader().await?;
    let mut ends = vec![];
    for group in &groups {
        ends.push(operations.until_current(&reader, group).await?);
    }
    // Groups without letters have no pages.
    let has_pages = |place: &usize| groups[*place].index.count() > 0;
    let mut letters = vec![];
    let mut next = None;
    let mut read = ends.iter().sum();
    if let Some(place) = (first..groups.len()).find(has_pages) {
        let group = &groups[place];
        let range = (if place == first { from } else { 0 }, ends[place]);
        let topic = group.letters.topic();
        let read_page = || page(&mut reader, (group.name, topic), &group.index, range, &filter, limit);
        let page = block_in_place(read_page).map_err(|error| Refused::unreadable(&error))?;
        letters = page.lines;
        if page.next < range.1 {
            next = Some(format!("{}:{}", group.name, page.next));
        } else if let Some(following) = (place + 1..groups.len()).find(has_pages) {
            next = Some(format!("{}:0", groups[following].name));
        }
        if next.is_some() {
            read = ends[..place].iter().sum::<i64>() + page.next;
        }
    }
    let of = ends.iter().sum();
    let groups = groups.iter().map(|group| GroupLetters {
        group: group.name.to_owned(),
        topic: group.records_topic.clone(),
        open: group.index.count(),
    });
    Ok(Listed { groups: groups.collect(), letters, next, read, of })
}

/// The group and the offset at which a page begins.
fn place(groups: &[Arc<Group>], cursor: Option<&str>) -> Result<(usize, i64), Refused> {
    let Some(cursor) = cursor else { return Ok((0, 0)) };
    let parsed = cursor.rsplit_once(':').and_then(|(name, offset)| {
        let place = groups.iter().position(|group| group.name == name)?;
        let offset: i64 = offset.parse().ok()?;
        (offset >= 0).then_some((place, offset))
    });
    let invalid = "cursor: it is not `next` of an earlier page of the same request";
    parsed.ok_or_else(|| Refused::new(INVALID_QUERY, invalid))
}

/// The subcommand `dead-letters`.
#[derive(Args, Clone, Debug)]
pub struct ListDeadLetters {
    /// Only the letters of this consumer group.
    #[arg(long)]
    group: Option<String>,
    #[command(flatten)]
    filter: Filter,
    /// Print one JSON object per line instead of a table. docs/operations.md describes the fields.
    #[arg(long)]
    json: bool,
    /// Print at most about this many letters, whole pages of up to 100, and then how to continue.
    /// Default: all.
    #[arg(long, value_name = "LETTERS", value_parser = number::<usize>(1..=10_000_000))]
    limit: Option<usize>,
    /// Continue where an earlier list ended, with the same filter.
    #[arg(long)]
    cursor: Option<String>,
}

impl ListDeadLetters {
    /// Prints page after page, so it needs little memory however many letters there are.
    #[expect(clippy::print_stdout, reason = "the output of the subcommand")]
    pub(super) async fn run(self, admin_addr: SocketAddr) -> anyhow::Result<()> {
        let mut pages = Pages::new(admin_addr, self.group.clone(), self.filter.clone(), self.cursor.clone());
        let mut counts: Vec<(String, usize)> = vec![];
        let mut parked: BTreeMap<String, usize> = BTreeMap::new();
        let mut printed = 0;
        while let Some(page) = pages.next(self.limit.map(|limit| limit.saturating_sub(printed))).await? {
            printed += page.letters.len();
            for line in page.letters.iter().filter(|line| line.parked) {
                *parked.entry(line.group.clone()).or_default() += 1;
            }
            if self.json {
                for line in &page.letters {
                    println!("{}", serde_json::to_string(line)?);
                }
            } else if !page.letters.is_empty() {
                print!("{}", table(&page.letters));
            }
            if self.filter != Filter::default() && page.next.is_some() {
                eprintln!("read {} of {} records", page.read, page.of);
            }
            counts = page.groups.into_iter().map(|group| (group.group, group.open)).collect();
            if self.limit.is_some_and(|limit| printed >= limit) {
                break;
            }
        }
        if let Some(next) = &pages.cursor {
            eprintln!("there may be more: continue with --cursor {next}");
        }
        let is_whole = self.filter == Filter::default() && self.cursor.is_none() && pages.cursor.is_none();
        if !self.json && is_whole {
            for (group, open) in counts {
                println!("{group}: {open} open, {} of them parked", parked.get(&group).unwrap_or(&0));
            }
        } else if !self.json {
            println!("{printed} letters");
        }
        Ok(())
    }
}

/// The pages of a list, from the running service.
pub(super) struct Pages {
    admin_addr: SocketAddr,
    group: Option<String>,
    filter: Filter,
    /// Where the next page begins.
    pub cursor: Option<String>,
    is_first: bool,
}

impl Pages {
    pub fn new(admin_addr: SocketAddr, group: Option<String>, filter: Filter, cursor: Option<String>) -> Self {
        Self { admin_addr, group, filter, cursor, is_first: true }
    }

    /// `None`: there are no more.
    pub async fn next(&mut self, limit: Option<usize>) -> anyhow::Result<Option<Listed>> {
        if !std::mem::take(&mut self.is_first) && self.cursor.is_none() {
            return Ok(None);
        }
        let Filter { reason_contains, kind, key, older_than_minutes, younger_than_minutes } = &self.filter;
        let parameters = query(&[
            ("group", self.group.clone()),
            ("reason_contains", reason_contains.clone()),
            ("type", kind.clone()),
            ("key", key.map(|key| key.to_string())),
            ("older_than_minutes", older_than_minutes.map(|minutes| minutes.to_string())),
            ("younger_than_minutes", younger_than_minutes.map(|minutes| minutes.to_string())),
            ("limit", limit.map(|limit| limit.clamp(1, PAGE_DEFAULT).to_string())),
            ("cursor", self.cursor.take()),
        ]);
        let page: Listed = get(self.admin_addr, &format!("/dead-letters?{parameters}")).await?;
        self.cursor.clone_from(&page.next);
        Ok(Some(page))
    }
}

fn table(lines: &[Line]) -> String {
    let mut rows = vec![["GROUP", "COORDINATES", "KEY", "TYPE", "AGE", "ATTEMPTS", "REASON"].map(str::to_owned)];
    rows.extend(lines.iter().map(|line| {
        [
            line.group.clone(),
            line.coordinates.clone(),
            line.key.map_or("-".to_owned(), |key| key.to_string()),
            line.kind.clone().unwrap_or("-".to_owned()),
            line.age_seconds.map_or("-".to_owned(), age),
            format!("{}{}", line.attempts, if line.parked { ", parked" } else { "" }),
            printable(&line.reason),
        ]
    }));
    aligned(&rows)
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
    fn the_table_is_aligned_and_shows_no_control_characters() {
        let line = |offset, parked| Line {
            group: "a.b".to_owned(),
            coordinates: format!("some.events.v1-0-{offset}"),
            topic: "some.events.v1".to_owned(),
            partition: 0,
            offset,
            key: None,
            kind: Some("user.registered".to_owned()),
            reason: "SQL\u{1b}[2J".to_owned(),
            attempts: if parked { 5 } else { 1 },
            parked,
            since: None,
            age_seconds: Some(90),
        };
        let expected = "\
GROUP  COORDINATES          KEY  TYPE             AGE    ATTEMPTS   REASON
a.b    some.events.v1-0-7   -    user.registered  1 min  1          SQL\u{fffd}[2J
a.b    some.events.v1-0-12  -    user.registered  1 min  5, parked  SQL\u{fffd}[2J
";
        assert_eq!(table(&[line(7, false), line(12, true)]), expected);
    }
}
