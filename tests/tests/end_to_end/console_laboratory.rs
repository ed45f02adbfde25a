//! The laboratory of the console, on a system that `cargo xtask up` has started. The system
//! recovers from every fault, a lost effect is reported, and no website can use the laboratory.

use std::fs;

use redis::Client;
use reqwest::{Method, StatusCode};
use testbed::paths;
use tests::System;
use tests::browser::{Browser, ENTER, TAB};
use tests::console::{Console, Page};
use tests::services::{ANALYTICS_USERS, CACHE_PROFILES, EMAIL_WELCOME};
use tests::up::Up;
use tests::{eventually, eventually_contains, eventually_eq};
use topology::{ANALYTICS, SERVICES};

use crate::local_stack::{descendants, still_running};

const PAGE: &str = "/laboratory";
const INDICATORS: usize = 5;
/// The places of the indicators on the page.
const PUBLISHED: usize = 0;
const MAILED: usize = 1;
const COUNTED: usize = 2;
const CACHED: usize = 3;
const NOT_LOST: usize = 4;

/// The laboratory as a browser without JavaScript uses it.
struct Laboratory<'a> {
    console: &'a Console,
    page_token: String,
}

impl<'a> Laboratory<'a> {
    async fn of(console: &'a Console) -> Self {
        Self { console, page_token: console.page_token(PAGE).await }
    }

    /// Presses a button.
    async fn press(&self, act: &str, target: &str) -> Page {
        self.send(&self.console.url(""), act, target, "5", &self.page_token).await
    }

    /// Presses a button, and the console does what it says.
    async fn act(&self, act: &str, target: &str) {
        let page = self.press(act, target).await;
        assert_eq!(page.status, StatusCode::SEE_OTHER, "{act} {target}: {}", page.body);
    }

    async fn send(&self, origin: &str, act: &str, target: &str, count: &str, page_token: &str) -> Page {
        let fields = [("act", act), ("target", target), ("count", count), ("page_token", page_token)];
        self.console.post("/laboratory/act", origin, &fields).await
    }

    /// Registers users, and waits until all are accepted.
    async fn burst(&self, users: u32) {
        let before = accepted(&self.console.get(PAGE).await.body);
        let page = self.send(&self.console.url(""), "burst", "", &users.to_string(), &self.page_token).await;
        assert_eq!(page.status, StatusCode::SEE_OTHER, "{}", page.body);
        eventually_eq("accepted registrations", before + users, async || accepted(&self.console.get(PAGE).await.body))
            .await;
    }

    /// Waits until an indicator has this verdict, and returns its figures.
    async fn until(&self, indicator: usize, verdict: &str) -> String {
        let verdict = format!("data-text=\"verdict:{indicator}\">{verdict}<");
        let page = self.console.until_shows(PAGE, &verdict).await;
        figures(&page, indicator)
    }

    /// Waits until the figures of an indicator contain a text.
    async fn until_figures(&self, indicator: usize, text: &str) {
        eventually_contains(&format!("indicator {indicator}"), text, async || {
            figures(&self.console.get(PAGE).await.body, indicator)
        })
        .await;
    }

    /// Waits until all indicators hold for this many registrations.
    async fn until_all_hold(&self, users: u32) {
        for indicator in 0..INDICATORS {
            self.until_figures(indicator, &format!("{users} of {users}.")).await;
            self.until(indicator, "holds").await;
        }
    }
}

/// How many registrations of the laboratory were accepted.
fn accepted(page: &str) -> u32 {
    let (_, rest) = page.split_once("data-text=\"watched\">").expect("the page says how many were accepted");
    rest.split(' ').next().and_then(|number| number.parse().ok()).unwrap_or(0)
}

fn figures(page: &str, indicator: usize) -> String {
    let (_, rest) = page.split_once(&format!("data-text=\"figures:{indicator}\">")).unwrap_or_default();
    rest.split('<').next().unwrap_or_default().to_owned()
}

/// Deletes one profile in Valkey. The cache service does not notice.
async fn lose_a_profile(up: &Up) {
    let client = Client::open(up.address("redis").as_str()).unwrap();
    let mut valkey = client.get_multiplexed_async_connection().await.unwrap();
    let keys: Vec<String> = redis::cmd("KEYS").arg("profile:*").query_async(&mut valkey).await.unwrap();
    let deleted: i64 = redis::cmd("DEL").arg(&keys[0]).query_async(&mut valkey).await.unwrap();
    assert_eq!(deleted, 1);
}

