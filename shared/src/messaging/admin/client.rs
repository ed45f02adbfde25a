//! How the subcommands ask the running service.

use std::net::SocketAddr;
use std::time::Duration;

use anyhow::{Context, bail, ensure};
use clap::Args;
use percent_encoding::{NON_ALPHANUMERIC, utf8_percent_encode};
use serde::de::DeserializeOwned;
use serde_json::Value;
use tokio::io::{AsyncBufReadExt, BufReader};
use tokio::time::timeout;

use crate::platform::admin::{AdminToken, is_token};
use crate::platform::health;
use crate::platform::secret::{OptionalSecret, Secret};

/// Longer than a request usually waits for Kafka and for a consumer.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(60);
/// How long an answer of several lines may pause. The service sends one each second.
const LINE_TIMEOUT: Duration = Duration::from_secs(30);

/// What every subcommand needs that acts.
#[derive(Args, Clone, Debug)]
pub struct Token {
    #[command(flatten)]
    token: OptionalSecret<AdminToken>,
}

impl Token {
    /// The header line, or nothing.
    fn header(&self) -> anyhow::Result<String> {
        let Some(token) = self.token.get().map(Secret::expose) else { return Ok(String::new()) };
        ensure!(is_token(token), "ADMIN_TOKEN is not a token: it has 32 to 512 visible ASCII characters");
        Ok(format!("authorization: Bearer {token}\r\n"))
    }
}

/// # Errors
/// The service does not answer, or not with 200. The message has its answer.
pub async fn get<T: DeserializeOwned>(admin_addr: SocketAddr, path: &str) -> anyhow::Result<T> {
    let answer = health::ask(admin_addr, "GET", path, "", None, ANSWER_TIMEOUT).await?;
    serde_json::from_str(&success(answer)?).context("the service answered in an unknown form: is it of this release?")
}

/// Sends an action, and returns the body of the answer.
///
/// # Errors
/// The token is malformed, or as for [`get`].
pub async fn act(admin_addr: SocketAddr, path: &str, token: &Token, body: &Value) -> anyhow::Result<String> {
    let header = token.header()?;
    success(health::ask(admin_addr, "POST", path, &header, Some(body), ANSWER_TIMEOUT).await?)
}

/// As [`act`], for an answer of several lines. Calls `on_line` with each.
///
/// # Errors
/// As for [`act`]; the service sends no line in time.
pub async fn act_in_lines(
    admin_addr: SocketAddr,
    path: &str,
    token: &Token,
    body: &Value,
    mut on_line: impl FnMut(&str) -> anyhow::Result<()>,
) -> anyhow::Result<()> {
    let header = token.header()?;
    let stream = health::send(admin_addr, "POST", path, &header, Some(body), ANSWER_TIMEOUT).await?;
    let mut lines = BufReader::new(stream).lines();
    let mut next = async |limit| {
        let line = timeout(limit, lines.next_line()).await;
        line.with_context(|| format!("the service has sent nothing for {limit:?}; it may continue: see `actions`"))?
            .context("the connection to the service was lost; it may continue: see `actions`")
    };
    let head = next(ANSWER_TIMEOUT).await?.unwrap_or_default();
    let status = head.split(' ').nth(1).and_then(|status| status.parse::<u16>().ok());
    let status = status.with_context(|| format!("{admin_addr} did not answer with HTTP: check ADMIN_ADDR"))?;
    while next(LINE_TIMEOUT).await?.is_some_and(|header| !header.is_empty()) {}
    if status != 200 {
        let mut body = String::new();
        while let Some(line) = next(LINE_TIMEOUT).await? {
            body.push_str(&line);
        }
        bail!("the service answered {status}: {body}");
    }
    while let Some(line) = next(LINE_TIMEOUT).await? {
        on_line(&line)?;
    }
    Ok(())
}

fn success((status, body): (u16, String)) -> anyhow::Result<String> {
    ensure!(status == 200, "the service answered {status}: {body}");
    Ok(body)
}

/// A query string of the parameters that have a value.
pub fn query(parameters: &[(&str, Option<String>)]) -> String {
    let given = parameters.iter().filter_map(|(name, value)| Some((name, value.as_ref()?)));
    let pairs: Vec<String> =
        given.map(|(name, value)| format!("{name}={}", utf8_percent_encode(value, NON_ALPHANUMERIC))).collect();
    pairs.join("&")
}

/// The text without characters that could change the output of a terminal.
pub fn printable(text: &str) -> String {
    text.chars().map(|c| if c.is_control() { '\u{fffd}' } else { c }).collect()
}

/// Prints an answer, indented.
///
/// # Errors
/// The answer is not JSON.
#[expect(clippy::print_stdout, reason = "the output of the subcommands")]
pub fn print_json(answer: &str) -> anyhow::Result<()> {
    let answer: Value = serde_json::from_str(answer).context("the service answered in an unknown form")?;
    // JSON escapes most control characters, but not those above 0x7f.
    for line in serde_json::to_string_pretty(&answer)?.lines() {
        println!("{}", printable(line));
    }
    Ok(())
}

/// Aligns all columns but the last, which may be long.
pub fn aligned<const COLUMNS: usize>(rows: &[[String; COLUMNS]]) -> String {
    let width = |column: usize| rows.iter().map(|row| row[column].chars().count()).max().unwrap_or(0);
    let widths: Vec<usize> = (0..COLUMNS - 1).map(width).collect();
    let mut text = String::new();
    for row in rows {
        for (column, width) in row.iter().zip(&widths) {
            text.push_str(&format!("{column:width$}  "));
        }
        text.push_str(&row[COLUMNS - 1]);
        text.push('\n');
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_query_has_the_given_parameters_encoded() {
        let parameters =
            [("reason_contains", Some("a b&c".to_owned())), ("limit", None), ("cursor", Some("x:1".to_owned()))];
        assert_eq!(query(&parameters), "reason_contains=a%20b%26c&cursor=x%3A1");
    }

    #[test]
    fn control_characters_do_not_reach_the_terminal() {
        assert_eq!(printable("a\u{1b}[2J\n\u{9b}b"), "a\u{fffd}[2J\u{fffd}\u{fffd}b");
    }
}
