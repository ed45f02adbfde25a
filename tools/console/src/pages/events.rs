//! The events: the records of all topics as they arrive.

use std::convert::Infallible;
use std::sync::Arc;
use std::time::Duration;

use askama::Template;
use axum::extract::{Query, State};
use axum::response::sse::{Event, KeepAlive, Sse};
use axum::response::{IntoResponse, Response};
use futures::{Stream, StreamExt, stream};
use serde::{Deserialize, Serialize};
use tokio::time::sleep;
use uuid::Uuid;

use super::answers::html;
use super::app::App;
use super::text::{clock, size};
use crate::kafka::{Seen, topics};

/// Rows of the list.
const ROWS: usize = 100;
/// The shortest time between two updates of a page: four a second.
const UPDATE_INTERVAL: Duration = Duration::from_millis(250);
/// Records of one update. With more, the page shows the newest and says how many it leaves out.
const UPDATE_ROWS: usize = 25;

/// Which records are shown. Empty fields do not filter.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default)]
pub struct Filter {
    topic: String,
    #[serde(rename = "type")]
    kind: String,
    user: String,
}

impl Filter {
    fn passes(&self, seen: &Seen) -> bool {
        let user = self.user.trim();
        (self.topic.is_empty() || seen.topic == self.topic)
            && (self.kind.is_empty() || seen.kind.contains(self.kind.trim()))
            && (user.is_empty() || Uuid::try_parse(user).is_ok_and(|user| seen.key == Some(user)))
    }
}

/// A record in the list, as text.
#[derive(Serialize)]
struct Row {
    href: String,
    time: String,
    topic: &'static str,
    color: &'static str,
    kind: String,
    key: String,
    version: String,
    place: String,
    size: String,
}

impl From<&Seen> for Row {
    fn from(seen: &Seen) -> Self {
        let Seen { topic, partition, offset, .. } = *seen;
        Self {
            href: format!("/events/{topic}/{partition}/{offset}"),
            time: seen.time.and_then(clock).unwrap_or_default(),
            topic,
            color: super::diagram::color(topic),
            kind: if seen.kind.is_empty() { "(no type)".to_owned() } else { seen.kind.clone() },
            key: seen.key.map_or("(not an id)".to_owned(), |key| key.to_string()),
            version: seen.version.clone(),
            place: format!("{partition}@{offset}"),
            size: size(seen.size),
        }
    }
}

#[derive(Template)]
#[template(path = "events.html")]
struct Page {
    path: &'static str,
    laboratory: bool,
    filter: Filter,
    topics: Vec<&'static str>,
    rows: Vec<Row>,
}

pub async fn page(State(app): State<App>, Query(filter): Query<Filter>) -> Response {
    let rows = app.recent.after(None, ROWS, |seen| filter.passes(seen));
    let rows = rows.iter().map(|seen| Row::from(&**seen)).collect();
    html(&Page { path: "/events", laboratory: app.laboratory.is_some(), filter, topics: topics(), rows })
}

/// New records since the last update, the newest first.
#[derive(Serialize)]
struct Update {
    rows: Vec<Row>,
    /// How many arrived that the filter lets pass or not.
    arrived: u64,
    /// How many of those that pass, or were skipped by the tail, are not in `rows`.
    left_out: u64,
}

/// Sends what arrives. Many records become one update, so the rate of updates does not grow with
/// the rate of events.
pub async fn live(State(app): State<App>, Query(filter): Query<Filter>) -> Response {
    Sse::new(updates(app, filter)).keep_alive(KeepAlive::default()).into_response()
}

fn updates(app: App, filter: Filter) -> impl Stream<Item = Result<Event, Infallible>> {
    let App { recent, stop, .. } = app;
    let shown = (recent.last(), recent.skipped());
    let updates = stream::unfold((recent, filter, shown), async |(recent, filter, (mut shown, mut skipped))| {
        loop {
            sleep(UPDATE_INTERVAL).await;
            let last = recent.last();
            if last == shown {
                continue;
            }
            let new: Vec<Arc<Seen>> = recent.after(shown, usize::MAX, |seen| filter.passes(seen));
            let arrived = last.map_or(0, |last| last + 1) - shown.map_or(0, |shown| shown + 1);
            let unread = recent.skipped() - skipped;
            (shown, skipped) = (last, skipped + unread);
            let rows: Vec<Row> = new.iter().take(UPDATE_ROWS).map(|seen| Row::from(&**seen)).collect();
            let update = Update { left_out: (new.len() - rows.len()) as u64 + unread, rows, arrived };
            let event = Event::default().json_data(&update).unwrap_or_default();
            return Some((event, (recent, filter, (shown, skipped))));
        }
    });
    updates.map(Ok).take_until(stop.cancelled_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_filter_selects_by_topic_type_and_user() {
        let user = Uuid::from_u128(7);
        let seen = Seen {
            number: 0,
            topic: "user.events.v1",
            partition: 0,
            offset: 1,
            time: None,
            key: Some(user),
            kind: "user.registered".to_owned(),
            version: "1".to_owned(),
            size: 10,
            event: None,
            trace: None,
            is_tombstone: false,
        };
        let passes = |topic: &str, kind: &str, user: &str| {
            Filter { topic: topic.to_owned(), kind: kind.to_owned(), user: user.to_owned() }.passes(&seen)
        };
        assert!(passes("", "", ""));
        assert!(passes("user.events.v1", "registered", &format!(" {user} ")));
        assert!(!passes("user.state.v1", "", ""));
        assert!(!passes("", "deleted", ""));
        assert!(!passes("", "", "ada"), "a user that is not an id matches nothing");
    }
}
