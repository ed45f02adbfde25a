//! The Laboratory: buttons that break parts of the system, and indicators that say whether its
//! promises hold meanwhile.

use std::collections::BTreeMap;
use std::convert::Infallible;

use askama::Template;
use axum::extract::{Form, State};
use axum::http::{HeaderMap, StatusCode};
use axum::response::sse::{Event, KeepAlive, Sse};
use axum::response::{IntoResponse, Redirect, Response};
use axum::{Router, routing};
use futures::{Stream, StreamExt, stream};
use serde::Serialize;
use topology::SERVICES;

use super::answers::{NOT_FROM_A_PAGE, asset, failure, html};
use super::app::App;
use crate::laboratory::{self, BURST_MAX, Condition, Findings, Indicator, Laboratory, Note, Verdict, Wanted};
use crate::safety;

pub fn routes() -> Router<App> {
    Router::new()
        .route("/laboratory", routing::get(page))
        .route("/laboratory/act", routing::post(act))
        .route("/live/laboratory", routing::get(live))
        .route("/assets/laboratory.js", asset("text/javascript", include_str!("../../assets/laboratory.js")))
}

/// A button, or under Docker Compose a command.
struct Act {
    act: &'static str,
    label: &'static str,
    /// Empty: there is a button.
    command: String,
}

/// A part of the system that can be broken.
struct Part {
    name: &'static str,
    /// What to expect when it is broken.
    expect: &'static str,
    acts: Vec<Act>,
}

const OF_SERVICES: [(&str, &str); 6] = [
    ("kill", "Kill"),
    ("freeze", "Freeze"),
    ("resume", "Resume"),
    ("restart", "Restart"),
    ("add", "Add"),
    ("remove", "Remove"),
];
const OF_COMPONENTS: [(&str, &str); 2] = [("stop", "Stop"), ("start", "Start")];
/// The components, by their name in the compose file, with what to expect.
const COMPONENTS: [(&str, &str); 3] = [
    (
        "kafka",
        "Registrations are still accepted. Their events wait in the outbox, and nothing is consumed. All of it arrives \
         after the start.",
    ),
    (
        "postgres",
        "Registrations are answered with 503, so they are not accepted. Consumers retry their records. The cache still \
         answers.",
    ),
    (
        "valkey",
        "Profiles cannot be read, and the cache service waits. Valkey is empty after the start, so the cache service reads \
         the topic from its beginning.",
    ),
];

#[derive(Template)]
#[template(path = "laboratory.html")]
struct Page<'a> {
    path: &'static str,
    laboratory: bool,
    page_token: &'a str,
    view: &'a View,
    indicators: Vec<(usize, &'a Indicator)>,
    services: Vec<Part>,
    components: Vec<Part>,
    has_control: bool,
    has_mailpit: bool,
    mail_modes: &'static [(&'static str, &'static str, &'static str)],
    malformed: &'static str,
    burst_max: u32,
}

/// Everything on the page that changes. Keys name the elements.
#[derive(Default, Serialize)]
struct View {
    texts: BTreeMap<String, String>,
    states: BTreeMap<String, &'static str>,
    notes: Vec<Note>,
}

impl View {
    fn text(&self, key: &str) -> &str {
        self.texts.get(key).map_or("–", String::as_str)
    }

    fn state(&self, key: &str) -> &'static str {
        self.states.get(key).copied().unwrap_or_default()
    }

    fn of(laboratory: &Laboratory, findings: &Findings) -> Self {
        let mut view = Self { notes: laboratory.notes(), ..Self::default() };
        for (number, indicator) in findings.indicators.iter().enumerate() {
            let state = match indicator.verdict {
                Verdict::Unknown => "",
                Verdict::Holds => "good",
                Verdict::CatchingUp => "wait",
                Verdict::Violated => "bad",
            };
            view.states.insert(format!("indicator:{number}"), state);
            view.texts.insert(format!("verdict:{number}"), indicator.verdict.text().to_owned());
            view.texts.insert(format!("figures:{number}"), indicator.text.clone());
        }
        view.texts.insert("watched".to_owned(), watched(findings));
        for service in SERVICES {
            view.set_condition(service.name, "");
        }
        if let Some(state) = laboratory.state() {
            for service in SERVICES {
                let conditions = state.processes.iter().filter(|process| process.service == service.name);
                let conditions: Vec<(&str, Condition)> =
                    conditions.map(|process| (process.name.as_str(), process.condition)).collect();
                view.set_conditions(service.name, &conditions);
            }
            for component in &state.components {
                view.set_conditions(&component.name, &[(&component.name, component.condition)]);
            }
            view.texts.insert("mail".to_owned(), format!("The mail server is {}.", state.mail));
        }
        view
    }

    fn set_condition(&mut self, name: &str, state: &'static str) {
        self.states.insert(format!("part:{name}"), state);
    }

    /// The condition of a single process needs no name.
    fn set_conditions(&mut self, part: &str, conditions: &[(&str, Condition)]) {
        let text = |condition: Condition| match condition {
            Condition::Runs => "runs",
            Condition::Frozen => "frozen",
            Condition::Down => "down",
        };
        let all = match conditions {
            [(_, condition)] => text(*condition).to_owned(),
            several => several
                .iter()
                .map(|(name, condition)| format!("{name} {}", text(*condition)))
                .collect::<Vec<_>>()
                .join(", "),
        };
        let is_hurt = conditions.iter().any(|(_, condition)| *condition != Condition::Runs);
        self.set_condition(part, if is_hurt { "bad" } else { "good" });
        self.texts.insert(format!("condition:{part}"), all);
    }
}

