//! Dead letters: what consumers could not handle, what operators can do about it, and what they
//! did.

use askama::Template;
use axum::extract::{Form, Query, State};
use axum::http::{HeaderMap, StatusCode};
use axum::response::Response;
use serde::Deserialize;
use topology::{Group, SERVICES, Service};

use super::answers::{Acted, NOT_FROM_A_PAGE, failure, html, indented};
use super::app::App;
use super::text::duration;
use crate::safety;
use crate::system::{self, Act, Letter, Order};

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
    laboratory: bool,
    filter: &'a Filter,
    groups: Vec<&'static str>,
    letters: Vec<Letter>,
    next: Option<String>,
    actions: Vec<system::Acted>,
    /// Groups whose letters could not be listed, and why.
    failures: Vec<String>,
    page_token: &'a str,
    operator: Option<String>,
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

pub async fn page(State(app): State<App>, headers: HeaderMap, Query(filter): Query<Filter>) -> Response {
    let mut page = Page {
        path: "/dead-letters",
        laboratory: app.laboratory.is_some(),
        filter: &filter,
        groups: groups().map(|(_, group)| group.name).collect(),
        letters: vec![],
        next: None,
        actions: vec![],
        failures: vec![],
        page_token: &app.page_token,
        operator: app.operator(&headers),
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
    page_token: String,
}

pub async fn act(State(app): State<App>, headers: HeaderMap, Form(wanted): Form<Wanted>) -> Response {
    if !safety::may_change(&headers, &wanted.page_token, &app.page_token) {
        return failure(StatusCode::FORBIDDEN, NOT_FROM_A_PAGE);
    }
    let Some((service, group)) = groups().find(|(_, group)| group.name == wanted.group) else {
        return failure(StatusCode::BAD_REQUEST, "No service has this consumer group.");
    };
    let Some(address) = app.address(service) else {
        let text = format!("{} does not answer. Nothing was done.", service.name);
        return failure(StatusCode::BAD_GATEWAY, &text);
    };
    let token = &app.token(&headers);
    let Wanted { act, coordinates, reason, .. } = &wanted;
    let order = Order { act: *act, group: group.name, coordinates, reason, token };
    match app.operations.act(address, &order).await {
        Ok(answer) => {
            let title = match act {
                Act::Show => "The record of the letter",
                Act::Redrive => "The redrive of the letter has ended",
                Act::Discard => "The letter was discarded",
            };
            let laboratory = app.laboratory.is_some();
            let answer = indented(&answer);
            html(&Acted { path: "/dead-letters", laboratory, title, coordinates, by: group.name, answer })
        }
        Err(error) => {
            tracing::warn!(coordinates, group = group.name, error = %format!("{error:#}"), "an action was refused or failed");
            failure(StatusCode::BAD_GATEWAY, &format!("{error:#}."))
        }
    }
}
