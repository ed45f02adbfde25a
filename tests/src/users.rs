//! The facet `users`: the services' public APIs, as clients call them.

use reqwest::{Client, Method, RequestBuilder, StatusCode};
use serde_json::json;
use topology::{ANALYTICS, CACHE, EMAIL, Service, USER};
use uuid::Uuid;

use crate::http::{Answer, send, send_with_retries};
use crate::processes::{Addresses, ServiceProcess};
use crate::waiting::{eventually, eventually_eq};

/// A client of the four services. A clone calls the same services and can be moved into a task.
#[derive(Clone)]
pub struct Users {
    addresses: Addresses,
    /// The bearer token of every request.
    token: Option<String>,
}

/// An address that no other user has.
pub fn address() -> String {
    format!("user-{}@example.com", Uuid::now_v7().simple())
}

impl Users {
    pub(crate) fn new(addresses: Addresses) -> Self {
        Self { addresses, token: None }
    }

    /// A client that calls this process of its service instead of the first one.
    pub fn at(&self, process: &ServiceProcess) -> Self {
        Self { addresses: self.addresses.with(process), ..self.clone() }
    }

    /// A client that sends this bearer token.
    pub fn bearing(&self, token: &str) -> Self {
        Self { token: Some(token.to_owned()), ..self.clone() }
    }

    /// A request, not yet sent.
    pub fn request(&self, method: Method, service: Service, path: &str) -> RequestBuilder {
        let request = Client::new().request(method, self.url(service, path));
        match &self.token {
            Some(token) => request.bearer_auth(token),
            None => request,
        }
    }

    pub fn url(&self, service: Service, path: &str) -> String {
        format!("{}{path}", self.addresses.url(service))
    }

    pub async fn get(&self, service: Service, path: &str) -> reqwest::Result<Answer> {
        send(self.request(Method::GET, service, path)).await
    }

    /// Registers a new user, with retries, and returns the id.
    pub async fn register(&self) -> Uuid {
        self.register_as(&address()).await
    }

    /// Registers a new user with this address, with retries, and returns the id.
    pub async fn register_as(&self, email: &str) -> Uuid {
        let key = Uuid::now_v7().to_string();
        let answer = send_with_retries(|| self.registration(email, Some(&key))).await;
        assert_eq!(answer.status, StatusCode::CREATED, "{answer:?}");
        answer.id()
    }

    /// Registers that many new users, one after another, since many at once need many connections
    /// at once.
    pub async fn register_many(&self, users: usize) -> Vec<Uuid> {
        let mut ids = vec![];
        for _ in 0..users {
            ids.push(self.register().await);
        }
        ids
    }

    /// `POST /users`, with an `Idempotency-Key` if one is given.
    pub async fn post(&self, email: &str, key: Option<&str>) -> reqwest::Result<Answer> {
        send(self.registration(email, key)).await
    }

    /// `POST /users`, not yet sent.
    pub fn registration(&self, email: &str, key: Option<&str>) -> RequestBuilder {
        let body = json!({ "email": email, "display_name": "Ada Lovelace" });
        let mut request = self.request(Method::POST, USER, "/users").json(&body);
        if let Some(key) = key {
            request = request.header("idempotency-key", key);
        }
        request
    }

    /// `PATCH /users/{id}`.
    pub async fn rename(&self, id: Uuid, display_name: &str) -> reqwest::Result<Answer> {
        send(self.renaming(id, display_name)).await
    }

    /// `PATCH /users/{id}`, not yet sent.
    pub fn renaming(&self, id: Uuid, display_name: &str) -> RequestBuilder {
        let body = json!({ "display_name": display_name });
        self.request(Method::PATCH, USER, &format!("/users/{id}")).json(&body)
    }

    /// `PUT /users/{id}/email`.
    pub async fn change_email(&self, id: Uuid, email: &str) -> reqwest::Result<Answer> {
        send(self.change_of_email(id, email)).await
    }

