//! The console of a system: a browser without JavaScript.

use reqwest::header::{CONTENT_TYPE, COOKIE, HOST, HeaderMap, ORIGIN};
use reqwest::redirect::Policy;
use reqwest::{Client, Method, StatusCode};
use testbed::testing;
use testbed::tools::RunningTool;
use topology::CONSOLE;

use crate::System;
use crate::waiting::eventually;

const STARTED: &str = "the test has started it";

/// A running console. It is killed when it is dropped.
pub struct Console {
    url: String,
    /// `None`: another program has started it.
    tool: Option<RunningTool>,
    client: Client,
}

/// An answer of the console.
pub struct Page {
    pub status: StatusCode,
    pub headers: HeaderMap,
    pub body: String,
}

impl System {
    /// Starts the console of this system.
    pub async fn console(&self) -> Console {
        self.console_with(&[]).await
    }

    /// As [`System::console`], with further settings.
    pub async fn console_with(&self, settings: &[(&str, &str)]) -> Console {
        let programs = &testing::stack().programs;
        let (mut environment, logs) = self.for_console();
        environment.extend(settings.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())));
        let console = CONSOLE.expect("the topology has the console");
        let tool = RunningTool::start_on_free_ports(console, programs, &environment, logs).await.unwrap();
        Console { url: tool.url(), tool: Some(tool), client: client() }
    }
}

impl Console {
    /// A console that another program has started.
    pub fn at(url: &str) -> Self {
        Self { url: url.to_owned(), tool: None, client: client() }
    }

    pub fn url(&self, path: &str) -> String {
        format!("{}{path}", self.url)
    }

    /// Where services export their traces to this console.
    pub fn otlp_url(&self) -> String {
        self.tool.as_ref().expect(STARTED).otlp_url()
    }

    /// Sends SIGTERM and waits for the exit.
    pub async fn stop(&mut self) {
        self.tool.as_mut().expect(STARTED).stop().await;
    }

    pub fn pid(&self) -> u32 {
        self.tool.as_ref().expect(STARTED).process.pid()
    }

    pub async fn get(&self, path: &str) -> Page {
        self.send(Method::GET, path, None).await
    }

    /// Sends a request, with another `Host` if one is given.
    pub async fn send(&self, method: Method, path: &str, host: Option<&str>) -> Page {
        let mut request = self.client.request(method, self.url(path));
        if let Some(host) = host {
            request = request.header(HOST, host);
        }
        let answer = request.send().await.unwrap();
        Page { status: answer.status(), headers: answer.headers().clone(), body: answer.text().await.unwrap() }
    }

    /// Sends a form, as a page of this origin would.
    pub async fn post(&self, path: &str, origin: &str, fields: &[(&str, &str)]) -> Page {
        self.post_with("", path, origin, fields).await
    }

    /// Sends a form with a cookie.
    pub async fn post_with(&self, cookie: &str, path: &str, origin: &str, fields: &[(&str, &str)]) -> Page {
        let encode = |text: &str| text.bytes().map(|byte| format!("%{byte:02X}")).collect::<String>();
        let fields: Vec<String> = fields.iter().map(|(name, value)| format!("{name}={}", encode(value))).collect();
        let request =
            self.client.post(self.url(path)).header(ORIGIN, origin).header(COOKIE, cookie).body(fields.join("&"));
        let answer = request.header(CONTENT_TYPE, "application/x-www-form-urlencoded").send().await.unwrap();
        Page { status: answer.status(), headers: answer.headers().clone(), body: answer.text().await.unwrap() }
    }

    /// The token that the forms of a page contain.
    pub async fn page_token(&self, path: &str) -> String {
        let page = self.until_shows(path, "name=\"page_token\" value=\"").await;
        let (_, rest) = page.split_once("name=\"page_token\" value=\"").unwrap();
        rest.split('"').next().unwrap().to_owned()
    }

    /// Waits until a page contains a text, and returns the page.
    pub async fn until_shows(&self, path: &str, text: &str) -> String {
        eventually(&format!("{path} of the console shows {text:?}"), async || {
            let page = self.get(path).await;
            page.body.contains(text).then_some(page.body)
        })
        .await
    }

    /// Waits until the live updates of a page contain a text.
    pub async fn until_updated(&self, path: &str, text: &str) {
        let mut updates = self.client.get(self.url(path)).send().await.unwrap();
        let mut received = String::new();
        let contains = async {
            while !received.contains(text) {
                let part = updates.chunk().await.unwrap().expect("the stream does not end");
                received.push_str(&String::from_utf8_lossy(&part));
            }
        };
        let limited = tokio::time::timeout(crate::DEADLINE, contains).await;
        limited.unwrap_or_else(|_| panic!("{path} did not send {text:?}"));
    }
}

/// The answers that redirect are looked at, too.
fn client() -> Client {
    Client::builder().redirect(Policy::none()).build().unwrap()
}
