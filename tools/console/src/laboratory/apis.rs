//! The public APIs of the services, as any client may call them.

use std::collections::BTreeMap;
use std::time::Duration;

use anyhow::{Result, bail, ensure};
use reqwest::{Client, Response, StatusCode};
use serde::Deserialize;
use serde_json::{Value, json};
use tokio::time::{Instant, sleep};
use topology::{ANALYTICS, CACHE, EMAIL, Service, USER};
use uuid::Uuid;

use super::fates::{Checked, Delivery};
use crate::config::ServiceAddress;

/// How long one request may take. A service that is frozen must not delay the others for long.
const ANSWER_LIMIT: Duration = Duration::from_secs(2);
/// How long a command is repeated until it is answered.
const COMMAND_LIMIT: Duration = Duration::from_secs(20);
const RETRY_INTERVAL: Duration = Duration::from_millis(500);

#[derive(Clone)]
pub struct Apis {
    client: Client,
    urls: BTreeMap<String, String>,
}

/// The answer to a command.
#[derive(Deserialize)]
pub struct Accepted {
    pub id: Uuid,
    pub version: i64,
}

#[derive(Deserialize)]
struct Audit {
    entries: Vec<Entry>,
}

#[derive(Deserialize)]
struct Entry {
    #[serde(rename = "type")]
    kind: String,
}

#[derive(Deserialize)]
struct Profile {
    version: i64,
}

#[derive(Deserialize)]
struct Funnel {
    registered: i64,
}

impl Apis {
    pub fn new(services: Vec<ServiceAddress>) -> Result<Self> {
        let client = Client::builder().no_proxy().timeout(ANSWER_LIMIT).build()?;
        let urls = services
            .into_iter()
            .map(|ServiceAddress { service, host, port }| (service, format!("http://{host}:{port}")));
        Ok(Self { client, urls: urls.collect() })
    }

    /// Registers a user. It repeats the request with the same key while it gets no answer or a
    /// temporary refusal, so the user exists once.
    pub async fn register(&self, email: &str) -> Result<Accepted> {
        let key = Uuid::new_v4().to_string();
        let body = json!({ "email": email, "display_name": "Laboratory" });
        let request = || self.client.post(self.url(USER, "/users")).header("idempotency-key", &key).json(&body);
        until_answered(request).await
    }

    pub async fn rename(&self, user: Uuid) -> Result<Accepted> {
        let key = Uuid::new_v4().to_string();
        let body = json!({ "display_name": "Laboratory, renamed" });
        let url = self.url(USER, &format!("/users/{user}"));
        until_answered(|| self.client.patch(&url).header("idempotency-key", &key).json(&body)).await
    }

    /// What the services say about a user.
    pub async fn check(&self, user: Uuid) -> Checked {
        let (counted, cached, deliveries) = tokio::join!(self.counted(user), self.cached(user), self.deliveries(user));
        Checked { counted: counted.ok(), cached: cached.ok(), deliveries: deliveries.ok(), letter: None }
    }

    /// Whether the user service has no such user.
    pub async fn is_erased(&self, user: Uuid) -> bool {
        let answer = self.get(USER, &format!("/users/{user}")).await;
        answer.is_ok_and(|answer| answer.status() == StatusCode::NOT_FOUND)
    }

    /// The users that the funnel counts.
    pub async fn funnel(&self) -> Result<i64> {
        let Funnel { registered } = self.get(ANALYTICS, "/funnel").await?.error_for_status()?.json().await?;
        Ok(registered)
    }

    async fn counted(&self, user: Uuid) -> Result<usize> {
        let answer = self.get(ANALYTICS, &format!("/audit?user_id={user}")).await?;
        let Audit { entries } = answer.error_for_status()?.json().await?;
        Ok(entries.iter().filter(|entry| entry.kind == "user.registered").count())
    }

    async fn cached(&self, user: Uuid) -> Result<Option<i64>> {
        let answer = self.get(CACHE, &format!("/profiles/{user}")).await?;
        if answer.status() == StatusCode::NOT_FOUND {
            return Ok(None);
        }
        let Profile { version } = answer.error_for_status()?.json().await?;
        Ok(Some(version))
    }

    async fn deliveries(&self, user: Uuid) -> Result<Vec<Delivery>> {
        let answer = self.get(EMAIL, &format!("/users/{user}/emails")).await?;
        Ok(answer.error_for_status()?.json().await?)
    }

    async fn get(&self, service: Service, path: &str) -> Result<Response> {
        Ok(self.client.get(self.url(service, path)).send().await?)
    }

    fn url(&self, service: Service, path: &str) -> String {
        format!("{}{path}", self.urls[service.name])
    }
}

async fn until_answered(request: impl Fn() -> reqwest::RequestBuilder) -> Result<Accepted> {
    let deadline = Instant::now() + COMMAND_LIMIT;
    loop {
        let refused = match request().send().await {
            Ok(answer) if answer.status().is_success() => return Ok(answer.json().await?),
            Ok(answer) => {
                let status = answer.status();
                let problem: Value = answer.json().await.unwrap_or_default();
                let detail = problem["detail"].as_str().unwrap_or_default().to_owned();
                let is_temporary = status.is_server_error() || status == StatusCode::CONFLICT;
                ensure!(is_temporary, "the user service refuses ({status}): {detail}");
                format!("{status} {detail}")
            }
            Err(_) => "it does not answer".to_owned(),
        };
        if Instant::now() > deadline {
            bail!("the user service did not accept a command for {} s: {refused}", COMMAND_LIMIT.as_secs());
        }
        sleep(RETRY_INTERVAL).await;
    }
}
