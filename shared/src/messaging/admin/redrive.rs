//! `POST /dead-letters/redrive`: hands letters of one group to its handler again. The answer has
//! one line of JSON each second, and a last one with the result.
//!
//! The redrive continues if the client disconnects; its outcome is then in the list of actions. If
//! the process dies, the letters that are not settled stay open, and the action has no outcome.

use std::collections::BTreeSet;
use std::convert::Infallible;
use std::net::SocketAddr;
use std::sync::Arc;

use anyhow::{Context, bail, ensure};
use axum::body::Body as AnswerBody;
use axum::extract::State;
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};
use axum::{Extension, Router, routing};
use clap::Args;
use futures::stream;
use serde::{Deserialize, Serialize};
use serde_json::json;
use tokio::sync::{oneshot, watch};
use tokio::time::{Duration, timeout};

use super::client::{Token, act_in_lines, get, printable, query};
use super::list::{Listed, Pages};
use super::operations::{Body, Group, INVALID_ACTION, LETTER_NOT_OPEN, Operations, Refused, parsed, reason};
use super::show::coordinates;
use crate::messaging::actions::Intent;
use crate::messaging::dead_letters::{Chosen, Filter, Job, Progress};
use crate::messaging::record::Coordinates;
use crate::platform::admin::Operator;
use crate::platform::problem::Kind;
use crate::platform::settings::number;

const REDRIVE_RUNNING: Kind = Kind::new("redrive-running", StatusCode::CONFLICT);

/// Letters that one request may name. Each is read from Kafka by itself, and the body of a request
/// has at most 16 KiB.
const NAMED_MAX: usize = 100;
/// Letters per second. The handler shares its database with the consumers: a consumer with a
/// backlog handles several times as many.
const RATE_DEFAULT: u32 = 500;
const RATE_MAX: u32 = 100_000;
const LINE_INTERVAL: Duration = Duration::from_secs(1);

