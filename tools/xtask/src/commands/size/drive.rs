//! Calls every endpoint, one request after another, so that both measurements execute the same.

use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use reqwest::{Client, RequestBuilder, StatusCode};
use serde_json::{Value, json};
use sqlx::{Connection, PgConnection};
use testbed::services::{Instance, Service};
use testbed::stack::Stack;
use tokio::process::Command;
use tokio::time::sleep;
use topology::{ANALYTICS, CACHE, EMAIL, USER};
use uuid::Uuid;

/// How long a request is repeated until its answer is the expected one.
const LIMIT: Duration = Duration::from_secs(60);
const POLL: Duration = Duration::from_millis(50);

pub struct Drive<'a> {
    client: Client,
    instances: &'a [Instance],
    stack: &'a Stack,
}

impl<'a> Drive<'a> {
    pub fn new(instances: &'a [Instance], stack: &'a Stack) -> Self {
        Self { client: Client::new(), instances, stack }
    }

    fn url(&self, service: Service, path: &str) -> String {
        let instance = self.instances.iter().find(|instance| instance.service == service);
        format!("{}{path}", instance.expect("all services run").url())
    }

    /// The life of a user, from the registration to the erasure.
    pub async fn a_new_user(&self) -> Result<()> {
        let key = Uuid::now_v7().to_string();
        let body = json!({ "email": format!("new-{key}@example.com"), "display_name": "New" });
        let register = || self.client.post(self.url(USER, "/users")).header("Idempotency-Key", &key).json(&body);
        let answer = self.until(register, StatusCode::CREATED, |_| true).await?;
        // The stored answer.
        self.until(register, StatusCode::CREATED, |again| *again == answer).await?;
        let id: Uuid = answer["id"].as_str().context("the answer to POST /users has no id")?.parse()?;
        let mails = self.url(EMAIL, &format!("/users/{id}/emails"));
        self.until(|| self.client.get(&mails), StatusCode::OK, |mails| mails[0]["status"] == "sent").await?;
        self.an_existing_user(id).await?;
        let user = self.url(USER, &format!("/users/{id}"));
        self.until(|| self.client.delete(&user), StatusCode::NO_CONTENT, |_| true).await?;
        let profile = self.url(CACHE, &format!("/profiles/{id}"));
        self.until(|| self.client.get(&profile), StatusCode::NOT_FOUND, |_| true).await?;
        Ok(())
    }

    /// Reads and changes a user, and reads the totals.
    pub async fn an_existing_user(&self, id: Uuid) -> Result<()> {
        let user = self.url(USER, &format!("/users/{id}"));
        let email = json!({ "email": format!("changed-{}@example.com", Uuid::now_v7().simple()) });
        let reads = [
            user.clone(),
            self.url(EMAIL, &format!("/users/{id}/emails")),
            self.url(ANALYTICS, "/funnel"),
            self.url(ANALYTICS, "/registrations?bucket=hour"),
            self.url(ANALYTICS, "/registrations?bucket=day"),
            self.url(ANALYTICS, &format!("/audit?user_id={id}")),
        ];
        for url in &reads {
            self.until(|| self.client.get(url), StatusCode::OK, |_| true).await?;
        }
        let name = json!({ "display_name": "Changed" });
        self.until(|| self.client.patch(&user).json(&name), StatusCode::OK, |_| true).await?;
        let changed = || self.client.put(format!("{user}/email")).json(&email);
        let changed = self.until(changed, StatusCode::OK, |_| true).await?;
        // One batch for each change.
        let version = changed["version"].as_i64().unwrap_or_default();
        let profile = self.url(CACHE, &format!("/profiles/{id}?min_version={version}"));
        self.until(|| self.client.get(&profile), StatusCode::OK, |_| true).await?;
        Ok(())
    }

    /// Users of the filled database who are not erased.
    pub async fn some_users(&self, users: usize) -> Result<Vec<Uuid>> {
        let mut db = PgConnection::connect(&self.stack.postgres.database(USER).owner_url).await?;
        let query = "select id from users where email like 'user-%' order by md5(id::text) limit $1";
        Ok(sqlx::query_scalar(query).bind(i64::try_from(users)?).fetch_all(&mut db).await?)
    }

    /// The subcommands that are not exports of everything.
    pub async fn subcommands(&self, programs: &Path, environment: &[(String, String)]) -> Result<()> {
        let user = self.some_users(1).await?[0].to_string();
        for (service, arguments) in [
            (USER, &["republish", "--user", &user][..]),
            (EMAIL, &["send-held", "--user", &user]),
            (EMAIL, &["retry-failed", "--code", "554"]),
            (EMAIL, &["retry-failed", "--dry-run", "--since", "2100-01-01T00:00:00Z"]),
            (EMAIL, &["retry-failed", "--dry-run"]),
            (EMAIL, &["retry-unknown", "--since", "2100-01-01T00:00:00Z"]),
            (EMAIL, &["retry-unknown", "--dry-run"]),
        ] {
            let mut command = Command::new(programs.join(service.name));
            command.args(arguments).envs(environment.iter().cloned());
            let output = command.output().await?;
            ensure!(
                output.status.success(),
                "{} {arguments:?}: {}",
                service.name,
                String::from_utf8_lossy(&output.stderr)
            );
        }
        Ok(())
    }

    /// Repeats a request until it has this status and an accepted body.
    async fn until(
        &self,
        request: impl Fn() -> RequestBuilder,
        expected: StatusCode,
        accepts: impl Fn(&Value) -> bool,
    ) -> Result<Value> {
        let start = Instant::now();
        loop {
            let answer = request().send().await?;
            let status = answer.status();
            let url = answer.url().clone();
            let body = answer.text().await?;
            let body: Value = serde_json::from_str(&body).unwrap_or_default();
            if status == expected && accepts(&body) {
                return Ok(body);
            }
            if start.elapsed() > LIMIT {
                bail!("{url} still answers {status}: {body} after {LIMIT:?}");
            }
            sleep(POLL).await;
        }
    }
}
