//! The sink's HTTP API:
//!
//! - `GET /api/messages` lists the mails, `DELETE /api/messages` removes them.
//! - `GET /api/behaviour` and `PUT /api/behaviour` read and replace the `Behaviour`, for example
//!   `{"fault": "reject", "stage": "rcpt", "code": 550, "times": 2}`.

use std::sync::Arc;

use axum::extract::State;
use axum::routing::get;
use axum::{Json, Router};

use super::state::{Behaviour, Mail, Shared};

pub(super) fn router(shared: Arc<Shared>) -> Router {
    Router::new()
        .route("/api/messages", get(messages).delete(clear))
        .route("/api/behaviour", get(behaviour).put(set_behaviour))
        .with_state(shared)
}

async fn messages(State(shared): State<Arc<Shared>>) -> Json<Vec<Mail>> {
    Json(shared.state().mails.clone())
}

async fn clear(State(shared): State<Arc<Shared>>) {
    shared.state().mails.clear();
}

async fn behaviour(State(shared): State<Arc<Shared>>) -> Json<Behaviour> {
    Json(shared.state().behaviour.clone())
}

async fn set_behaviour(State(shared): State<Arc<Shared>>, Json(behaviour): Json<Behaviour>) {
    shared.set(behaviour);
}
