//! HTTP requests and their answers.

use reqwest::{RequestBuilder, StatusCode};
use serde_json::Value;
use uuid::Uuid;

use crate::waiting::eventually;

/// An answer. The body is null if it is not JSON.
#[derive(Debug, Clone, PartialEq)]
pub struct Answer {
    pub status: StatusCode,
    pub etag: Option<String>,
    pub content_type: Option<String>,
    pub body: Value,
}

impl Answer {
    pub fn id(&self) -> Uuid {
        self.body["id"].as_str().and_then(|id| id.parse().ok()).unwrap_or_else(|| panic!("no id in {self:?}"))
    }

    pub fn version(&self) -> i64 {
        self.body["version"].as_i64().unwrap_or_else(|| panic!("no version in {self:?}"))
    }
}

/// Sends a request. An error means that there was no answer: the request may have taken effect or
/// not.
pub async fn send(request: RequestBuilder) -> reqwest::Result<Answer> {
    let response = request.send().await?;
    let header = |name: &str| response.headers().get(name).map(|value| value.to_str().unwrap().to_owned());
    let status = response.status();
    let etag = header("etag");
    let content_type = header("content-type");
    let body = serde_json::from_slice(&response.bytes().await?).unwrap_or(Value::Null);
    Ok(Answer { status, etag, content_type, body })
}

/// Sends a request until the answer is not a temporary refusal: 503, or 409 with the advice to
/// retry. A service answers so while it starts, and when it has too many requests for a busy
/// machine.
pub async fn send_with_retries(request: impl Fn() -> RequestBuilder) -> Answer {
    eventually("an answer other than a temporary refusal", async || {
        let answer = send(request()).await.unwrap();
        let is_busy = answer.status == StatusCode::CONFLICT && answer.body["detail"].to_string().contains("retry");
        let is_refusal = answer.status == StatusCode::SERVICE_UNAVAILABLE || is_busy;
        (!is_refusal).then_some(answer)
    })
    .await
}