    /// `PUT /users/{id}/email`, not yet sent.
    pub fn change_of_email(&self, id: Uuid, email: &str) -> RequestBuilder {
        self.request(Method::PUT, USER, &format!("/users/{id}/email")).json(&json!({ "email": email }))
    }

    /// `DELETE /users/{id}`.
    pub async fn erase(&self, id: Uuid) -> reqwest::Result<Answer> {
        send(self.erasure(id)).await
    }

    /// `DELETE /users/{id}`, not yet sent.
    pub fn erasure(&self, id: Uuid) -> RequestBuilder {
        self.request(Method::DELETE, USER, &format!("/users/{id}"))
    }

    /// `GET /profiles/{id}` of the cache.
    pub async fn profile(&self, id: Uuid, min_version: Option<i64>) -> reqwest::Result<Answer> {
        let query = min_version.map(|version| format!("?min_version={version}")).unwrap_or_default();
        self.get(CACHE, &format!("/profiles/{id}{query}")).await
    }

    /// The version of the user that the cache returns, or the status if it returns none.
    pub async fn cached_version(&self, id: Uuid) -> Result<i64, StatusCode> {
        match self.profile(id, None).await {
            Ok(answer) if answer.status == StatusCode::OK => Ok(answer.version()),
            Ok(answer) => Err(answer.status),
            Err(_) => Err(StatusCode::BAD_GATEWAY),
        }
    }

    /// Waits until the cache returns this version of the user or a later one.
    pub async fn until_cached(&self, id: Uuid, version: i64) -> Answer {
        eventually(&format!("the cache has version {version}"), async || {
            self.profile(id, Some(version)).await.ok().filter(|answer| answer.status == StatusCode::OK)
        })
        .await
    }

    /// The states of a user's deliveries, as the email service lists them.
    pub async fn deliveries(&self, id: Uuid) -> Vec<String> {
        let Ok(answer) = self.get(EMAIL, &format!("/users/{id}/emails")).await else { return vec![] };
        let deliveries = answer.body.as_array().cloned().unwrap_or_default();
        deliveries.iter().map(|delivery| delivery["status"].as_str().unwrap_or_default().to_owned()).collect()
    }

    /// Waits until the user has exactly one delivery and it is in this state.
    pub async fn until_delivery_is(&self, id: Uuid, state: &str) {
        eventually_eq("the state of the delivery", vec![state.to_owned()], async || self.deliveries(id).await).await;
    }

    /// Waits until the user's welcome mail is sent.
    pub async fn until_mailed(&self, id: Uuid) {
        self.until_delivery_is(id, "sent").await;
    }

    /// Waits until the user's deliveries have ended, and there is one.
    pub async fn until_delivery_ended(&self, id: Uuid) {
        eventually("the delivery has ended", async || {
            let states = self.deliveries(id).await;
            let ended = |state: &String| ["sent", "failed", "cancelled"].contains(&state.as_str());
            (!states.is_empty() && states.iter().all(ended)).then_some(())
        })
        .await;
    }

    /// The analytics service's funnel: `(registered, mailed)`. `(-1, -1)` if there is no answer.
    pub async fn funnel(&self) -> (i64, i64) {
        let Ok(answer) = self.get(ANALYTICS, "/funnel").await else { return (-1, -1) };
        (answer.body["registered"].as_i64().unwrap_or(-1), answer.body["mailed"].as_i64().unwrap_or(-1))
    }

    /// The sum of the analytics service's `GET /registrations`. `None` if there is no answer.
    pub async fn registrations(&self) -> Option<i64> {
        let answer = self.get(ANALYTICS, "/registrations?bucket=day").await.ok()?;
        answer.body.as_array()?.iter().map(|bucket| bucket["registrations"].as_i64()).sum()
    }

    /// Waits until the analytics service has counted exactly these registrations and mails.
    pub async fn until_counted(&self, registered: i64, mailed: i64) {
        let expected = (Some(registered), registered, mailed);
        eventually_eq("registrations, registered and mailed in the funnel", expected, async || {
            let (in_funnel, mailed) = self.funnel().await;
            (self.registrations().await, in_funnel, mailed)
        })
        .await;
    }
}
