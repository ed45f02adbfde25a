//! A real browser, Chromium, if it is installed with its driver. The driver speaks WebDriver, which
//! is JSON over HTTP. The client is written here, because the library for it makes `serde_json`
//! keep the order of fields: in a test run cargo would build the services with that feature too,
//! and they would write other JSON than in production.

use std::time::Duration;

use base64::Engine;
use base64::prelude::BASE64_STANDARD;
use reqwest::{Client, Method};
use serde_json::{Value, json};
use testbed::paths;
use testbed::process::{self, Logs, Process};
use testbed::testing::{free_port, prefix};

use crate::waiting::{eventually, eventually_contains};

const START_LIMIT: Duration = Duration::from_secs(30);
/// The name of the field that has the id of an element (W3C WebDriver, section 12.1).
const ELEMENT: &str = "element-6066-11e4-a52e-4f735466cecf";
/// What the Enter key and the Tab key are called in WebDriver (section 17.4.2).
pub const ENTER: &str = "\u{e007}";
pub const TAB: &str = "\u{e004}";

/// An open window. The browser ends when this is dropped: it is in the process group of its driver.
pub struct Browser {
    client: Client,
    /// The URL of the session at the driver.
    session: String,
    origin: String,
    _process: Process,
}

impl Browser {
    /// A window of this size for the pages of one origin. `None`, and a line that says so, if
    /// Chromium or its driver is not installed.
    pub async fn open(origin: &str, width: u32, height: u32) -> Option<Self> {
        let (Some(driver), Some(chromium)) = (paths::on_path(&["chromedriver"]), paths::on_path(&["chromium"])) else {
            eprintln!("skipped: there is no chromium with a chromedriver on the PATH");
            return None;
        };
        let port = free_port();
        let mut command = process::command(driver);
        command.arg(format!("--port={port}"));
        let logs = Logs::to_files(&format!("tests/browser-{}", prefix())).unwrap();
        let mut process = Process::spawn("chromedriver", command, &logs).unwrap();
        let url = format!("http://127.0.0.1:{port}");
        let client = Client::new();
        let answers = async || client.get(format!("{url}/status")).send().await.is_ok();
        process.until_ready(START_LIMIT, answers).await.unwrap();
        let mut browser = Self { client, session: url, origin: origin.to_owned(), _process: process };
        // Chromium has no sandbox for root, and /dev/shm is small in a container.
        let arguments = ["--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"];
        let wanted = json!({
            "browserName": "chrome",
            "goog:chromeOptions": { "binary": chromium, "args": arguments },
            "goog:loggingPrefs": { "browser": "ALL", "performance": "ALL" },
        });
        let opened = browser.post("/session", json!({ "capabilities": { "alwaysMatch": wanted } })).await;
        browser.session = format!("{}/session/{}", browser.session, opened["sessionId"].as_str().unwrap());
        browser.post("/window/rect", json!({ "x": 0, "y": 0, "width": width, "height": height })).await;
        Some(browser)
    }

    pub async fn goto(&self, path: &str) {
        self.post("/url", json!({ "url": format!("{}{path}", self.origin) })).await;
    }

    /// The text of the first element that this CSS selector finds.
    pub async fn text(&self, selector: &str) -> Option<String> {
        let element = self.element(selector).await?;
        let text = self.ask(Method::GET, &format!("/element/{element}/text"), None).await.ok()?;
        text.as_str().map(str::to_owned)
    }

    /// Waits until the first element that a CSS selector finds has a text that contains this one.
    pub async fn until_text(&self, selector: &str, text: &str) {
        eventually_contains(selector, text, async || self.text(selector).await.unwrap_or_default()).await;
    }

    /// Clicks the first element that a CSS selector finds, as soon as it stands still. A live
    /// update may move it, and then the click would go to what stands there now.
    pub async fn click(&self, selector: &str) {
        let mut before = None;
        let element = eventually(&format!("{selector} stands still"), async || {
            let element = self.element(selector).await?;
            let now = (element.clone(), self.ask(Method::GET, &format!("/element/{element}/rect"), None).await.ok()?);
            let stands_still = before.as_ref() == Some(&now);
            before = Some(now);
            stands_still.then_some(element)
        })
        .await;
        self.post(&format!("/element/{element}/click"), json!({})).await;
    }

