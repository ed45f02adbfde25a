//! The console in a real browser.

use testbed::paths;
use tests::browser::{Browser, ENTER, TAB};
use tests::record::Draft;
use tests::services::{ANALYTICS_USERS, EMAIL_WELCOME, USER_EVENTS};
use tests::{System, eventually};
use topology::{ANALYTICS, EMAIL, USER};
use uuid::Uuid;

const MARKUP: &str = "<img src=x onerror=\"document.title='hacked'\">";

/// What a visitor sees first: everything works, an event travels, a service is killed, its lag
/// grows, and it catches up.
#[tokio::test(flavor = "multi_thread")]
async fn a_visitor_sees_an_event_travel_something_break_and_it_recover() {
    let mut system = System::start().await;
    let console = system.console().await;
    let Some(browser) = Browser::open(&console.url(""), 1280, 900).await else { return };
    browser.goto("/").await;
    browser.until_text("header [data-text=all]", "all parts work").await;
    let travelling = async {
        browser.until_text("[data-text='applied:email.welcome']", "1").await;
        browser.until_text("[data-text='applied:cache.profiles']", "1").await;
    };
    tokio::join!(travelling, system.users.register());

    system.processes.kill(EMAIL);
    browser.until_text("header [data-text=all]", "email does not answer").await;
    system.users.register_many(3).await;
    let lag = format!("td.wait[data-text='lag:{EMAIL_WELCOME}']");
    browser.until_text(&lag, "").await;
    assert_ne!(browser.text(&lag).await.as_deref(), Some("0"));

    system.processes.start(&[EMAIL]).await;
    browser.until_text("header [data-text=all]", "all parts work").await;
    browser.until_text(&format!("td[data-text='lag:{EMAIL_WELCOME}']"), "0").await;
    browser.assert_clean().await;
    browser.close().await;
}

/// New records appear at the top, a pause holds the list, a record opens with the keyboard alone,
/// and markup in a record stays text.
#[tokio::test(flavor = "multi_thread")]
async fn records_appear_live_and_open_with_the_keyboard() {
    let system = System::start_only(&[USER]).await;
    let console = system.console().await;
    let Some(browser) = Browser::open(&console.url(""), 1280, 900).await else { return };
    browser.goto("/events").await;
    let user = system.users.register().await.to_string();
    browser.until_text("#records", &user).await;

    browser.click("#pause").await;
    browser.until_text("#pause", "Resume").await;
    let later = system.users.register().await.to_string();
    console.until_shows("/events", &later).await;
    assert!(!browser.text("#records").await.unwrap().contains(&later), "the list changed while it was paused");
    browser.click("#pause").await;
    let hostile = Draft::user_event("user.registered", Uuid::now_v7(), 1).replace_header("ce_type", MARKUP.as_bytes());
    system.kafka.write(USER_EVENTS, &hostile).await;
    browser.until_text("#records tr:first-child a", MARKUP).await;

    // To the first record and into it.
    browser.evaluate("document.querySelector('#records a').focus()").await;
    browser.press(ENTER).await;
    browser.until_text("h1", USER_EVENTS).await;
    browser.until_text("table", MARKUP).await;
    assert_ne!(browser.evaluate("document.title").await, "hacked");
    browser.assert_clean().await;
    browser.close().await;
}

