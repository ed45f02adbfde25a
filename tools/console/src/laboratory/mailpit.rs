//! Mailpit, the mail server of the compose files: its list of mails, and its chaos, which refuses
//! mails.

use std::collections::BTreeMap;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use reqwest::{Client, Url};
use serde::Deserialize;
use serde_json::json;

use super::fates::Received;

const ANSWER_LIMIT: Duration = Duration::from_secs(5);
/// How many of the newest mails are counted. The compose file lets Mailpit keep the same number.
const MAILS: usize = 2_000;
/// SMTP code with which Mailpit refuses the sender of each mail: "try again later".
const REFUSAL: u16 = 451;

#[derive(Clone)]
pub struct Mailpit {
    client: Client,
    url: String,
}

#[derive(Deserialize)]
struct Messages {
    messages: Vec<Message>,
}

#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Message {
    to: Option<Vec<Address>>,
}

#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Address {
    address: String,
}

impl Mailpit {
    pub fn new(url: &str) -> Result<Self> {
        let parsed = Url::parse(url).context("MAILPIT_URL is not a URL")?;
        ensure!(parsed.scheme() == "http", "MAILPIT_URL must begin with http://");
        let client = Client::builder().no_proxy().timeout(ANSWER_LIMIT).build()?;
        Ok(Self { client, url: url.trim_end_matches('/').to_owned() })
    }

    /// Lets Mailpit refuse mails, or accept them again.
    pub async fn set(&self, target: &str) -> Result<String> {
        let probability = match target {
            "normal" => 0,
            "refusing" => 100,
            _ => bail!("target: Mailpit can be normal or refusing"),
        };
        let trigger = json!({ "ErrorCode": REFUSAL, "Probability": probability });
        let body = json!({ "Sender": trigger });
        let answer = self.client.put(format!("{}/api/v1/chaos", self.url)).json(&body).send().await;
        let status = answer.context("Mailpit does not answer")?.status();
        ensure!(status.is_success(), "Mailpit answers {status}: does it run with MP_ENABLE_CHAOS=true?");
        Ok(format!("the mail server is {target}"))
    }

    /// The mails of each recipient. Mailpit always answers, so `unanswered` is 0.
    pub async fn mails(&self) -> Result<BTreeMap<String, Received>> {
        let answer = self.client.get(format!("{}/api/v1/messages?limit={MAILS}", self.url)).send().await?;
        Ok(counted(answer.error_for_status()?.json().await?))
    }
}

fn counted(Messages { messages }: Messages) -> BTreeMap<String, Received> {
    let mut received: BTreeMap<String, Received> = BTreeMap::new();
    for address in messages.into_iter().filter_map(|message| message.to).flatten() {
        received.entry(address.address).or_default().mails += 1;
    }
    received
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mails_are_counted_by_recipient() {
        let answer = r#"{"total":3,"unread":3,"messages":[{"ID":"a","To":[{"Name":"","Address":"a@test"}]},
            {"ID":"b","To":[{"Name":"B","Address":"b@test"}]},{"ID":"c","To":[{"Name":"","Address":"a@test"}]},{"ID":"d","To":null}]}"#;
        let received = counted(serde_json::from_str(answer).unwrap());
        assert_eq!((received["a@test"].mails, received["b@test"].mails, received.len()), (2, 1, 2));
    }
}