/// The secret of the control port, from the environment of the console.
fn control_token(up: &Up) -> String {
    let environments =
        descendants(up.pid()).into_iter().filter_map(|(pid, _)| fs::read(format!("/proc/{pid}/environ")).ok());
    let tokens = environments.filter_map(|environment| {
        let variables = environment.split(|byte| *byte == 0);
        variables.filter_map(|variable| variable.strip_prefix(b"CONTROL_TOKEN=")).map(<[u8]>::to_vec).next()
    });
    String::from_utf8(tokens.into_iter().next().expect("the console has a control token")).unwrap()
}

/// T107: the indicators show the reason of each fault, and all of them hold after the fault.
#[tokio::test(flavor = "multi_thread")]
async fn the_system_recovers_from_each_fault_and_nothing_outlives_the_run() {
    let up = Up::start().await;
    let console = up.console();
    let laboratory = Laboratory::of(&console).await;
    kill_the_email_service(&laboratory).await;
    stop_kafka(&laboratory).await;
    lose_answers(&laboratory).await;
    add_a_consumer(&laboratory).await;
    write_faulty_records(&laboratory).await;
    laboratory.until_all_hold(16).await;

    // An effect that is really lost.
    lose_a_profile(&up).await;
    let figures = laboratory.until(CACHED, "violated").await;
    assert!(figures.contains("15 of 16. 1 wrong: the cache does not have the user."), "{figures}");
    laboratory.until(NOT_LOST, "violated").await;
    laboratory.until(MAILED, "holds").await;

    // A frozen and a killed process, and a stopped component, at the end.
    laboratory.act("freeze", "user").await;
    console.until_shows("/", "user does not answer").await;
    laboratory.act("kill", "cache").await;
    laboratory.act("stop", "valkey").await;
    let processes = descendants(up.pid());
    assert!(processes.len() >= 5, "{processes:?}");
    assert!(up.interrupt().success());
    assert_eq!(still_running(&processes), Vec::<String>::new());
}

/// The faults that the test above leaves out: each delays effects, and loses none.
#[tokio::test(flavor = "multi_thread")]
async fn stopped_stores_a_frozen_service_and_a_failing_mail_server_lose_nothing() {
    let up = Up::start().await;
    let console = up.console();
    let laboratory = Laboratory::of(&console).await;
    laboratory.act("stop", "postgres").await;
    console.until_shows(PAGE, "data-text=\"condition:postgres\">down<").await;
    laboratory.act("start", "postgres").await;
    console.until_shows("/", "all parts work").await;
    laboratory.burst(5).await;
    laboratory.until_all_hold(5).await;

    laboratory.act("stop", "valkey").await;
    laboratory.burst(5).await;
    laboratory.until_figures(CACHED, "wait: ").await;
    laboratory.act("start", "valkey").await;
    laboratory.until_all_hold(10).await;

    laboratory.act("freeze", "analytics").await;
    laboratory.burst(5).await;
    laboratory.until_figures(COUNTED, "analytics does not answer").await;
    laboratory.act("resume", "analytics").await;
    laboratory.until_all_hold(15).await;

    for (behaviour, all) in [("slow", 20), ("refusing", 25)] {
        laboratory.act("mail", behaviour).await;
        laboratory.burst(5).await;
        laboratory.until_figures(MAILED, "wait: the mail is ").await;
        laboratory.act("mail", "normal").await;
        laboratory.until_all_hold(all).await;
    }
}

async fn kill_the_email_service(laboratory: &Laboratory<'_>) {
    laboratory.act("kill", "email").await;
    laboratory.burst(5).await;
    laboratory.console.until_shows(PAGE, "data-text=\"condition:email\">down<").await;
    laboratory.until_figures(MAILED, "email does not answer").await;
    laboratory.until(NOT_LOST, "catching up").await;
    laboratory.until(CACHED, "holds").await;
    laboratory.act("restart", "email").await;
    laboratory.until_all_hold(5).await;
}

async fn stop_kafka(laboratory: &Laboratory<'_>) {
    laboratory.act("stop", "kafka").await;
    laboratory.burst(5).await;
    laboratory.until_figures(PUBLISHED, "5 of 10").await;
    laboratory.until_figures(PUBLISHED, "the outbox of user has").await;
    laboratory.act("start", "kafka").await;
    laboratory.until_all_hold(10).await;
}