/// A malformed record becomes a dead letter. An operator finds it, sees the record, redrives it,
/// and discards it.
#[tokio::test(flavor = "multi_thread")]
async fn an_operator_settles_a_letter_in_the_browser() {
    let system = System::start_only(&[USER, EMAIL, ANALYTICS]).await;
    let console = system.console().await;
    let Some(browser) = Browser::open(&console.url(""), 1280, 900).await else { return };
    let fact = Draft::user_event("user.registered", Uuid::now_v7(), 1).with_value(MARKUP.as_bytes());
    let record = system.kafka.write(USER_EVENTS, &fact).await;
    system.kafka.until_dead_letters(ANALYTICS_USERS, &[record]).await;
    let coordinates = system.kafka.letter_key(ANALYTICS_USERS, record);
    console.until_shows("/dead-letters", &coordinates).await;

    let path = format!("/dead-letters?group={ANALYTICS_USERS}");
    for (act, answer) in [("show", "<img src=x onerror="), ("redrive", "\"failed\": 1"), ("discard", ANALYTICS_USERS)] {
        browser.goto(&path).await;
        browser.until_text("article h2", &coordinates).await;
        browser.click("article input[name=reason]").await;
        browser.press(&format!("the reason to {act}")).await;
        browser.click(&format!("article button[value={act}]")).await;
        browser.until_text("pre", answer).await;
        browser.until_text("h1", "letter").await;
    }
    browser.goto(&path).await;
    browser.until_text("main", "No open letter matches.").await;
    for act in ["show", "redrive", "discard"] {
        browser.until_text("table", &format!("the reason to {act}")).await;
    }
    assert_ne!(browser.evaluate("document.title").await, "hacked");
    browser.assert_clean().await;
    browser.close().await;
}

/// On a telephone, in the dark, with less motion: the page never scrolls sideways, and it follows
/// the preferences.
#[tokio::test(flavor = "multi_thread")]
async fn the_pages_fit_a_telephone_and_follow_preferences() {
    let system = System::start_only(&[USER]).await;
    let console = system.console().await;
    let Some(browser) = Browser::open(&console.url(""), 390, 800).await else { return };
    system.users.register().await;
    console.until_shows("/events", "user.registered<").await;
    let background = "getComputedStyle(document.body).backgroundColor";
    for path in ["/", "/events", "/dead-letters"] {
        browser.goto(path).await;
        assert_eq!(browser.evaluate("window.innerWidth").await, 390);
        let sideways = "document.documentElement.scrollWidth > document.documentElement.clientWidth";
        assert_eq!(browser.evaluate(sideways).await, false, "{path} scrolls sideways");
    }
    browser.prefer("prefers-color-scheme", "light").await;
    let light = browser.evaluate(background).await;
    browser.prefer("prefers-color-scheme", "dark").await;
    assert_ne!(browser.evaluate(background).await, light);

    browser.prefer("prefers-reduced-motion", "reduce").await;
    browser.goto("/").await;
    assert_eq!(browser.evaluate("document.querySelector('svg.map').animationsPaused()").await, true);
    browser.press(TAB).await;
    assert_eq!(browser.evaluate("document.activeElement.className").await, "skip", "the first stop of the Tab key");
    browser.assert_clean().await;
    browser.close().await;
}

/// The pictures of docs/console.md: events travel while the email service is down. `cargo xtask
/// screenshots` lets this test write them.
#[tokio::test(flavor = "multi_thread")]
async fn the_pages_are_pictured() {
    let mut system = System::start().await;
    let console = system.console().await;
    let Some(browser) = Browser::open(&console.url(""), 1280, 1000).await else { return };
    system.users.register_many(20).await;
    system.processes.kill(EMAIL);
    system.users.register_many(40).await;
    browser.goto("/").await;
    browser.until_text("header [data-text=all]", "email does not answer").await;
    browser.until_text(&format!("td.wait[data-text='lag:{EMAIL_WELCOME}']"), "").await;
    let map = async {
        eventually("records flow", async || {
            browser.text("[data-text='topic:user.events.v1']").await.filter(|rate| rate != "0.0 /s")
        })
        .await;
        browser.picture().await
    };
    let ((), map) = tokio::join!(async { drop(system.users.register_many(40).await) }, map);
    browser.goto("/events").await;
    browser.until_text("#records", "user.registered").await;
    let events = browser.picture().await;
    for (name, picture) in [("map", map), ("events", events)] {
        assert!(picture.starts_with(b"\x89PNG"), "{name} is no picture");
        if std::env::var_os("WAYBILL_WRITE_SCREENSHOTS").is_some() {
            std::fs::write(paths::root().join(format!("docs/console/{name}.png")), picture).unwrap();
        }
    }
    browser.close().await;
}
