//! Dead letters: what consumers could not handle, what operators can do about it, and what they did.

use askama::Template;
use axum::extract::{Form, Query, State};
use axum::http::{HeaderMap, StatusCode};
use axum::response::Response;
use serde::Deserialize;
use serde_json::Value;
use topology::{Group, SERVICES, Service};

use super::answers::{failure, html};
use super::app::App;
use super::text::duration;
use crate::safety;
use crate::system::{Act, Acted, Letter, Order};

/// Letters of a page.
const LETTERS: &str = "50";
/// Actions of the list.
const ACTIONS: usize = 50;

/// Which letters are shown.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default)]
pub struct Filter {
    group: String,
    reason: String,
    cursor: String,
}

#[derive(Template)]
#[template(path = "letters.html")]
struct Page<'a> {
    path: &'static str,
    filter: &'a Filter,
    groups: Vec<&'static str>,
    letters: Vec<Letter>,
    next: Option<String>,
    actions: Vec<Acted>,
    /// Groups whose letters could not be listed, and why.
    failures: Vec<String>,
    page_token: &'a str,
}

impl Page<'_> {
    fn age(&self, seconds: &Option<i64>) -> String {
        seconds.map_or("–".to_owned(), |seconds| duration(seconds as f64))
    }

    fn link(&self, cursor: &str) -> String {
        let query = [("group", &*self.filter.group), ("reason", &self.filter.reason), ("cursor", cursor)];
        format!("/dead-letters?{}", serde_urlencoded::to_string(query).unwrap_or_default())
    }
}

pub async fn page(State(app): State<App>, Query(filter): Query<Filter>) -> Response {
    let mut page = Page {
        path: "/dead-letters",
        filter: &filter,
        groups: groups().map(|(_, group)| group.name).collect(),
        letters: vec![],
        next: None,
        actions: vec![],
        failures: vec![],
        page_token: &app.page_token,
    };
    for (service, group) in groups().filter(|(_, group)| filter.group.is_empty() || group.name == filter.group) {
        let query = [
            ("group", group.name),
            ("reason_contains", &filter.reason),
            ("cursor", &filter.cursor),
            ("limit", LETTERS),
        ];
        let listed = match app.address(service) {
            Some(address) => app.operations.letters(address, &query).await,
            None => Err(anyhow::anyhow!("{} does not answer", service.name)),
        };
        match listed {
            Ok(listed) => {
                page.letters.extend(listed.letters);
                // A cursor belongs to one group.
                page.next = listed.next.filter(|_| !filter.group.is_empty());
            }
            Err(error) => page.failures.push(format!("{}: {error:#}", group.name)),
        }
    }
    if let Some(address) =
        SERVICES.into_iter().filter(Service::accepts_actions).find_map(|service| app.address(service))
    {
        match app.operations.actions(address, ACTIONS).await {
            Ok(actions) => page.actions = actions,
            Err(error) => page.failures.push(format!("the list of actions: {error:#}")),
        }
    }
    html(&page)
}

fn groups() -> impl Iterator<Item = (Service, &'static Group)> {
    SERVICES.into_iter().flat_map(|service| service.groups.iter().map(move |group| (service, group)))
}

/// The form of an action.
#[derive(Deserialize)]
pub struct Wanted {
    act: Act,
    group: String,
    coordinates: String,
    reason: String,
    #[serde(default)]
    operator_token: String,
    #[serde(default)]
    page_token: String,
}

#[derive(Template)]
#[template(path = "acted.html")]
struct Result<'a> {
    path: &'static str,
    title: &'a str,
    coordinates: &'a str,
    group: &'a str,
    answer: String,
}

pub async fn act(State(app): State<App>, headers: HeaderMap, Form(wanted): Form<Wanted>) -> Response {
    if !safety::may_change(&headers, &wanted.page_token, &app.page_token) {
        return failure(
            StatusCode::FORBIDDEN,
            "This request did not come from a page of this console. Load the page again.",
        );
    }
    let Some((service, group)) = groups().find(|(_, group)| group.name == wanted.group) else {
        return failure(StatusCode::BAD_REQUEST, "No service has this consumer group.");
    };
    let Some(address) = app.address(service) else {
        let text = format!("{} does not answer. Nothing was done.", service.name);
        return failure(StatusCode::BAD_GATEWAY, &text);
    };
    let given = wanted.operator_token.trim();
    let token = if given.is_empty() { app.admin_token.as_ref().map_or("", |token| token.expose()) } else { given };
    let Wanted { act, coordinates, reason, .. } = &wanted;
    let order = Order { act: *act, group: group.name, coordinates, reason, token };
    match app.operations.act(address, &order).await {
        Ok(answer) => {
            let title = match act {
                Act::Show => "The record of the letter",
                Act::Redrive => "The redrive of the letter has ended",
                Act::Discard => "The letter was discarded",
            };
            html(&Result { path: "/dead-letters", title, coordinates, group: group.name, answer: indented(&answer) })
        }
        Err(error) => {
            tracing::warn!(coordinates, group = group.name, error = %format!("{error:#}"), "an action was refused or failed");
            failure(StatusCode::BAD_GATEWAY, &format!("{error:#}."))
        }
    }
}

/// Each line of JSON, indented.
fn indented(answer: &str) -> String {
    let lines = answer.lines().map(|line| {
        let json = serde_json::from_str::<Value>(line).ok();
        json.and_then(|json| serde_json::to_string_pretty(&json).ok()).unwrap_or_else(|| line.to_owned())
    });
    lines.collect::<Vec<_>>().join("\n")
}
