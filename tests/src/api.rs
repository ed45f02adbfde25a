//! The services' HTTP APIs, as a client sees them.

use std::time::{Duration, Instant};

use reqwest::{Client, RequestBuilder, StatusCode};
use serde_json::{Value, json};
use sqlx::PgPool;
use uuid::Uuid;

use crate::consume::part_of;
use crate::log::GROUPS;
use crate::{DEADLINE, POLL, Part, System, eventually, eventually_eq};

/// An answer: status, `ETag`, body (null if it is not JSON).
#[derive(Debug, Clone, PartialEq)]
pub struct Answer {
    pub status: StatusCode,
    pub etag: Option<String>,
    pub content_type: Option<String>,
    pub body: Value,
}

/// What is under way before the log.
const OPEN: [(&str, Part, &str); 3] = [
    ("the user outbox", Part::User, "select count(*) from outbox"),
    ("the email outbox", Part::Email, "select count(*) from outbox"),
    (
        "open deliveries",
        Part::Email,
        "select count(*) from deliveries where status in ('pending', 'sending', 'unknown')",
    ),
];

impl Answer {
    pub fn id(&self) -> Uuid {
        self.body["id"].as_str().and_then(|id| id.parse().ok()).unwrap_or_else(|| panic!("no id in {self:?}"))
    }

    pub fn version(&self) -> i64 {
        self.body["version"].as_i64().unwrap_or_else(|| panic!("no version in {self:?}"))
    }
}

/// Sends a request. `Err`: no answer, so nobody knows whether it took effect.
pub async fn send(request: RequestBuilder) -> reqwest::Result<Answer> {
    let response = request.send().await?;
    let header = |name: &str| response.headers().get(name).map(|value| value.to_str().unwrap().to_owned());
    let (status, etag, content_type) = (response.status(), header("etag"), header("content-type"));
    let body = serde_json::from_slice(&response.bytes().await?).unwrap_or(Value::Null);
    Ok(Answer { status, etag, content_type, body })
}

/// The first answer that is not "try again", as a service may say that has only just started, or has too many requests at once for
/// a busy machine.
pub async fn answered(request: impl Fn() -> RequestBuilder) -> Answer {
    eventually("an answer other than \"try again\"", async || {
        let answer = send(request()).await.unwrap();
        (!answer.body["detail"].to_string().contains("try again")).then_some(answer)
    })
    .await
}

/// An address that no other test uses.
pub fn address() -> String {
    format!("user-{}@example.com", Uuid::now_v7().simple())
}

impl System {
    /// `POST /users`, with an `Idempotency-Key` if one is given.
    pub async fn post_user(&self, email: &str, key: Option<&str>) -> reqwest::Result<Answer> {
        send(self.registration(email, key)).await
    }

    /// The same, not yet sent.
    pub fn registration(&self, email: &str, key: Option<&str>) -> RequestBuilder {
        let body = json!({ "email": email, "display_name": "Ada Lovelace" });
        let mut request = Client::new().post(self.url(Part::User, "/users")).json(&body);
        if let Some(key) = key {
            request = request.header("idempotency-key", key);
        }
        request
    }

    /// Registers somebody new, successfully.
    pub async fn register(&self) -> Uuid {
        self.register_as(&address()).await
    }

    pub async fn register_as(&self, email: &str) -> Uuid {
        let key = Uuid::now_v7().to_string();
        let answer = answered(|| self.registration(email, Some(&key))).await;
        assert_eq!(answer.status, StatusCode::CREATED, "{answer:?}");
        answer.id()
    }

    /// `PATCH /users/{id}`.
    pub async fn rename(&self, id: Uuid, display_name: &str) -> reqwest::Result<Answer> {
        let body = json!({ "display_name": display_name });
        send(Client::new().patch(self.url(Part::User, &format!("/users/{id}"))).json(&body)).await
    }

    /// `PUT /users/{id}/email`.
    pub async fn change_email(&self, id: Uuid, email: &str) -> reqwest::Result<Answer> {
        let body = json!({ "email": email });
        send(Client::new().put(self.url(Part::User, &format!("/users/{id}/email"))).json(&body)).await
    }

    /// `DELETE /users/{id}`.
    pub async fn erase(&self, id: Uuid) -> reqwest::Result<Answer> {
        send(Client::new().delete(self.url(Part::User, &format!("/users/{id}")))).await
    }

    pub async fn get(&self, part: Part, path: &str) -> reqwest::Result<Answer> {
        send(Client::new().get(self.url(part, path))).await
    }

    /// `GET /profiles/{id}` of the cache.
    pub async fn profile(&self, id: Uuid, min_version: Option<i64>) -> reqwest::Result<Answer> {
        let query = min_version.map(|version| format!("?min_version={version}")).unwrap_or_default();
        self.get(Part::Cache, &format!("/profiles/{id}{query}")).await
    }

