//! The pages. The server renders everything, so without JavaScript the lists are complete and only
//! the live updates are missing. What a page shows live is the same text: the scripts put it into
//! the elements that the server has drawn.

mod answers;
mod app;
mod diagram;
mod drawing;
mod events;
mod laboratory;
mod letters;
mod login;
mod map;
mod record;
mod story;
mod text;
mod view;

use axum::http::StatusCode;
use axum::{Router, routing};

use answers::{asset, failure};
pub use app::App;
pub use drawing::draw;
pub use view::View;

pub fn routes(app: App) -> Router {
    // Without the setting there is no such page.
    let laboratory = if app.laboratory.is_some() { laboratory::routes() } else { Router::new() };
    Router::new()
        .merge(laboratory)
        .route("/", routing::get(map::page))
        .route("/live/map", routing::get(map::live))
        .route("/events", routing::get(events::page))
        .route("/live/events", routing::get(events::live))
        .route("/events/{topic}/{partition}/{offset}", routing::get(record::page))
        .route("/events/show", routing::post(record::show))
        .route("/dead-letters", routing::get(letters::page))
        .route("/dead-letters/act", routing::post(letters::act))
        .route("/login", routing::get(login::page).post(login::begin))
        .route("/logout", routing::post(login::end))
        .route("/story", routing::get(story::page))
        .route("/live/story", routing::get(story::live))
        .route("/story/register", routing::post(story::register))
        .route("/story/erase", routing::post(story::erase))
        .route("/assets/look.css", asset("text/css", include_str!("../../assets/look.css")))
        .route("/assets/icon.svg", asset("image/svg+xml", include_str!("../../assets/icon.svg")))
        .route("/assets/live.js", asset("text/javascript", include_str!("../../assets/live.js")))
        .route("/assets/map.js", asset("text/javascript", include_str!("../../assets/map.js")))
        .route("/assets/events.js", asset("text/javascript", include_str!("../../assets/events.js")))
        .route("/assets/story.js", asset("text/javascript", include_str!("../../assets/story.js")))
        .fallback(async || failure(StatusCode::NOT_FOUND, "The console has no such page."))
        .with_state(app)
}
