//! The login of operators.

use askama::Template;
use axum::extract::{Form, State};
use axum::http::{HeaderMap, StatusCode, header};
use axum::response::{IntoResponse, Redirect, Response};
use secrecy::SecretString;
use serde::Deserialize;
use topology::{SERVICES, Service};

use super::answers::{NOT_FROM_A_PAGE, failure, html};
use super::app::App;
use crate::safety;

#[derive(Template)]
#[template(path = "login.html")]
struct Page<'a> {
    path: &'static str,
    laboratory: bool,
    operator: Option<String>,
    page_token: &'a str,
}

pub async fn page(State(app): State<App>, headers: HeaderMap) -> Response {
    let laboratory = app.laboratory.is_some();
    html(&Page { path: "/login", laboratory, operator: app.operator(&headers), page_token: &app.page_token })
}

#[derive(Deserialize)]
pub struct Login {
    operator_token: String,
    #[serde(default)]
    page_token: String,
}

/// Asks a service for the name of the token. The token is checked again with every action.
pub async fn begin(State(app): State<App>, headers: HeaderMap, Form(login): Form<Login>) -> Response {
    if !safety::may_change(&headers, &login.page_token, &app.page_token) {
        return failure(StatusCode::FORBIDDEN, NOT_FROM_A_PAGE);
    }
    let mut acting = SERVICES.into_iter().filter(Service::accepts_actions);
    let Some(address) = acting.find_map(|service| app.address(service)) else {
        return failure(
            StatusCode::BAD_GATEWAY,
            "No service that checks tokens answers. Start email, analytics or cache, and log in again.",
        );
    };
    let token = login.operator_token.trim();
    match app.operations.operator(address, token).await {
        Ok(operator) => {
            tracing::info!(operator, "an operator has logged in");
            let cookie = app.sessions.begin(operator, SecretString::from(token));
            ([(header::SET_COOKIE, cookie)], Redirect::to("/login")).into_response()
        }
        Err(error) => failure(StatusCode::BAD_GATEWAY, &format!("{error:#}.")),
    }
}

#[derive(Deserialize)]
pub struct Logout {
    #[serde(default)]
    page_token: String,
}

pub async fn end(State(app): State<App>, headers: HeaderMap, Form(logout): Form<Logout>) -> Response {
    if !safety::may_change(&headers, &logout.page_token, &app.page_token) {
        return failure(StatusCode::FORBIDDEN, NOT_FROM_A_PAGE);
    }
    let cookie = app.sessions.end(&headers);
    ([(header::SET_COOKIE, cookie)], Redirect::to("/login")).into_response()
}