pub(super) fn routes() -> Router<Operations> {
    Router::new().route("/dead-letters/redrive", routing::post(redrive))
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Request {
    group: String,
    /// Redrives only these letters, even if they are parked. Without it: all that match the filter
    /// and are not parked.
    coordinates: Option<Vec<String>>,
    filter: Option<Filter>,
    /// Letters per second, at most.
    rate: Option<u32>,
    reason: Option<String>,
}

/// A line of the answer.
#[derive(Debug, Serialize, Deserialize)]
struct Line {
    settled: usize,
    superseded: usize,
    failed: usize,
    parked: usize,
    /// How far the reading is in the topic of the letters, in records. Both are 0 if the request
    /// names letters.
    read: i64,
    of: i64,
    /// Whether this is the last line.
    ended: bool,
    /// Why the redrive ended early.
    error: Option<String>,
    /// Letters that the request names and that are not open.
    not_open: Vec<String>,
}

impl Line {
    fn of(progress: Progress, not_open: &[String]) -> Self {
        let Progress { settled, superseded, failed, parked, read, of } = progress;
        Self { settled, superseded, failed, parked, read, of, ended: false, error: None, not_open: not_open.to_vec() }
    }

    fn text(&self) -> String {
        format!(
            "{} settled, {} superseded, {} failed again, {} parked",
            self.settled, self.superseded, self.failed, self.parked
        )
    }
}

/// A checked request.
struct Order {
    group: Arc<Group>,
    chosen: Chosen,
    rate: u32,
    not_open: Vec<String>,
    intent: Intent,
}

async fn redrive(
    State(operations): State<Operations>,
    Extension(Operator(operator)): Extension<Operator>,
    request: Body<Request>,
) -> Result<Response, Response> {
    let request = parsed(request)?;
    let order = checked(&operations, operator, request).await.map_err(Refused::into_response)?;
    let Some(order) = order else {
        // Nothing is done, so it is no action.
        let line = Line { ended: true, ..Line::of(Progress::default(), &[]) };
        return Ok(in_lines(AnswerBody::from(json_line(&line))));
    };
    start(&operations, order).await.map_err(Refused::into_response)
}

/// `None`: there is no letter to redrive.
async fn checked(operations: &Operations, operator: String, request: Request) -> Result<Option<Order>, Refused> {
    let invalid = |detail: String| Refused::new(INVALID_ACTION, detail);
    let group = operations.groups_named(Some(&request.group))?.remove(0);
    let rate = request.rate.unwrap_or(RATE_DEFAULT);
    if !(1..=RATE_MAX).contains(&rate) {
        return Err(invalid(format!("rate: a redrive tries 1 to {RATE_MAX} letters per second")));
    }
    let reason = request.reason.map(|text| reason(&text)).transpose().map_err(invalid)?;
    let named = request.coordinates.unwrap_or_default();
    if named.len() > NAMED_MAX {
        return Err(invalid(format!("coordinates: a request names at most {NAMED_MAX} letters")));
    }
    if !named.is_empty() && request.filter.is_some() {
        return Err(invalid("filter: a request names letters or has a filter, not both".to_owned()));
    }
    let named = named.iter().map(|text| coordinates(text)).collect::<Result<BTreeSet<_>, _>>()?;
    {
        let (reader, _permit) = operations.reader().await?;
        operations.until_current(&reader, &group).await?;
    }
    let (chosen, not_open, target, detail) = if named.is_empty() {
        if group.index.count() == 0 {
            return Ok(None);
        }
        let filter = request.filter.unwrap_or_default();
        let detail = if filter == Filter::default() {
            "all letters that are not parked".to_owned()
        } else {
            format!("letters that are not parked and match {}", serde_json::to_string(&filter).unwrap_or_default())
        };
        (Chosen::Matching(filter), vec![], group.name.to_owned(), detail)
    } else {
        let (open, not_open): (Vec<Coordinates>, Vec<Coordinates>) =
            named.into_iter().partition(|record| group.index.letter_of(record).is_some());
        let Some(first) = open.first() else {
            let detail = "coordinates: none of these is an open dead letter: they were settled, or never dead-lettered";
            return Err(Refused::new(LETTER_NOT_OPEN, detail));
        };
        let target = if open.len() == 1 { first.to_string() } else { group.name.to_owned() };
        let names = open.iter().map(ToString::to_string).collect::<Vec<_>>().join(" ");
        let not_open = not_open.iter().map(ToString::to_string).collect();
        (Chosen::Named(open), not_open, target, names)
    };
    let detail = Some(format!("{detail}, {rate} per second"));
    let intent = Intent { action: "redrive", target, group: Some(group.name), operator, reason, detail };
    Ok(Some(Order { group, chosen, rate, not_open, intent }))
}

/// Records the action, and hands the order to the thread that redrives. A task waits for the result
/// and records the outcome, whether the client still listens or not.
async fn start(operations: &Operations, order: Order) -> Result<Response, Refused> {
    let Order { group, chosen, rate, not_open, intent } = order;
    let place = group.redrives.clone().try_reserve_owned().map_err(|_| {
        let detail = format!("this process already redrives letters of {}, and one more request waits", group.name);
        Refused::new(REDRIVE_RUNNING, detail)
    })?;
    let (progress, watched) = watch::channel(Progress::default());
    let (begun_sender, begun) = oneshot::channel();
    let (last_sender, last) = oneshot::channel();
    let this = operations.clone();
    let seen = watched.clone();
    let not_open_at_start = not_open.clone();
    operations.tasks().spawn(async move {
        let action = match this.begin(intent).await {
            Ok(action) => action,
            Err(refused) => {
                let _ = begun_sender.send(Err(refused));
                return;
            }
        };
        let (ended, result) = oneshot::channel();
        place.send(Job { chosen, rate, progress, ended });
        let _ = begun_sender.send(Ok(()));
        let result = result.await.unwrap_or_else(|_| Err(anyhow::anyhow!("the process stops")));
        let mut line = Line { ended: true, ..Line::of(*seen.borrow(), &not_open_at_start) };
        line.error = result.err().map(|error| format!("{error:#}"));
        let outcome = match &line.error {
            None => Ok(line.text()),
            Some(error) => Err(format!("{error}; {}", line.text())),
        };
        if let Err(refused) = this.end(action, outcome).await {
            line.error = Some(refused.detail);
        }
        let _ = last_sender.send(line);
    });
    match begun.await {
        Ok(Ok(())) => Ok(in_lines(lines(watched, last, not_open))),
        Ok(Err(refused)) => Err(refused),
        Err(_) => Err(Refused::new(REDRIVE_RUNNING, "the process stops")),
    }
}

/// One line each second until the last one.
fn lines(progress: watch::Receiver<Progress>, last: oneshot::Receiver<Line>, not_open: Vec<String>) -> AnswerBody {
    let lines = stream::unfold(Some(last), move |waiting| {
        let progress = progress.clone();
        let not_open = not_open.clone();
        async move {
            let mut last = waiting?;
            match timeout(LINE_INTERVAL, &mut last).await {
                Err(_) => {
                    let line = Line::of(*progress.borrow(), &not_open);
                    Some((Ok::<_, Infallible>(json_line(&line)), Some(last)))
                }
                Ok(line) => Some((Ok(json_line(&line.ok()?)), None)),
            }
        }
    });
    AnswerBody::from_stream(lines)
}

fn json_line(line: &Line) -> String {
    let mut text = serde_json::to_string(line).expect("numbers and texts are always valid JSON");
    text.push('\n');
    text
}

fn in_lines(body: AnswerBody) -> Response {
    ([(header::CONTENT_TYPE, "application/x-ndjson")], body).into_response()
}

/// The subcommand `redrive`.
#[derive(Args, Clone, Debug)]
pub struct Redrive {
    /// Redrive only these letters, even if they are parked. Name each as topic-partition-offset, as
    /// `dead-letters` prints it. At most 100.
    #[arg(long, value_name = "COORDINATES", num_args = 1..)]
    only: Vec<Coordinates>,
    /// Redrive only the letters of this consumer group.
    #[arg(long)]
    group: Option<String>,
    #[command(flatten)]
    filter: Filter,
    /// Letters per second, at most.
    #[arg(long, value_name = "LETTERS", default_value_t = RATE_DEFAULT, value_parser = number::<u32>(1..=RATE_MAX))]
    rate: u32,
    /// Why. It is recorded with your token's name. Name no person in it.
    #[arg(long, value_parser = reason)]
    reason: Option<String>,
    /// Print what would be tried and change nothing.
    #[arg(long)]
    dry_run: bool,
    #[command(flatten)]
    token: Token,
}

impl Redrive {
    /// Redrives one group after another.
    pub(super) async fn run(self, admin_addr: SocketAddr) -> anyhow::Result<()> {
        ensure!(self.only.len() <= NAMED_MAX, "--only takes at most {NAMED_MAX} letters");
        ensure!(self.only.is_empty() || self.filter == Filter::default(), "give --only or a filter, not both");
        let path =
            format!("/dead-letters?{}", query(&[("group", self.group.clone()), ("limit", Some("1".to_owned()))]));
        let Listed { groups, .. } = get(admin_addr, &path).await?;
        for group in groups {
            let only: Vec<&Coordinates> = self.only.iter().filter(|named| named.topic == group.topic).collect();
            if !self.only.is_empty() && only.is_empty() {
                print_result(&group.group, &Line::of(Progress::default(), &[]));
            } else if self.dry_run {
                self.print_plan(admin_addr, &group.group).await?;
            } else {
                self.redrive(admin_addr, &group.group, &only).await?;
            }
        }
        Ok(())
    }

    /// # Errors
    /// The redrive ended early. The message has its counts.
    async fn redrive(&self, admin_addr: SocketAddr, group: &str, only: &[&Coordinates]) -> anyhow::Result<()> {
        let mut body = json!({ "group": group, "rate": self.rate, "reason": self.reason });
        if only.is_empty() {
            body["filter"] = json!(self.filter);
        } else {
            body["coordinates"] = json!(only.iter().map(ToString::to_string).collect::<Vec<_>>());
        }
        let mut last = None;
        let redriven = act_in_lines(admin_addr, "/dead-letters/redrive", &self.token, &body, |text| {
            let line: Line = serde_json::from_str(text).context("the service answered in an unknown form")?;
            if line.ended {
                last = Some(line);
            } else {
                let Line { read, of, .. } = line;
                let position = if of > 0 { format!(" (read {read} of {of} records)") } else { String::new() };
                eprintln!("{group}: {}{position}", line.text());
            }
            Ok(())
        });
        if let Err(error) = redriven.await {
            let is_not_open = format!("{error:#}").contains("/problems/letter-not-open");
            if is_not_open {
                // Another group of the service may have these letters.
                only.iter().for_each(|named| print_not_open(group, &named.to_string()));
                print_result(group, &Line::of(Progress::default(), &[]));
                return Ok(());
            }
            return Err(error.context(group.to_owned()));
        }
        let Some(line) = last else {
            bail!("{group}: the process ended before the redrive. Letters that are not settled are still open")
        };
        line.not_open.iter().for_each(|named| print_not_open(group, named));
        if let Some(error) = &line.error {
            bail!("{group}: {}; {}", printable(error), line.text());
        }
        print_result(group, &line);
        Ok(())
    }

    /// Prints the letters that would be tried.
    #[expect(clippy::print_stdout, reason = "the output of the subcommand")]
    async fn print_plan(&self, admin_addr: SocketAddr, group: &str) -> anyhow::Result<()> {
        let mut pages = Pages::new(admin_addr, Some(group.to_owned()), self.filter.clone(), None);
        let mut tried = 0;
        let mut parked = 0;
        while let Some(page) = pages.next(None).await? {
            for line in page.letters {
                let is_named = self.only.iter().any(|named| named.to_string() == line.coordinates);
                if !self.only.is_empty() && !is_named {
                    continue;
                }
                if line.parked && !is_named {
                    parked += 1;
                    continue;
                }
                tried += 1;
                println!(
                    "{group}: would try {}, which failed {} times, the last time with: {}",
                    line.coordinates,
                    line.attempts,
                    printable(&line.reason)
                );
            }
        }
        println!("{group}: {tried} would be tried, {parked} parked");
        Ok(())
    }
}

fn print_not_open(group: &str, named: &str) {
    eprintln!("{group}: {named} is not an open dead letter: it was settled, or never dead-lettered");
}

#[expect(clippy::print_stdout, reason = "the output of the subcommand")]
fn print_result(group: &str, line: &Line) {
    println!("{group}: {}", line.text());
}