async fn lose_answers(laboratory: &Laboratory<'_>) {
    laboratory.act("mail", "losing").await;
    laboratory.burst(5).await;
    laboratory.until_all_hold(15).await;
    laboratory.until_figures(MAILED, "3 copies: 3 after a lost answer").await;
}

/// The map shows the new process, and forgets it when it is removed.
async fn add_a_consumer(laboratory: &Laboratory<'_>) {
    for (act, processes) in [("add", 2), ("remove", 1)] {
        laboratory.act(act, ANALYTICS.name).await;
        eventually(&format!("the map shows {processes} processes of analytics"), async || {
            let map = laboratory.console.get("/").await.body;
            let is_shown = map.matches("<td>analytics</td>").count() == processes;
            (is_shown && map.contains("all parts work")).then_some(())
        })
        .await;
    }
}

/// A duplicate, an old state late, and a record that no consumer can handle.
async fn write_faulty_records(laboratory: &Laboratory<'_>) {
    let console = laboratory.console;
    laboratory.act("again", "").await;
    laboratory.act("old", "").await;
    console.until_shows(PAGE, "The cache must keep version 2").await;
    for key in [format!("duplicate:{EMAIL_WELCOME}"), format!("stale:{CACHE_PROFILES}")] {
        eventually(&format!("the map counts {key}"), async || {
            let map = console.get("/").await.body;
            let (_, count) = map.split_once(&format!("data-text=\"{key}\" data-state=\"{key}\">"))?;
            count.starts_with(['1', '2', '3', '4', '5', '6', '7', '8', '9']).then_some(())
        })
        .await;
    }
    laboratory.act("malformed", "").await;
    for group in [EMAIL_WELCOME, ANALYTICS_USERS] {
        console.until_shows(&format!("/dead-letters?group={group}"), "aria-label=\"Letter ").await;
    }
}

/// T108: every website that a visitor opens can send requests to a page on localhost.
#[tokio::test(flavor = "multi_thread")]
async fn a_website_and_a_form_without_the_token_break_nothing() {
    let up = Up::start().await;
    let console = &up.console();
    let laboratory = Laboratory::of(console).await;
    let (own, token) = (console.url(""), laboratory.page_token.clone());
    for (origin, token) in [("http://evil.example", &*token), ("null", &token), (&own, "guessed"), (&own, "")] {
        for (act, target) in [("kill", "email"), ("burst", ""), ("malformed", ""), ("mail", "refusing")] {
            let refused = laboratory.send(origin, act, target, "5", token).await;
            assert_eq!(refused.status, StatusCode::FORBIDDEN, "{origin} {token} {act}");
        }
    }
    let foreign = console.send(Method::GET, PAGE, Some("evil.example")).await;
    assert_eq!(foreign.status, StatusCode::MISDIRECTED_REQUEST);
    let page = console.until_shows(PAGE, "data-text=\"condition:email\">runs<").await;
    assert!(page.contains("No registration yet.") && page.contains("The mail server is normal."), "{page}");

    let errors = [("explode", "email", "5", "act:"), ("kill", "mars", "5", "target:"), ("burst", "", "201", "count:")];
    for (act, target, count, field) in errors {
        let refused = laboratory.send(&own, act, target, count, &token).await;
        assert!(refused.status == StatusCode::BAD_GATEWAY && refused.body.contains(field), "{}", refused.body);
    }

    let secret = control_token(&up);
    assert_eq!(secret.len(), 32);
    for path in [PAGE, "/", "/assets/laboratory.js", "/dead-letters"] {
        let page = console.get(path).await;
        assert!(!page.body.contains(&secret) && !format!("{:?}", page.headers).contains(&secret), "{path}");
    }
    console.until_updated("/live/laboratory", "condition:user").await;
}

/// Without the setting there is no page, no route and no entry. Without a control port the page
/// shows the commands to type.
#[tokio::test(flavor = "multi_thread")]
async fn the_laboratory_is_off_by_default_and_shows_commands_without_a_control_port() {
    let system = System::empty().await;
    let console = system.console().await;
    for (method, path) in [(Method::GET, PAGE), (Method::GET, "/live/laboratory"), (Method::POST, "/laboratory/act")] {
        assert_eq!(console.send(method, path, None).await.status, StatusCode::NOT_FOUND, "{path}");
    }
    assert!(!console.get("/").await.body.contains("laboratory"), "the map mentions the laboratory");

    let console = system.console_with(&[("LABORATORY", "true")]).await;
    let page = console.get(PAGE).await.body;
    for service in SERVICES {
        for command in ["kill", "pause", "unpause", "restart"] {
            let command = format!("<code>docker compose {command} {}</code>", service.name);
            assert!(page.contains(&command), "{command}: {page}");
        }
    }
    for component in ["kafka", "postgres", "valkey"] {
        assert!(page.contains(&format!("<code>docker compose stop {component}</code>")), "{component}");
    }
    let laboratory = Laboratory::of(&console).await;
    let refused = laboratory.press("kill", "email").await;
    assert!(refused.body.contains("CONTROL_ADDR is not set"), "{}", refused.body);
}

