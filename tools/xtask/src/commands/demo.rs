//! `cargo xtask demo`: follows some users through the whole system, on ports and data of its own.

use std::process::ExitCode;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use reqwest::{Client, RequestBuilder, StatusCode};
use serde_json::{Value, json};
use testbed::fetch::fetch;
use testbed::postgres::Durability;
use testbed::process::{Logs, Scratch};
use testbed::say::say;
use testbed::services::{self, Service};
use testbed::smtp_sink::SmtpSink;
use testbed::stack::Ports;
use testbed::system::{System, start_stack};
use tokio::time::sleep;
use uuid::Uuid;

const USERS: [(&str, &str); 3] =
    [("Ada Lovelace", "ada@example.com"), ("Grace Hopper", "grace@example.com"), ("Alan Turing", "alan@example.com")];
/// For one step of a journey; it takes milliseconds.
const STEP_LIMIT: Duration = Duration::from_secs(30);
const POLL: Duration = Duration::from_millis(10);

pub async fn run() -> Result<ExitCode> {
    let logs = Logs::fresh("demo", false)?;
    let fetched = fetch().await?;
    let programs = services::build(&logs).await?;
    let scratch = Scratch::create("demo")?;
    let stack = start_stack(&fetched, scratch.path(), Ports::free(), Durability::Process, &logs).await?;
    say("starting the services …");
    let services = services::ALL.map(Service::on_free_ports);
    let failed = || format!("the demo failed; the logs of all processes are in {}", logs.folder().display());
    let system = System::start(stack, &services, &programs, &logs).await.with_context(failed)?;
    let [user, analytics, cache, email] = services.map(Service::url);
    let demo = Demo { client: Client::new(), user, analytics, cache, email, sink: &system.stack.sink };
    demo.journeys().await.with_context(failed)?;
    system.stop().await;
    say(format_args!("\nAll is stopped. The logs of all processes: {}", logs.folder().display()));
    Ok(ExitCode::SUCCESS)
}

struct Demo<'a> {
    client: Client,
    user: String,
    analytics: String,
    cache: String,
    email: String,
    sink: &'a SmtpSink,
}

impl Demo<'_> {
    async fn journeys(&self) -> Result<()> {
        let mut ids = Vec::new();
        for (number, (name, address)) in USERS.into_iter().enumerate() {
            ids.push(self.registration(name, address, number + 1).await?);
        }
        self.change_of_name(ids[0]).await?;
        self.erasure(ids[1]).await
    }

    async fn registration(&self, name: &str, address: &str, count: usize) -> Result<Uuid> {
        let journey = Journey::begin(&format!("{name} registers"));
        let request =
            self.client.post(format!("{}/users", self.user)).header("Idempotency-Key", Uuid::now_v7().to_string());
        let (status, answer) = ask(request.json(&json!({ "email": address, "display_name": name }))).await?;
        ensure!(status == StatusCode::CREATED, "POST /users answers {status}: {answer}");
        let id: Uuid = answer["id"].as_str().context("POST /users answers no id")?.parse()?;
        journey.reached(format_args!("user       POST /users answers 201: {answer}"));

        let profile = format!("{}/profiles/{id}?min_version=1", self.cache);
        self.until(&profile, |profile| profile["display_name"] == name).await?;
        journey.reached("cache      GET /profiles/{id}?min_version=1 shows the profile");

        let deliveries = format!("{}/users/{id}/emails", self.email);
        self.until(&deliveries, |deliveries| deliveries[0]["status"] == "sent").await?;
        let mails = self.sink.mails();
        let mail = mails.iter().find(|mail| mail.to == [address]).context("the SMTP sink has no mail")?;
        journey.reached(format_args!("email      the mail is sent: {}", mail.subject.as_deref().unwrap_or_default()));

        let counted = |funnel: &Value| funnel["registered"] == count && funnel["mailed"] == count;
        let funnel = self.until(&format!("{}/funnel", self.analytics), counted).await?;
        journey.reached(format_args!("analytics  GET /funnel counts it: {funnel}"));
        Ok(id)
    }

    async fn change_of_name(&self, id: Uuid) -> Result<()> {
        let journey = Journey::begin("The first one takes another name");
        let request =
            self.client.patch(format!("{}/users/{id}", self.user)).json(&json!({ "display_name": "Ada King" }));
        let (status, answer) = ask(request).await?;
        ensure!(status.is_success(), "PATCH /users/{id} answers {status}: {answer}");
        journey.reached(format_args!("user       PATCH /users/{{id}} answers {status}: {answer}"));
        let profile = format!("{}/profiles/{id}?min_version=2", self.cache);
        self.until(&profile, |profile| profile["display_name"] == "Ada King").await?;
        journey.reached("cache      GET /profiles/{id}?min_version=2 waits for the change and shows it");
        Ok(())
    }

    async fn erasure(&self, id: Uuid) -> Result<()> {
        let journey = Journey::begin("The second one is erased");
        let (status, answer) = ask(self.client.delete(format!("{}/users/{id}", self.user))).await?;
        ensure!(status.is_success(), "DELETE /users/{id} answers {status}: {answer}");
        journey.reached(format_args!("user       DELETE /users/{{id}} answers {status}"));
        let profile = format!("{}/profiles/{id}", self.cache);
        self.until_status(&profile, StatusCode::NOT_FOUND, |_| true).await?;
        journey.reached("cache      GET /profiles/{id} answers 404");
        Ok(())
    }

    async fn until(&self, url: &str, wanted: impl Fn(&Value) -> bool) -> Result<Value> {
        self.until_status(url, StatusCode::OK, wanted).await
    }

    /// Asks again until the answer is the one that is wanted.
    async fn until_status(&self, url: &str, wanted: StatusCode, accepts: impl Fn(&Value) -> bool) -> Result<Value> {
        let begin = Instant::now();
        loop {
            let (status, answer) = ask(self.client.get(url)).await?;
            if status == wanted && accepts(&answer) {
                return Ok(answer);
            }
            if begin.elapsed() > STEP_LIMIT {
                bail!("GET {url} still answers {status}: {answer} after {STEP_LIMIT:?}");
            }
            sleep(POLL).await;
        }
    }
}

/// The status, and the body where it is JSON.
async fn ask(request: RequestBuilder) -> Result<(StatusCode, Value)> {
    let answer = request.send().await?;
    let status = answer.status();
    let body = answer.text().await?;
    Ok((status, serde_json::from_str(&body).unwrap_or_default()))
}

/// Prints each step with the time since the beginning.
struct Journey(Instant);

impl Journey {
    fn begin(what: &str) -> Self {
        say(format_args!("\n{what}"));
        Self(Instant::now())
    }

    fn reached(&self, what: impl std::fmt::Display) {
        say(format_args!("  {:>5} ms  {what}", self.0.elapsed().as_millis()));
    }
}
