//! One record in full. The value of a state has personal data: the console leaves it out. A service
//! shows it to an operator, and records who has seen it.

use askama::Template;
use axum::extract::{Form, Path, State};
use axum::http::{HeaderMap, StatusCode};
use axum::response::Response;
use serde::Deserialize;
use shared::messaging::Coordinates;
use topology::{SERVICES, Service};

use super::answers::{Acted, NOT_FROM_A_PAGE, failure, html, indented};
use super::app::App;
use super::text::clock;
use crate::kafka::{Content, Found};
use crate::safety;
use crate::system::Look;

#[derive(Template)]
#[template(path = "record.html")]
struct Page<'a> {
    path: &'static str,
    laboratory: bool,
    coordinates: Coordinates,
    time: String,
    content: Content,
    page_token: &'a str,
    operator: Option<String>,
}

pub async fn page(
    State(app): State<App>,
    headers: HeaderMap,
    Path((topic, partition, offset)): Path<(String, i32, i64)>,
) -> Response {
    let coordinates = Coordinates { topic, partition, offset };
    match app.reader.read(coordinates.clone()).await {
        Ok(Found::Record(content)) => {
            let time = content.time.and_then(clock).unwrap_or_default();
            let operator = app.operator(&headers);
            let laboratory = app.laboratory.is_some();
            html(&Page {
                path: "/events",
                laboratory,
                coordinates,
                time,
                content,
                page_token: &app.page_token,
                operator,
            })
        }
        Ok(Found::Nothing) => {
            let text = "Kafka has no record here. Compaction or retention has deleted it, or the offset belongs to a \
                        transaction marker.";
            failure(StatusCode::NOT_FOUND, text)
        }
        Err(error) => {
            tracing::warn!(%coordinates, error = %format!("{error:#}"), "cannot read a record");
            failure(StatusCode::BAD_GATEWAY, &format!("The record cannot be read: {error:#}."))
        }
    }
}

/// The form of an operator who wants to see the value.
#[derive(Deserialize)]
pub struct Wanted {
    coordinates: String,
    reason: String,
    #[serde(default)]
    page_token: String,
}

pub async fn show(State(app): State<App>, headers: HeaderMap, Form(wanted): Form<Wanted>) -> Response {
    if !safety::may_change(&headers, &wanted.page_token, &app.page_token) {
        return failure(StatusCode::FORBIDDEN, NOT_FROM_A_PAGE);
    }
    let Ok(record) = wanted.coordinates.parse::<Coordinates>() else {
        return failure(StatusCode::BAD_REQUEST, "Give the coordinates as topic-partition-offset: user.state.v1-0-17.");
    };
    let readers = SERVICES.into_iter().filter(|service| reads(service, &record.topic));
    let Some((service, address)) = readers.filter_map(|service| Some((service, app.address(service)?))).next() else {
        let text = format!("No service that reads {} answers. Start one and try again.", record.topic);
        return failure(StatusCode::BAD_GATEWAY, &text);
    };
    let coordinates = app.reader.name_on_broker(&record);
    let token = &app.token(&headers);
    let look = Look { coordinates: &coordinates, reason: &wanted.reason, token };
    match app.operations.show_record(address, &look).await {
        Ok(answer) => {
            let title = "The record with its value";
            let answer = indented(&answer);
            let laboratory = app.laboratory.is_some();
            html(&Acted { path: "/events", laboratory, title, coordinates: &coordinates, by: service.name, answer })
        }
        Err(error) => {
            tracing::warn!(coordinates, service = service.name, error = %format!("{error:#}"), "a record was not shown");
            failure(StatusCode::BAD_GATEWAY, &format!("{error:#}."))
        }
    }
}

fn reads(service: &Service, topic: &str) -> bool {
    service.groups.iter().any(|group| group.topic == topic)
}