    /// The states of a user's deliveries.
    pub async fn deliveries(&self, id: Uuid) -> Vec<String> {
        let Ok(answer) = self.get(Part::Email, &format!("/users/{id}/emails")).await else { return vec![] };
        let deliveries = answer.body.as_array().cloned().unwrap_or_default();
        deliveries.iter().map(|delivery| delivery["status"].as_str().unwrap_or_default().to_owned()).collect()
    }

    pub async fn until_mailed(&self, id: Uuid) {
        eventually_eq("the welcome mail is sent", vec!["sent".to_owned()], async || self.deliveries(id).await).await;
    }

    /// `(registered, mailed)`.
    pub async fn funnel(&self) -> (i64, i64) {
        let Ok(answer) = self.get(Part::Analytics, "/funnel").await else { return (-1, -1) };
        (answer.body["registered"].as_i64().unwrap_or(-1), answer.body["mailed"].as_i64().unwrap_or(-1))
    }

    /// Waits until the cache has this version of the user.
    pub async fn until_cached(&self, id: Uuid, version: i64) -> Answer {
        eventually(&format!("the cache has version {version}"), async || {
            self.profile(id, Some(version)).await.ok().filter(|answer| answer.status == StatusCode::OK)
        })
        .await
    }

    /// The sum of a metric's series whose labels contain every one of `labels` (`group="…"`). `None`: there is no such series, or
    /// no answer.
    pub async fn metric(&self, part: Part, name: &str, labels: &[&str]) -> Option<f64> {
        let page = Client::new().get(self.admin_url(part, "/metrics")).send().await.ok()?.text().await.ok()?;
        let series = page.lines().filter(|line| !line.starts_with('#')).filter_map(|line| line.rsplit_once(' '));
        let matching = series.filter(|(series, _)| series.split('{').next() == Some(name));
        let matching = matching.filter(|(series, _)| labels.iter().all(|label| series.contains(label)));
        let values: Vec<f64> = matching.filter_map(|(_, value)| value.parse().ok()).collect();
        (!values.is_empty()).then(|| values.iter().sum())
    }

    /// What `/readyz` says: ready, and the body.
    pub async fn readiness(&self, part: Part) -> Option<(bool, Value)> {
        let answer = send(Client::new().get(self.admin_url(part, "/readyz"))).await.ok()?;
        Some((answer.status.is_success(), answer.body))
    }

    /// Whether the process itself says that it lives, which is what a supervisor asks before it restarts one.
    pub async fn alive(&self, part: Part) -> bool {
        let answer = Client::new().get(self.admin_url(part, "/livez")).timeout(Duration::from_secs(3)).send().await;
        answer.is_ok_and(|answer| answer.status().is_success())
    }

    /// Waits until the service says that it cannot work, watching that it lives all the while.
    pub async fn until_waiting(&self, part: Part) {
        eventually(&format!("{part:?} says that it waits"), async || {
            assert!(self.alive(part).await, "{part:?} would be restarted");
            let (ready, _) = self.readiness(part).await?;
            (!ready).then_some(())
        })
        .await;
    }

    /// Waits until nothing is under way any more: outboxes empty, no delivery open, all lags 0.
    ///
    /// # Panics
    /// It still is after [`DEADLINE`].
    pub async fn until_drained(&self) {
        let behind = self.drain(DEADLINE).await;
        assert!(behind.is_empty(), "not drained within {DEADLINE:?}: {behind:?}");
    }

    /// Waits for the same; what is still under way after `limit`.
    pub async fn drain(&self, limit: Duration) -> Vec<String> {
        let deadline = Instant::now() + limit;
        let mut databases = vec![];
        for (what, part, question) in OPEN {
            if self.was_started(part) {
                databases.push((what, self.database(part).await, question));
            }
        }
        // Two looks in a row: what the groups did between the two halves of the first, the second finds settled.
        let mut quiet = 0;
        loop {
            let behind = self.behind(&databases).await;
            quiet = if behind.is_empty() { quiet + 1 } else { 0 };
            if quiet == 2 || Instant::now() > deadline {
                return behind;
            }
            tokio::time::sleep(POLL).await;
        }
    }

    async fn behind(&self, databases: &[(&str, PgPool, &'static str)]) -> Vec<String> {
        let mut behind = vec![];
        for (what, db, question) in databases {
            let rows: i64 = sqlx::query_scalar(*question).fetch_one(db).await.unwrap();
            behind.extend((rows > 0).then(|| format!("{what}: {rows}")));
        }
        if behind.is_empty() {
            let groups = GROUPS.iter().filter(|(group, _)| self.was_started(part_of(group)));
            behind = groups.flat_map(|(group, topic)| self.lag_of(group, topic)).collect();
        }
        behind
    }
}
