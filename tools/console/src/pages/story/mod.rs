//! One user's story: what each request about the user caused, from the request to the last effect.
//! A form registers a user, and a button erases one, both through the public API of the user
//! service.

mod steps;
mod scale;
mod items;
mod assemble;
mod gone;

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::convert::Infallible;
use std::sync::Arc;
use std::time::Duration;

use askama::Template;
use axum::extract::{Form, Query, State};
use axum::http::{HeaderMap, StatusCode};
use axum::response::sse::{Event, KeepAlive, Sse};
use axum::response::{IntoResponse, Redirect, Response};
use futures::{Stream, StreamExt, stream};
use serde::Deserialize;
use shared::events::now;
use tokio::time::{Instant, sleep};
use uuid::Uuid;

use super::answers::{NOT_FROM_A_PAGE, failure, html};
use super::app::App;
use super::text::{size, whole};
use crate::kafka::{KEPT, LOOKED_BACK, Seen};
use crate::safety;
use crate::traces::{MEMORY, TraceId};
use assemble::{BARS, CHAPTERS, Chapter, Material, Pill, assemble};

/// The shortest time between two updates of a page.
const UPDATE_INTERVAL: Duration = Duration::from_millis(300);
/// The shortest time between two checks of the services.
const LOOK_INTERVAL: Duration = Duration::from_secs(2);
/// Records of a user, the newest.
const RECORDS: usize = 200;
/// Seconds. The tail has every record of a user who is younger than this, so the topics need not be
/// read.
const YOUNG: i64 = 30;

/// Whose story is shown.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default)]
pub struct Wanted {
    user: String,
    /// Whether the topics are read as well, not only what the console has seen arriving.
    older: bool,
}

#[derive(Template)]
#[template(path = "story.html")]
struct Page<'a> {
    path: &'static str,
    laboratory: bool,
    user: Option<Uuid>,
    is_erased: bool,
    older: bool,
    /// Why the topics could not be read.
    fault: Option<String>,
    chapters: Vec<Chapter>,
    gone: Vec<Pill>,
    page_token: &'a str,
    /// The key of a registration, so that the same form registers once.
    attempt: Uuid,
    suggestion: String,
    limits: Vec<String>,
}

/// The part of the page that changes.
#[derive(Template)]
#[template(path = "chapters.html")]
struct Fragment {
    chapters: Vec<Chapter>,
    gone: Vec<Pill>,
}

pub async fn page(State(app): State<App>, Query(wanted): Query<Wanted>) -> Response {
    let user = wanted.user.trim();
    let attempt = Uuid::new_v4();
    let mut page = Page {
        path: "/story",
        laboratory: app.laboratory.is_some(),
        user: None,
        is_erased: false,
        older: false,
        fault: None,
        chapters: vec![],
        gone: vec![],
        page_token: &app.page_token,
        attempt,
        suggestion: format!("visitor-{}@example.com", &attempt.simple().to_string()[..8]),
        limits: limits(&app),
    };
    if !user.is_empty() {
        let Ok(user) = Uuid::try_parse(user) else {
            return failure(StatusCode::BAD_REQUEST, "Enter the id of a user, which is a UUID.");
        };
        let mut story = Story::of(app.clone(), user);
        page.user = Some(user);
        page.older = wanted.older || story.needs_the_topics();
        if page.older {
            page.fault = story.read_the_topics().await;
        }
        story.look().await;
        page.is_erased = gone::tombstone(&story.records()).is_some();
        let Fragment { chapters, gone } = story.fragment();
        page.chapters = chapters;
        page.gone = gone;
    }
    html(&page)
}