fn watched(findings: &Findings) -> String {
    let Findings { watched, accepted, refused, .. } = findings;
    let refused =
        if *refused == 0 { String::new() } else { format!(" {refused} more were not accepted and are not judged.") };
    match accepted {
        0 => format!("No registration yet.{refused}"),
        _ if *watched as u64 == *accepted => format!("{accepted} registrations were accepted.{refused}"),
        _ => format!("{accepted} registrations were accepted, of which the newest {watched} are watched.{refused}"),
    }
}

/// What the mail server can do: the target of the act, the label, and what to expect.
const MAIL: [(&str, &str, &str); 4] = [
    ("normal", "Normal", ""),
    ("slow", "Slow", "The server accepts each mail 5 s late. Mails wait in the email service."),
    (
        "refusing",
        "Refusing",
        "The email service keeps the mails and retries them. After some refusals it pauses and sends only probes.",
    ),
    (
        "losing",
        "Losing three answers",
        "The mail server accepts three mails and resets the connection before it answers. The email service cannot know that, \
         and sends these mails again: three copies, with the same Message-ID.",
    ),
];
/// What Mailpit can do.
const MAIL_OF_MAILPIT: [(&str, &str, &str); 2] = [MAIL[0], MAIL[2]];

fn expect(service: &str) -> &'static str {
    match service {
        "user" => {
            "Registrations are not accepted. Events in its outbox wait there. The other services continue to work with \
             the data that they have."
        }
        "email" => "Mails wait: the lag of its groups grows. Nothing is lost. Look at the map.",
        "analytics" => "The counts do not grow, but the lag of its groups does. Other services are not affected.",
        "cache" => "Profiles cannot be read. Registrations and mails continue.",
        _ => "Its records wait, and the lag of its groups grows.",
    }
}

fn services(has_control: bool) -> Vec<Part> {
    let acts = |name: &str| acts(&OF_SERVICES, laboratory::of_service(name), has_control);
    SERVICES.map(|service| Part { name: service.name, expect: expect(service.name), acts: acts(service.name) }).into()
}

fn components(has_control: bool) -> Vec<Part> {
    let acts = |name: &str| acts(&OF_COMPONENTS, laboratory::of_component(name), has_control);
    COMPONENTS.map(|(name, expect)| Part { name, expect, acts: acts(name) }).into()
}

fn acts(labels: &[(&'static str, &'static str)], commands: Vec<(&'static str, String)>, has_control: bool) -> Vec<Act> {
    let with_commands = labels.iter().zip(commands);
    let act = |(&(act, label), (_, command)): (&(&'static str, &'static str), (&str, String))| Act {
        act,
        label,
        command: if has_control { String::new() } else { command },
    };
    with_commands.map(act).collect()
}

async fn page(State(app): State<App>) -> Response {
    let Some(laboratory) = &app.laboratory else { return StatusCode::NOT_FOUND.into_response() };
    laboratory.visit();
    let findings = laboratory.findings.borrow().clone();
    let has_control = laboratory.has_control();
    html(&Page {
        path: "/laboratory",
        laboratory: true,
        page_token: &app.page_token,
        view: &View::of(laboratory, &findings),
        indicators: findings.indicators.iter().enumerate().collect(),
        services: services(has_control),
        components: components(has_control),
        has_control,
        has_mailpit: laboratory.has_mailpit(),
        mail_modes: if has_control { &MAIL } else { &MAIL_OF_MAILPIT },
        malformed: laboratory::MALFORMED,
        burst_max: BURST_MAX,
    })
}

/// Does what a button says. The browser then loads the page again, so that a reload of it repeats
/// nothing.
async fn act(State(app): State<App>, headers: HeaderMap, Form(wanted): Form<Wanted>) -> Response {
    let Some(laboratory) = &app.laboratory else { return StatusCode::NOT_FOUND.into_response() };
    if !safety::may_change(&headers, &wanted.page_token, &app.page_token) {
        return failure(StatusCode::FORBIDDEN, NOT_FROM_A_PAGE);
    }
    match laboratory.act(&wanted).await {
        Ok(_) => Redirect::to("/laboratory").into_response(),
        Err(error) => failure(StatusCode::BAD_GATEWAY, &format!("{error:#}.")),
    }
}

/// Sends what changes. An open page counts as a visit.
async fn live(State(app): State<App>) -> Response {
    let Some(laboratory) = app.laboratory.clone() else { return StatusCode::NOT_FOUND.into_response() };
    let updates = updates(laboratory).take_until(app.stop.cancelled_owned());
    Sse::new(updates).keep_alive(KeepAlive::default()).into_response()
}

fn updates(laboratory: Laboratory) -> impl Stream<Item = Result<Event, Infallible>> {
    let findings = laboratory.findings.clone();
    stream::unfold((laboratory, findings), async |(laboratory, mut findings)| {
        laboratory.visit();
        findings.changed().await.ok()?;
        let found = findings.borrow_and_update().clone();
        let event = Event::default().json_data(View::of(&laboratory, &found)).unwrap_or_default();
        Some((Ok(event), (laboratory, findings)))
    })
}
