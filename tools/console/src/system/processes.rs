//! Asks one process.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::time::Duration;

use anyhow::{Context, ensure};
use reqwest::{Client, header};
use serde::Deserialize;

use super::openmetrics::Samples;

/// How long a process may take to answer. A process that is frozen must not delay the others.
const ANSWER_LIMIT: Duration = Duration::from_secs(1);
/// Bytes of an answer. A page of metrics has about 50 KB.
const SIZE_LIMIT: usize = 2 * 1024 * 1024;

/// One process of a service, and its answer.
#[derive(Clone, Debug)]
pub struct Process {
    pub service: String,
    pub address: SocketAddr,
    /// `None`: it does not answer.
    pub answer: Option<Answer>,
}

#[derive(Clone, Debug)]
pub struct Answer {
    /// What the process waits for, by component.
    pub waiting_for: BTreeMap<String, String>,
    pub metrics: Samples,
}

#[derive(Deserialize)]
struct Status {
    waiting_for: BTreeMap<String, String>,
}

/// A client for admin ports.
pub fn client() -> anyhow::Result<Client> {
    Ok(Client::builder().timeout(ANSWER_LIMIT).no_proxy().build()?)
}

/// Asks the process at `address`.
pub async fn ask(client: &Client, service: String, address: SocketAddr) -> Process {
    let answer = answer(client, address).await;
    let answer =
        answer.inspect_err(|error| tracing::debug!(service, %address, error = %format!("{error:#}"), "no answer"));
    Process { service, address, answer: answer.ok() }
}

async fn answer(client: &Client, address: SocketAddr) -> anyhow::Result<Answer> {
    let (status, metrics) = tokio::try_join!(
        get(client, format!("http://{address}/status")),
        get(client, format!("http://{address}/metrics"))
    )?;
    let Status { waiting_for } = serde_json::from_slice(&status).context("/status is not that of a Waybill service")?;
    Ok(Answer { waiting_for, metrics: Samples::parse(&String::from_utf8_lossy(&metrics)) })
}

/// Requests a page and reads at most [`SIZE_LIMIT`] of it. `/status` answers 503 if the process
/// waits for something.
async fn get(client: &Client, url: String) -> anyhow::Result<Vec<u8>> {
    let mut answer = client.get(url).header(header::ACCEPT, "application/json").send().await?;
    let mut body = vec![];
    while let Some(chunk) = answer.chunk().await? {
        ensure!(body.len() + chunk.len() <= SIZE_LIMIT, "the answer is too long");
        body.extend_from_slice(&chunk);
    }
    Ok(body)
}