/// What a story does not show, and what was lost.
fn limits(app: &App) -> Vec<String> {
    let kept = app.traces.kept();
    let mut limits = vec![
        format!(
            "The console searches the last {} records that it has received. If you let it read the topics, it searches \
             the last {} records of each partition.",
            whole(KEPT as i64),
            whole(LOOKED_BACK)
        ),
        format!(
            "It keeps {} of spans in memory, at most {}: now {} traces. It drops the oldest traces first. A restart of \
             the console deletes all spans.",
            size(kept.bytes),
            size(MEMORY),
            whole(kept.traces as i64)
        ),
        format!("A story has at most {CHAPTERS} requests, and each at most {BARS} steps."),
        "A round of the relay is shown only in the stories of its first 128 records.".to_owned(),
    ];
    let skipped = app.recent.skipped();
    if skipped > 0 {
        limits.push(format!("The console skipped {} records that arrived too fast.", whole(skipped as i64)));
    }
    if kept.dropped > 0 {
        limits.push(format!("The console dropped {} large or malformed spans.", whole(kept.dropped as i64)));
    }
    if let Some(lost) = app.forward.as_ref().map(crate::traces::Forward::lost).filter(|lost| *lost > 0) {
        limits.push(format!("The collector of FORWARD_OTLP did not get {} requests.", whole(lost as i64)));
    }
    limits
}

/// What is known about a user. It only grows, so a story stays complete while its page is open.
struct Story {
    app: App,
    user: Uuid,
    known: BTreeMap<(&'static str, i32, i64), Arc<Seen>>,
    in_services: Vec<Pill>,
    in_topic: Vec<Pill>,
    looked: Option<Instant>,
}

impl Story {
    fn of(app: App, user: Uuid) -> Self {
        let mut story = Self { app, user, known: BTreeMap::new(), in_services: vec![], in_topic: vec![], looked: None };
        story.follow();
        story
    }

    /// Adds the records that have arrived: those of the user, and those of other topics that belong
    /// to the same traces.
    fn follow(&mut self) {
        let user = self.user;
        self.know(self.app.recent.after(None, RECORDS, |seen| seen.key == Some(user)));
        let traces = self.traces();
        if !traces.is_empty() {
            let of_traces = |seen: &Seen| seen.trace.is_some_and(|trace| traces.contains(&trace));
            self.know(self.app.recent.after(None, RECORDS, of_traces));
        }
    }

    fn know(&mut self, records: Vec<Arc<Seen>>) {
        for seen in records {
            if self.known.len() < RECORDS {
                self.known.insert((seen.topic, seen.partition, seen.offset), seen);
            }
        }
    }

    /// Whether the console has seen nothing of the user, and the user is not new.
    fn needs_the_topics(&self) -> bool {
        let made = self.user.get_timestamp().and_then(|made| i64::try_from(made.to_unix().0).ok());
        let age = made.map(|made| now().unix_timestamp().saturating_sub(made));
        self.known.is_empty() && age.is_none_or(|age| age > YOUNG)
    }

    /// Returns why it failed, if it did.
    async fn read_the_topics(&mut self) -> Option<String> {
        match self.app.reader.of_user(self.user).await {
            Ok(found) => {
                self.know(found.into_iter().map(Arc::new).collect());
                None
            }
            Err(error) => {
                let error = format!("{error:#}");
                tracing::warn!(error, "cannot look for the records of a user");
                Some(error)
            }
        }
    }

    fn records(&self) -> Vec<Arc<Seen>> {
        self.known.values().cloned().collect()
    }

    fn traces(&self) -> BTreeSet<TraceId> {
        self.known.values().filter_map(|seen| seen.trace).collect()
    }

    /// Checks where the data of an erased user was deleted, at most once per [`LOOK_INTERVAL`].
    /// Compaction takes days, so the topic is checked only once.
    async fn look(&mut self) {
        let records = self.records();
        let is_due = self.looked.is_none_or(|looked| looked.elapsed() >= LOOK_INTERVAL);
        let Some(tombstone) = gone::tombstone(&records).filter(|_| is_due) else { return };
        self.in_services = gone::in_services(&self.app, self.user, tombstone).await;
        if self.in_topic.is_empty() {
            self.in_topic = gone::in_topic(&self.app, &records, tombstone).await;
        }
        self.looked = Some(Instant::now());
    }