    /// Presses a key, or types a text, where the focus is.
    pub async fn press(&self, keys: &str) {
        let pressed =
            keys.chars().flat_map(|key| ["keyDown", "keyUp"].map(|kind| json!({ "type": kind, "value": key })));
        let keyboard = json!({ "type": "key", "id": "keyboard", "actions": pressed.collect::<Vec<_>>() });
        self.post("/actions", json!({ "actions": [keyboard] })).await;
    }

    /// The value of a JavaScript expression in the page.
    pub async fn evaluate(&self, expression: &str) -> Value {
        self.post("/execute/sync", json!({ "script": format!("return {expression};"), "args": [] })).await
    }

    /// Lets the pages see these preferences of the user, such as `prefers-color-scheme`.
    pub async fn prefer(&self, feature: &str, value: &str) {
        let media = json!({ "features": [{ "name": feature, "value": value }] });
        self.post("/goog/cdp/execute", json!({ "cmd": "Emulation.setEmulatedMedia", "params": media })).await;
    }

    /// A picture of the window, as PNG.
    pub async fn picture(&self) -> Vec<u8> {
        let picture = self.ask(Method::GET, "/screenshot", None).await.unwrap();
        BASE64_STANDARD.decode(picture.as_str().unwrap()).unwrap()
    }

    /// Fails if a page reported an error, or asked another origin for anything.
    pub async fn assert_clean(&self) {
        let log = self.log("browser").await;
        let errors: Vec<&Value> = log.iter().filter(|entry| entry["level"] == "SEVERE").collect();
        assert!(errors.is_empty(), "errors of the pages: {errors:#?}");
        let events = self.log("performance").await;
        let requested: Vec<String> = events.iter().filter_map(requested).collect();
        assert!(requested.iter().any(|url| url.starts_with(&self.origin)), "no request was recorded");
        let is_foreign = |url: &&String| !url.starts_with(&self.origin) && !url.starts_with("data:");
        let foreign: Vec<&String> = requested.iter().filter(is_foreign).collect();
        assert!(foreign.is_empty(), "requests that left the origin: {foreign:#?}");
    }

    /// Ends the session.
    pub async fn close(self) {
        self.ask(Method::DELETE, "", None).await.unwrap();
    }

    /// The entries of a log since it was last read.
    async fn log(&self, name: &str) -> Vec<Value> {
        self.post("/log", json!({ "type": name })).await.as_array().unwrap().clone()
    }

    /// The id of the first element that this CSS selector finds.
    async fn element(&self, selector: &str) -> Option<String> {
        let wanted = json!({ "using": "css selector", "value": selector });
        let found = self.ask(Method::POST, "/element", Some(wanted)).await.ok()?;
        Some(found[ELEMENT].as_str()?.to_owned())
    }

    async fn post(&self, path: &str, body: Value) -> Value {
        self.ask(Method::POST, path, Some(body)).await.unwrap_or_else(|error| panic!("{path}: {error}"))
    }

    /// # Errors
    /// The driver refuses, for example because there is no such element.
    async fn ask(&self, method: Method, path: &str, body: Option<Value>) -> Result<Value, Value> {
        let mut request = self.client.request(method, format!("{}{path}", self.session));
        if let Some(body) = body {
            request = request.json(&body);
        }
        let answer = request.send().await.unwrap();
        let is_success = answer.status().is_success();
        let mut answer: Value = answer.json().await.unwrap();
        let value = answer["value"].take();
        if is_success { Ok(value) } else { Err(value) }
    }
}

/// The URL of a request, from an entry of the performance log.
fn requested(entry: &Value) -> Option<String> {
    let event: Value = serde_json::from_str(entry["message"].as_str()?).ok()?;
    let message = &event["message"];
    (message["method"] == "Network.requestWillBeSent")
        .then(|| message["params"]["request"]["url"].as_str().map(str::to_owned))?
}
