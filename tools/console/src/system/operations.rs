//! Dead letters and the actions of operators, through the admin ports of the services. The console
//! does nothing by itself: a service checks the operator's token, records the action, and does it.

use std::net::SocketAddr;
use std::time::Duration;

use anyhow::{Context, bail, ensure};
use reqwest::{Client, RequestBuilder};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

/// How long a service may take to read a page of letters, or to act on one letter.
const ANSWER_LIMIT: Duration = Duration::from_secs(30);
/// Bytes of an answer. A record has at most 1 MiB, and escapes in JSON may make it several times
/// longer.
const SIZE_LIMIT: usize = 8 * 1024 * 1024;

/// A page of the open letters of a group, as the admin port lists them.
#[derive(Debug, Deserialize)]
pub struct Page {
    pub letters: Vec<Letter>,
    /// The cursor of the next page.
    pub next: Option<String>,
}

#[derive(Debug, Deserialize)]
pub struct Letter {
    pub group: String,
    pub coordinates: String,
    pub key: Option<String>,
    #[serde(rename = "type")]
    pub kind: Option<String>,
    pub reason: String,
    pub attempts: u32,
    pub parked: bool,
    pub age_seconds: Option<i64>,
}

/// What an operator did.
#[derive(Debug, Deserialize)]
pub struct Acted {
    pub action: String,
    pub target: String,
    pub operator: String,
    pub reason: Option<String>,
    pub begun: Option<String>,
    pub outcome: Option<String>,
    pub detail: Option<String>,
}

#[derive(Deserialize)]
struct Actions {
    actions: Vec<Acted>,
}

/// What to do with a letter.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Act {
    Show,
    Redrive,
    Discard,
}

/// An action that an operator requests.
pub struct Order<'a> {
    pub act: Act,
    pub group: &'a str,
    pub coordinates: &'a str,
    pub reason: &'a str,
    /// The operator's token. Empty: the admin port asks for none.
    pub token: &'a str,
}

/// An operator wants to see a record.
pub struct Look<'a> {
    /// With the name of the topic on the broker.
    pub coordinates: &'a str,
    pub reason: &'a str,
    /// As for an [`Order`].
    pub token: &'a str,
}

/// Asks admin ports. Clones share connections.
#[derive(Clone)]
pub struct Operations(Client);

impl Operations {
    pub fn new() -> anyhow::Result<Self> {
        Ok(Self(Client::builder().timeout(ANSWER_LIMIT).no_proxy().build()?))
    }

    /// A page of the letters of a group.
    ///
    /// # Errors
    /// The service does not answer, or refuses.
    pub async fn letters(&self, address: SocketAddr, query: &[(&str, &str)]) -> anyhow::Result<Page> {
        let given: Vec<_> = query.iter().filter(|(_, value)| !value.is_empty()).collect();
        let query = serde_urlencoded::to_string(given)?;
        let request = self.0.get(format!("http://{address}/dead-letters?{query}"));
        Ok(serde_json::from_str(&answer(request).await?)?)
    }

    /// The newest actions on any service.
    ///
    /// # Errors
    /// The service does not answer, or refuses.
    pub async fn actions(&self, address: SocketAddr, limit: usize) -> anyhow::Result<Vec<Acted>> {
        let request = self.0.get(format!("http://{address}/actions?limit={limit}"));
        let Actions { actions } = serde_json::from_str(&answer(request).await?)?;
        Ok(actions)
    }

    /// Does what the operator asks for, and returns what the service answers: JSON, or lines of
    /// JSON.
    ///
    /// # Errors
    /// The service refuses, or does not answer. If it does not answer, it may still have acted: see
    /// the list of actions.
    pub async fn act(&self, address: SocketAddr, order: &Order<'_>) -> anyhow::Result<String> {
        let Order { act, group, coordinates, reason, token } = order;
        let (path, body) = match act {
            Act::Show => ("show", json!({ "group": group, "coordinates": coordinates, "reason": reason })),
            Act::Redrive => ("redrive", json!({ "group": group, "coordinates": [coordinates], "reason": reason })),
            Act::Discard => ("discard", json!({ "group": group, "coordinates": coordinates, "reason": reason })),
        };
        self.post(address, &format!("/dead-letters/{path}"), token, &body).await
    }

    /// The name of a token.
    ///
    /// # Errors
    /// The service does not know the token, or does not answer.
    pub async fn operator(&self, address: SocketAddr, token: &str) -> anyhow::Result<String> {
        #[derive(Deserialize)]
        struct Named {
            operator: String,
        }
        let answer = self.post(address, "/operator", token, &json!({})).await?;
        Ok(serde_json::from_str::<Named>(&answer)?.operator)
    }

    /// Asks for a record with its value. The service records who has seen it, and why.
    ///
    /// # Errors
    /// As for [`Operations::act`].
    pub async fn show_record(&self, address: SocketAddr, look: &Look<'_>) -> anyhow::Result<String> {
        let Look { coordinates, reason, token } = look;
        let body = json!({ "coordinates": coordinates, "reason": reason });
        self.post(address, "/records/show", token, &body).await
    }

    async fn post(&self, address: SocketAddr, path: &str, token: &str, body: &Value) -> anyhow::Result<String> {
        let mut request = self.0.post(format!("http://{address}{path}")).json(body);
        if !token.is_empty() {
            request = request.bearer_auth(token);
        }
        answer(request).await
    }
}

/// The body of a successful answer. A refusal is a problem document, whose detail becomes the
/// error.
pub(super) async fn answer(request: RequestBuilder) -> anyhow::Result<String> {
    let mut answer = request.send().await.context("the service does not answer")?;
    let status = answer.status();
    let mut body = vec![];
    while let Some(chunk) = answer.chunk().await? {
        ensure!(body.len() + chunk.len() <= SIZE_LIMIT, "the answer is too long");
        body.extend_from_slice(&chunk);
    }
    let body = String::from_utf8_lossy(&body).into_owned();
    if !status.is_success() {
        let problem: Option<Value> = serde_json::from_str(&body).ok();
        let detail = problem.as_ref().and_then(|problem| problem["detail"].as_str()).unwrap_or("no reason given");
        bail!("the service refuses ({status}): {detail}");
    }
    Ok(body)
}