    fn fragment(&self) -> Fragment {
        let spans: HashMap<_, _> =
            self.traces().into_iter().map(|trace| (trace, self.app.traces.spans(&trace))).collect();
        let chapters = assemble(Material {
            records: self.records(),
            spans,
            offsets: &self.app.offsets.borrow().clone(),
            prefix: &self.app.prefix,
            source: self.app.source.as_deref(),
            now: u64::try_from(now().unix_timestamp_nanos()).unwrap_or_default(),
        });
        let gone = self.in_services.iter().chain(&self.in_topic).cloned().collect();
        Fragment { chapters, gone }
    }
}

/// Sends the story whenever it has changed.
pub async fn live(State(app): State<App>, Query(wanted): Query<Wanted>) -> Response {
    let Ok(user) = Uuid::try_parse(wanted.user.trim()) else {
        return failure(StatusCode::BAD_REQUEST, "Enter the id of a user, which is a UUID.");
    };
    let stop = app.stop.clone();
    let mut story = Story::of(app, user);
    if wanted.older {
        let _ = story.read_the_topics().await; // the page says why it failed
    }
    Sse::new(updates(story).take_until(stop.cancelled_owned())).keep_alive(KeepAlive::default()).into_response()
}

fn updates(story: Story) -> impl Stream<Item = Result<Event, Infallible>> {
    let updates = stream::unfold((story, String::new()), async |(mut story, shown)| {
        loop {
            sleep(UPDATE_INTERVAL).await;
            story.follow();
            story.look().await;
            let text = story.fragment().render().unwrap_or_default();
            if text != shown {
                // As JSON, because a span may contain line ends.
                let event = Event::default().json_data(&text).unwrap_or_default();
                return Some((event, (story, text)));
            }
        }
    });
    updates.map(Ok)
}

/// The form of a registration.
#[derive(Deserialize)]
pub struct Registration {
    email: String,
    display_name: String,
    attempt: Uuid,
    #[serde(default)]
    access_token: String,
    #[serde(default)]
    page_token: String,
}

/// Nothing of the form is kept. Sent twice, it registers once: the key of the request is in the
/// form.
pub async fn register(State(app): State<App>, headers: HeaderMap, Form(form): Form<Registration>) -> Response {
    if !safety::may_change(&headers, &form.page_token, &app.page_token) {
        return failure(StatusCode::FORBIDDEN, NOT_FROM_A_PAGE);
    }
    let Registration { email, display_name, attempt, access_token, .. } = &form;
    match app.users.register(email, display_name, *attempt, access_token.trim()).await {
        Ok(user) => Redirect::to(&format!("/story?user={user}")).into_response(),
        Err(error) => refused("the registration", &error),
    }
}

/// The form of an erasure.
#[derive(Deserialize)]
pub struct Erasure {
    user: Uuid,
    #[serde(default)]
    access_token: String,
    #[serde(default)]
    page_token: String,
}

pub async fn erase(State(app): State<App>, headers: HeaderMap, Form(form): Form<Erasure>) -> Response {
    if !safety::may_change(&headers, &form.page_token, &app.page_token) {
        return failure(StatusCode::FORBIDDEN, NOT_FROM_A_PAGE);
    }
    match app.users.erase(form.user, form.access_token.trim()).await {
        Ok(()) => Redirect::to(&format!("/story?user={}", form.user)).into_response(),
        Err(error) => refused("the erasure", &error),
    }
}

fn refused(what: &str, error: &anyhow::Error) -> Response {
    tracing::warn!(error = %format!("{error:#}"), "{what} was refused or failed");
    failure(StatusCode::BAD_GATEWAY, &format!("{error:#}."))
}
