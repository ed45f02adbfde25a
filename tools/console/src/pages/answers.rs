//! Pages as answers.

use askama::Template;
use axum::http::{StatusCode, header};
use axum::response::{Html, IntoResponse, Response};
use axum::routing::{self, MethodRouter};
use serde_json::Value;

use super::app::App;

pub fn html(page: &impl Template) -> Response {
    match page.render() {
        Ok(text) => Html(text).into_response(),
        Err(error) => {
            tracing::error!(%error, "bug: a page cannot be rendered");
            StatusCode::INTERNAL_SERVER_ERROR.into_response()
        }
    }
}

/// A request that changes something came from elsewhere, or from a page of an earlier process.
pub const NOT_FROM_A_PAGE: &str = "This request did not come from a page of this console. Load the page again.";

/// What a service answered to an operator.
#[derive(Template)]
#[template(path = "acted.html")]
pub struct Acted<'a> {
    /// The entry of the navigation that is marked, and the page to return to.
    pub path: &'static str,
    pub laboratory: bool,
    pub title: &'a str,
    pub coordinates: &'a str,
    /// The group or the service.
    pub by: &'a str,
    pub answer: String,
}

/// Each line of JSON, indented.
pub fn indented(answer: &str) -> String {
    let lines = answer.lines().map(|line| {
        let json = serde_json::from_str::<Value>(line).ok();
        json.and_then(|json| serde_json::to_string_pretty(&json).ok()).unwrap_or_else(|| line.to_owned())
    });
    lines.collect::<Vec<_>>().join("\n")
}

/// A file of a page.
pub fn asset(kind: &'static str, text: &'static str) -> MethodRouter<App> {
    routing::get(async move || ([(header::CONTENT_TYPE, kind)], text))
}

#[derive(Template)]
#[template(path = "failure.html")]
struct Failure<'a> {
    path: &'static str,
    laboratory: bool,
    text: &'a str,
}

pub fn failure(status: StatusCode, text: &str) -> Response {
    (status, html(&Failure { path: "", laboratory: false, text })).into_response()
}
