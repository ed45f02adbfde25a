//! The control port of `cargo xtask up`, through which the Laboratory acts. Its token stays in this
//! process.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use reqwest::{Client, RequestBuilder};
use serde::Deserialize;
use serde::de::DeserializeOwned;
use serde_json::{Value, json};
use shared::messaging::Coordinates;
use shared::platform::secret::Secret;

use super::fates::Received;
use crate::config::ControlToken;

/// How long an order may take. A stop of Kafka takes up to 20 s.
const ORDER_LIMIT: Duration = Duration::from_secs(45);
/// How long a question may take.
const ANSWER_LIMIT: Duration = Duration::from_secs(1);

#[derive(Clone)]
pub struct Control {
    client: Client,
    url: String,
    token: Secret<ControlToken>,
}

/// The state of processes, components and mail server, as the control port reports it.
#[derive(Clone, Debug, Default, PartialEq, Deserialize)]
pub struct State {
    pub processes: Vec<ProcessState>,
    pub components: Vec<ComponentState>,
    pub mail: String,
}

#[derive(Clone, Debug, PartialEq, Deserialize)]
pub struct ProcessState {
    pub service: String,
    pub name: String,
    pub admin: u16,
    pub is_further: bool,
    pub condition: Condition,
}

#[derive(Clone, Debug, PartialEq, Deserialize)]
pub struct ComponentState {
    pub name: String,
    pub condition: Condition,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Condition {
    Runs,
    Frozen,
    Down,
}

impl Control {
    pub fn new(address: SocketAddr, token: Secret<ControlToken>) -> Result<Self> {
        let client = Client::builder().no_proxy().build()?;
        Ok(Self { client, url: format!("http://{address}"), token })
    }

    pub async fn state(&self) -> Result<State> {
        self.ask(self.client.get(format!("{}/state", self.url)).timeout(ANSWER_LIMIT)).await
    }

    /// The mails that each recipient got.
    pub async fn mails(&self) -> Result<BTreeMap<String, Received>> {
        self.ask(self.client.get(format!("{}/mails", self.url)).timeout(ANSWER_LIMIT)).await
    }

    /// Does something with a process, a component or the mail server, and returns what was done.
    pub async fn order(&self, act: &str, target: &str) -> Result<String> {
        self.post(json!({ "act": act, "target": target })).await
    }

    /// Writes a record to its topic again.
    pub async fn again(&self, record: &Coordinates) -> Result<String> {
        let Coordinates { topic, partition, offset } = record;
        self.post(json!({ "act": "again", "topic": topic, "partition": partition, "offset": offset })).await
    }

    async fn post(&self, body: Value) -> Result<String> {
        let request = self.client.post(format!("{}/orders", self.url)).timeout(ORDER_LIMIT);
        let answer: Value = self.ask(request.json(&body)).await?;
        Ok(answer["done"].as_str().unwrap_or("done").to_owned())
    }

    async fn ask<T: DeserializeOwned>(&self, request: RequestBuilder) -> Result<T> {
        let answer = request.bearer_auth(self.token.expose()).send().await;
        let answer = answer.context("the control port does not answer: does `cargo xtask up` still run?")?;
        let status = answer.status();
        if status.is_success() {
            return Ok(answer.json().await?);
        }
        let body: Value = answer.json().await.unwrap_or_default();
        bail!("{}", body["error"].as_str().map_or(status.to_string(), str::to_owned))
    }
}
