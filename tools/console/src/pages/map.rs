//! The map: where events are now.

use std::convert::Infallible;

use askama::Template;
use axum::extract::State;
use axum::response::sse::{Event, KeepAlive, Sse};
use axum::response::{IntoResponse, Response};
use futures::{Stream, StreamExt, stream};
use topology::SERVICES;

use super::answers::html;
use super::app::App;
use super::diagram::Diagram;
use super::view::View;

#[derive(Template)]
#[template(path = "map.html")]
struct Page<'a> {
    path: &'static str,
    laboratory: bool,
    diagram: &'a Diagram,
    view: &'a View,
    groups: Vec<(&'static str, &'static str)>,
}

pub async fn page(State(app): State<App>) -> Response {
    let view = app.views.borrow().clone();
    let groups = SERVICES.iter().flat_map(|service| service.groups).map(|group| (group.name, group.topic));
    let laboratory = app.laboratory.is_some();
    html(&Page { path: "/", laboratory, diagram: &Diagram::new(), view: &view, groups: groups.collect() })
}

/// Sends the view whenever it changes, about once a second.
pub async fn live(State(app): State<App>) -> Response {
    Sse::new(updates(app)).keep_alive(KeepAlive::default()).into_response()
}

fn updates(app: App) -> impl Stream<Item = Result<Event, Infallible>> {
    let App { views, stop, .. } = app;
    let updates = stream::unfold(views, async |mut views| {
        views.changed().await.ok()?;
        let view = views.borrow_and_update().clone();
        Some((Event::default().json_data(&*view).unwrap_or_default(), views))
    });
    updates.map(Ok).take_until(stop.cancelled_owned())
}