/// A visitor kills email on the page, and its mails arrive after the restart. The visitor discards
/// a malformed record. A lost profile is reported as a violation.
#[tokio::test(flavor = "multi_thread")]
async fn a_system_is_broken_repaired_and_pictured_in_a_browser() {
    let up = Up::start().await;
    let console = up.console();
    let Some(browser) = Browser::open(&console.url(""), 1280, 1000).await else { return };
    browser.goto("/").await;
    browser.click("main a[href='/laboratory']").await;
    browser.until_text("h1", "Laboratory").await;
    kill_and_restart_by_the_page(&browser).await;

    browser.click("button[value=malformed]").await;
    let path = format!("/dead-letters?group={ANALYTICS_USERS}");
    console.until_shows(&path, "aria-label=\"Letter ").await;
    for (act, answer) in [("show", "this is not JSON"), ("redrive", "\"failed\": 1"), ("discard", ANALYTICS_USERS)] {
        browser.goto(&path).await;
        browser.click("article input[name=reason]").await;
        browser.press("written by the laboratory").await;
        browser.click(&format!("article button[value={act}]")).await;
        browser.until_text("pre", answer).await;
    }

    browser.goto(PAGE).await;
    lose_a_profile(&up).await;
    browser.until_text("[data-text='verdict:3']", "violated").await;
    browser.until_text("[data-text='verdict:4']", "violated").await;
    browser.assert_clean().await;
    browser.close().await;

    // On a telephone, in the dark.
    let Some(browser) = Browser::open(&console.url(""), 390, 800).await else { return };
    browser.prefer("prefers-color-scheme", "light").await;
    browser.goto(PAGE).await;
    let background = "getComputedStyle(document.body).backgroundColor";
    let light = browser.evaluate(background).await;
    browser.prefer("prefers-color-scheme", "dark").await;
    assert_ne!(browser.evaluate(background).await, light);
    let sideways = "document.documentElement.scrollWidth > document.documentElement.clientWidth";
    assert_eq!(browser.evaluate(sideways).await, false, "the page scrolls sideways");
    browser.assert_clean().await;
    browser.close().await;
}

async fn kill_and_restart_by_the_page(browser: &Browser) {
    let place = "document.querySelector(\"button[aria-label='Restart email']\").getBoundingClientRect().y + scrollY";
    let place_at_start = browser.evaluate(place).await;
    browser.click("button[aria-label='Kill email']").await;
    browser.until_text("[data-text='condition:email']", "down").await;
    // The live update may be faster than the answer to the form.
    browser.goto(PAGE).await;
    // With the keyboard alone.
    browser.evaluate("document.querySelector('input[name=count]').select()").await;
    browser.press("20").await;
    browser.press(TAB).await;
    browser.press(ENTER).await;
    browser.until_text("#notes", "20 of 20 registrations were accepted").await;
    browser.until_text("[data-text='verdict:1']", "catching up").await;
    browser.until_text("[data-text='figures:1']", "email does not answer").await;
    browser.until_text("[data-text='figures:3']", "20 of 20.").await;
    assert_eq!(browser.evaluate(place).await, place_at_start, "a live update has moved a button");
    let picture = browser.picture().await;
    assert!(picture.starts_with(b"\x89PNG"));
    if std::env::var_os("WAYBILL_WRITE_SCREENSHOTS").is_some() {
        fs::write(paths::root().join("docs/console/laboratory.png"), picture).unwrap();
    }
    browser.click("button[aria-label='Restart email']").await;
    browser.until_text("[data-text='condition:email']", "runs").await;
    for indicator in 0..INDICATORS {
        browser.until_text(&format!("[data-text='figures:{indicator}']"), "20 of 20.").await;
        browser.until_text(&format!("[data-text='verdict:{indicator}']"), "holds").await;
    }
}
