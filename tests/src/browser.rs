//! A real browser, Chromium, if it is installed with its driver.

use std::time::Duration;

use reqwest::Client;
use serde_json::{Value, json};
use testbed::paths;
use testbed::process::{self, Logs, Process};
use testbed::testing::{free_port, prefix};
use thirtyfour::{By, ChromiumLikeCapabilities, DesiredCapabilities, LoggingPrefsLogLevel, WebDriver};

use crate::waiting::eventually;

const START_LIMIT: Duration = Duration::from_secs(30);

/// An open window. The browser ends when this is dropped: it is in the process group of its driver.
pub struct Browser {
    driver: WebDriver,
    origin: String,
    _process: Process,
}

impl Browser {
    /// A window of this size for the pages of one origin. `None`, and a line that says so, if Chromium
    /// or its driver is not installed.
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
        let mut wanted = DesiredCapabilities::chrome();
        wanted.set_binary(chromium.to_str().unwrap()).unwrap();
        // Chromium has no sandbox for root, and /dev/shm is small in a container.
        for argument in ["--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"] {
            wanted.add_arg(argument).unwrap();
        }
        wanted.set_logging_prefs("browser", LoggingPrefsLogLevel::All).unwrap();
        wanted.set_logging_prefs("performance", LoggingPrefsLogLevel::All).unwrap();
        let driver = WebDriver::new(url, wanted).await.unwrap();
        driver.set_window_rect(0, 0, width, height).await.unwrap();
        Some(Self { driver, origin: origin.to_owned(), _process: process })
    }

    pub async fn goto(&self, path: &str) {
        self.driver.goto(format!("{}{path}", self.origin)).await.unwrap();
    }

    /// The text of the first element that this CSS selector finds.
    pub async fn text(&self, selector: &str) -> Option<String> {
        self.driver.find(By::Css(selector)).await.ok()?.text().await.ok()
    }

    /// Waits until the first element that a CSS selector finds has a text that contains this one.
    pub async fn until_text(&self, selector: &str, text: &str) {
        eventually(&format!("{selector} shows {text:?}"), async || {
            self.text(selector).await.filter(|shown| shown.contains(text)).map(drop)
        })
        .await;
    }

    pub async fn click(&self, selector: &str) {
        self.driver.find(By::Css(selector)).await.unwrap().click().await.unwrap();
    }

    /// Presses a key, or types a text, where the focus is.
    pub async fn press(&self, keys: &str) {
        self.driver.action_chain().send_keys(keys).perform().await.unwrap();
    }

    /// The value of a JavaScript expression in the page.
    pub async fn evaluate(&self, expression: &str) -> Value {
        let script = format!("return {expression};");
        self.driver.execute(script, vec![]).await.unwrap().json().clone()
    }

    /// Lets the pages see these preferences of the user, such as `prefers-color-scheme`.
    pub async fn prefer(&self, feature: &str, value: &str) {
        let media = json!({ "features": [{ "name": feature, "value": value }] });
        self.driver.cdp().send_raw("Emulation.setEmulatedMedia", media).await.unwrap();
    }

    /// A picture of the window, as PNG.
    pub async fn picture(&self) -> Vec<u8> {
        self.driver.screenshot_as_png().await.unwrap()
    }

    /// Fails if a page reported an error, or asked another origin for anything.
    pub async fn assert_clean(&self) {
        let log = self.driver.browser_log().await.unwrap();
        let errors: Vec<String> =
            log.into_iter().filter(|entry| entry.level == "SEVERE").map(|entry| entry.message).collect();
        assert!(errors.is_empty(), "errors of the pages: {errors:#?}");
        let events = self.driver.get_log("performance").await.unwrap();
        let requested: Vec<String> = events.iter().filter_map(|entry| requested(&entry.message)).collect();
        assert!(requested.iter().any(|url| url.starts_with(&self.origin)), "no request was recorded");
        let is_foreign = |url: &&String| !url.starts_with(&self.origin) && !url.starts_with("data:");
        let foreign: Vec<&String> = requested.iter().filter(is_foreign).collect();
        assert!(foreign.is_empty(), "requests that left the origin: {foreign:#?}");
    }

    /// Ends the session.
    pub async fn close(self) {
        self.driver.clone().quit().await.unwrap();
    }
}

/// The URL of a request, from an entry of the performance log.
fn requested(entry: &str) -> Option<String> {
    let event: Value = serde_json::from_str(entry).ok()?;
    let message = &event["message"];
    (message["method"] == "Network.requestWillBeSent")
        .then(|| message["params"]["request"]["url"].as_str().map(str::to_owned))?
}
