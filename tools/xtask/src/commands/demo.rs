//! `cargo xtask demo`: follows three users through the whole system, on free ports and temporary
//! data.

use std::fmt::Display;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use reqwest::{Client, RequestBuilder, StatusCode};
use serde_json::{Value, json};
use testbed::fetch::fetch;
use testbed::postgres::Durability;
use testbed::process::{Logs, Scratch};
use testbed::say::say;
use testbed::services::{self, ANALYTICS, CACHE, EMAIL, Instance, SERVICES, USER};
use testbed::stack::{Access, Ports};
use testbed::system::{System, start_stack};
use tokio::time::sleep;
use uuid::Uuid;

const USERS: [(&str, &str); 3] =
    [("Ada Lovelace", "ada@example.com"), ("Grace Hopper", "grace@example.com"), ("Alan Turing", "alan@example.com")];
/// How long one step of a journey may take. It usually takes milliseconds.
const STEP_LIMIT: Duration = Duration::from_secs(30);
const POLL: Duration = Duration::from_millis(10);

pub async fn run() -> Result<ExitCode> {
    say("This demo starts all of Waybill on free ports, follows three users through it, and stops it.");
    let logs = Logs::to_files("demo")?;
    let fetched = fetch().await?;
    let programs = services::build(&logs).await?;
    let scratch = Scratch::create("demo")?;
    let failed = || format!("the demo failed; the logs of all processes are in {}", logs.folder().display());
    let stack = start_stack(&fetched, scratch.path(), Ports::free(), Durability::Process, Access::Open, &logs).await;
    let stack = stack.with_context(failed)?;
    let instances = SERVICES.map(Instance::on_free_ports);
    let system = System::start(stack, &fetched, &instances, vec![], &programs, &logs).await.with_context(failed)?;
    let demo = Demo { client: Client::new(), system };
    demo.journeys().await.with_context(failed)?;
    say("\nStopping everything …");
    demo.system.stop().await;
    say(format_args!("Everything is stopped. The logs of all processes are in {}", logs.folder().display()));
    say("To keep the system running and send requests yourself: cargo xtask up");
    Ok(ExitCode::SUCCESS)
}

struct Demo {
    client: Client,
    system: System,
}

impl Demo {
    async fn journeys(&self) -> Result<()> {
        let mut ids = Vec::new();
        for (index, (name, address)) in USERS.into_iter().enumerate() {
            ids.push(self.registration(name, address, index + 1).await?);
        }
        self.change_of_name(ids[0]).await?;
        self.erasure(ids[1]).await
    }

    /// `registered` is the number of users registered so far, including this one.
    async fn registration(&self, name: &str, address: &str, registered: usize) -> Result<Uuid> {
        let journey = Journey::start(&format!("{name} registers"));
        let users = format!("{}/users", self.system.url(USER));
        let request = self.client.post(users).header("Idempotency-Key", Uuid::now_v7().to_string());
        let (status, answer) = send(request.json(&json!({ "email": address, "display_name": name }))).await?;
        ensure!(status == StatusCode::CREATED, "POST /users answers {status}: {answer}");
        let id: Uuid = answer["id"].as_str().context("the answer to POST /users has no id")?.parse()?;
        journey.step(USER.name, format_args!("POST /users answers 201: {answer}"));

        let profile = format!("{}/profiles/{id}?min_version=1", self.system.url(CACHE));
        self.until(&profile, |profile| profile["display_name"] == name).await?;
        journey.step(CACHE.name, "GET /profiles/{id}?min_version=1 returns the profile");

        let deliveries = format!("{}/users/{id}/emails", self.system.url(EMAIL));
        self.until(&deliveries, |deliveries| deliveries[0]["status"] == "sent").await?;
        let mails = self.system.stack.sink.mails();
        let mail = mails.iter().find(|mail| mail.to == [address]).context("the SMTP sink has received no mail")?;
        let subject = mail.subject.as_deref().unwrap_or_default();
        journey.step(EMAIL.name, format_args!("the SMTP server has accepted the mail \"{subject}\""));

        let counted = |funnel: &Value| funnel["registered"] == registered && funnel["mailed"] == registered;
        let funnel = self.until(&format!("{}/funnel", self.system.url(ANALYTICS)), counted).await?;
        journey.step(ANALYTICS.name, format_args!("GET /funnel counts the user: {funnel}"));
        Ok(id)
    }

    async fn change_of_name(&self, id: Uuid) -> Result<()> {
        let journey = Journey::start("Ada Lovelace changes her name");
        let user = format!("{}/users/{id}", self.system.url(USER));
        let (status, answer) = send(self.client.patch(user).json(&json!({ "display_name": "Ada King" }))).await?;
        ensure!(status.is_success(), "PATCH /users/{id} answers {status}: {answer}");
        journey.step(USER.name, format_args!("PATCH /users/{{id}} answers {}: {answer}", status.as_u16()));
        let profile = format!("{}/profiles/{id}?min_version=2", self.system.url(CACHE));
        self.until(&profile, |profile| profile["display_name"] == "Ada King").await?;
        journey.step(CACHE.name, "GET /profiles/{id}?min_version=2 waits for the change and returns it");
        Ok(())
    }

    async fn erasure(&self, id: Uuid) -> Result<()> {
        let journey = Journey::start("Grace Hopper is erased");
        let user = format!("{}/users/{id}", self.system.url(USER));
        let (status, answer) = send(self.client.delete(user)).await?;
        ensure!(status.is_success(), "DELETE /users/{id} answers {status}: {answer}");
        journey.step(USER.name, format_args!("DELETE /users/{{id}} answers {}", status.as_u16()));
        let profile = format!("{}/profiles/{id}", self.system.url(CACHE));
        self.until_status(&profile, StatusCode::NOT_FOUND, |_| true).await?;
        journey.step(CACHE.name, "GET /profiles/{id} answers 404");
        Ok(())
    }

    async fn until(&self, url: &str, accepts: impl Fn(&Value) -> bool) -> Result<Value> {
        self.until_status(url, StatusCode::OK, accepts).await
    }

    /// Repeats the request until it answers with this status and a body that `accepts` accepts.
    async fn until_status(&self, url: &str, expected: StatusCode, accepts: impl Fn(&Value) -> bool) -> Result<Value> {
        let start = Instant::now();
        loop {
            let (status, answer) = send(self.client.get(url)).await?;
            if status == expected && accepts(&answer) {
                return Ok(answer);
            }
            if start.elapsed() > STEP_LIMIT {
                bail!("GET {url} still answers {status}: {answer} after {STEP_LIMIT:?}");
            }
            sleep(POLL).await;
        }
    }
}

/// The status, and the body if it is JSON.
async fn send(request: RequestBuilder) -> Result<(StatusCode, Value)> {
    let answer = request.send().await?;
    let status = answer.status();
    let body = answer.text().await?;
    Ok((status, serde_json::from_str(&body).unwrap_or_default()))
}

/// Prints the steps of one user's journey, each with the time since its start.
struct Journey {
    start: Instant,
}

impl Journey {
    fn start(what: &str) -> Self {
        say(format_args!("\n{what}"));
        Self { start: Instant::now() }
    }

    fn step(&self, service: &str, what: impl Display) {
        say(format_args!("  {:>5} ms  {service:<10} {what}", self.start.elapsed().as_millis()));
    }
}
