//! The pages. The server renders everything, so without JavaScript the lists are complete and only
//! the live updates are missing. What a page shows live is the same text: the scripts put it into
//! the elements that the server has drawn.

mod diagram;
mod events;
mod letters;
mod map;
mod text;

use std::net::SocketAddr;
use std::sync::Arc;

use askama::Template;
use axum::http::{StatusCode, header};
use axum::response::{Html, IntoResponse, Response};
use axum::{Router, routing};
use shared::platform::secret::Secret;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;
use topology::Service;

use crate::config::AdminToken;
use crate::kafka::{Reader, Recent};
use crate::system::{Operations, Survey};

pub use map::{View, draw};

/// What the pages read.
#[derive(Clone)]
pub struct App {
    pub views: watch::Receiver<Arc<View>>,
    pub surveys: watch::Receiver<Arc<Survey>>,
    pub recent: Recent,
    pub reader: Reader,
    pub operations: Operations,
    /// The setting ADMIN_TOKEN.
    pub admin_token: Option<Secret<AdminToken>>,
    /// A form that changes something contains it. Only pages of this process know it.
    pub page_token: Arc<str>,
    /// Ends the live updates: otherwise open pages would delay the end of the process.
    pub stop: CancellationToken,
}

impl App {
    /// The admin port of a process of this service that answers.
    fn address(&self, service: Service) -> Option<SocketAddr> {
        let survey = self.surveys.borrow();
        let of_service = survey.processes.iter().filter(|process| process.service == service.name);
        of_service.filter(|process| process.answer.is_some()).map(|process| process.address).next()
    }
}

pub fn routes(app: App) -> Router {
    Router::new()
        .route("/", routing::get(map::page))
        .route("/live/map", routing::get(map::live))
        .route("/events", routing::get(events::page))
        .route("/live/events", routing::get(events::live))
        .route("/events/{topic}/{partition}/{offset}", routing::get(events::record))
        .route("/dead-letters", routing::get(letters::page))
        .route("/dead-letters/act", routing::post(letters::act))
        .route("/assets/look.css", asset("text/css", include_str!("../../assets/look.css")))
        .route("/assets/icon.svg", asset("image/svg+xml", include_str!("../../assets/icon.svg")))
        .route("/assets/map.js", asset("text/javascript", include_str!("../../assets/map.js")))
        .route("/assets/events.js", asset("text/javascript", include_str!("../../assets/events.js")))
        .fallback(async || failure(StatusCode::NOT_FOUND, "The console has no such page."))
        .with_state(app)
}

fn asset(kind: &'static str, text: &'static str) -> routing::MethodRouter<App> {
    routing::get(async move || ([(header::CONTENT_TYPE, kind)], text))
}

fn html(page: &impl Template) -> Response {
    match page.render() {
        Ok(text) => Html(text).into_response(),
        Err(error) => {
            tracing::error!(%error, "bug: a page cannot be rendered");
            StatusCode::INTERNAL_SERVER_ERROR.into_response()
        }
    }
}

#[derive(Template)]
#[template(path = "failure.html")]
struct Failure<'a> {
    path: &'static str,
    text: &'a str,
}

fn failure(status: StatusCode, text: &str) -> Response {
    (status, html(&Failure { path: "", text })).into_response()
}
