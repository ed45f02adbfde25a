//! The public APIs of the services, about one user. Nothing that is sent or answered is kept.

use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, anyhow};
use reqwest::{Client, Method, RequestBuilder};
use serde::Deserialize;
use serde_json::json;
use topology::{EMAIL, Service, USER};
use uuid::Uuid;

use super::operations::answer;
use crate::config::ServiceAddress;

/// How long a service may take to answer a command.
const ANSWER_LIMIT: Duration = Duration::from_secs(5);
/// How long it may take to answer a query. A service that is frozen must not delay a story.
const LOOK_LIMIT: Duration = Duration::from_secs(1);

/// Asks public APIs. Clones share connections.
#[derive(Clone)]
pub struct Users {
    client: Client,
    addresses: Arc<[ServiceAddress]>,
}

#[derive(Deserialize)]
struct Registered {
    id: Uuid,
}

#[derive(Deserialize)]
struct Delivery {
    status: String,
}

impl Users {
    pub fn new(addresses: Vec<ServiceAddress>) -> anyhow::Result<Self> {
        let client = Client::builder().timeout(ANSWER_LIMIT).no_proxy().build()?;
        Ok(Self { client, addresses: addresses.into() })
    }

    /// Registers a user. With the same key it registers one, however often it is called.
    ///
    /// # Errors
    /// The service does not answer, or refuses.
    pub async fn register(&self, email: &str, display_name: &str, key: Uuid, token: &str) -> anyhow::Result<Uuid> {
        let request = self.request(Method::POST, USER, "/users", token)?.header("idempotency-key", key.to_string());
        let body = json!({ "email": email, "display_name": display_name });
        let Registered { id } = serde_json::from_str(&answer(request.json(&body)).await?)?;
        Ok(id)
    }

    /// Erases a user. A repetition gets the answer of the first request.
    ///
    /// # Errors
    /// The service does not answer, or refuses.
    pub async fn erase(&self, user: Uuid, token: &str) -> anyhow::Result<()> {
        let request = self.request(Method::DELETE, USER, &format!("/users/{user}"), token)?;
        answer(request.header("idempotency-key", format!("console-{user}"))).await.map(drop)
    }

    /// The status with which a service answers a GET. Its body is not read.
    ///
    /// # Errors
    /// The service does not answer.
    pub async fn status(&self, service: Service, path: &str) -> anyhow::Result<u16> {
        let answer = self.request(Method::GET, service, path, "")?.timeout(LOOK_LIMIT).send().await;
        Ok(answer.map_err(|_| anyhow!("does not answer"))?.status().as_u16())
    }

    /// The states of the mails to a user.
    ///
    /// # Errors
    /// The service does not answer, or refuses.
    pub async fn deliveries(&self, user: Uuid) -> anyhow::Result<Vec<String>> {
        let request = self.request(Method::GET, EMAIL, &format!("/users/{user}/emails"), "")?;
        let deliveries: Vec<Delivery> = serde_json::from_str(&answer(request.timeout(LOOK_LIMIT)).await?)?;
        Ok(deliveries.into_iter().map(|delivery| delivery.status).collect())
    }

    fn request(&self, method: Method, service: Service, path: &str, token: &str) -> anyhow::Result<RequestBuilder> {
        let address = self.addresses.iter().find(|address| address.service == service.name);
        let ServiceAddress { host, port, .. } = address.context("the service has no public address")?;
        let request = self.client.request(method, format!("http://{host}:{port}{path}"));
        Ok(if token.is_empty() { request } else { request.bearer_auth(token) })
    }
}
