//! `GET /api/messages`, `DELETE /api/messages`, `PUT /api/behaviour` (a `Behaviour`, for example
//! `{"fault": "reject", "stage": "rcpt", "code": 550, "times": 2}`), `GET /api/behaviour`.

use std::sync::Arc;

use axum::extract::State;
use axum::routing::get;
use axum::{Json, Router};

use super::{Behaviour, Kept, Mail};

pub(super) fn router(kept: Arc<Kept>) -> Router {
    Router::new()
        .route("/api/messages", get(messages).delete(clear))
        .route("/api/behaviour", get(behaviour).put(set_behaviour))
        .with_state(kept)
}

async fn messages(State(kept): State<Arc<Kept>>) -> Json<Vec<Mail>> {
    Json(kept.state().mails.clone())
}

async fn clear(State(kept): State<Arc<Kept>>) {
    kept.state().mails.clear();
}

async fn behaviour(State(kept): State<Arc<Kept>>) -> Json<Behaviour> {
    Json(kept.state().behaviour.clone())
}

async fn set_behaviour(State(kept): State<Arc<Kept>>, Json(behaviour): Json<Behaviour>) {
    kept.set(behaviour);
}
