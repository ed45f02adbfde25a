//! Which clients may act on the admin port. Reading is open to every client that reaches the port.
//! An action, which is every request other than GET and HEAD, needs one of several named tokens.
//! The name of the token is in the log.
//!
//! Without tokens, actions are accepted only on a loopback address, where only processes of the
//! same machine reach the port. A browser is one of them, and every website that it shows can send
//! requests through it. So a request with an `Origin`, which browsers add to everything but GET and
//! HEAD, needs a token on a loopback address, too.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;

use anyhow::{Context, ensure};
use axum::Router;
use axum::extract::{MatchedPath, Request, State};
use axum::http::{HeaderMap, HeaderValue, Method, StatusCode, header};
use axum::middleware::{self, Next};
use axum::response::{IntoResponse, Response};
use secrecy::{ExposeSecret, SecretString};
use subtle::ConstantTimeEq;

use super::problem::{Kind, problem};
use super::secret::{OptionalSecret, SecretSetting};

const ADMIN_TOKEN_REQUIRED: Kind = Kind::new("admin-token-required", StatusCode::UNAUTHORIZED);
const ADMIN_ACTIONS_DISABLED: Kind = Kind::new("admin-actions-disabled", StatusCode::FORBIDDEN);
const ADMIN_TOKENS_UNUSABLE: Kind = Kind::new("admin-tokens-unusable", StatusCode::SERVICE_UNAVAILABLE);

/// Characters of a token: too many to guess, and few enough for a header.
const TOKEN_LENGTH: std::ops::RangeInclusive<usize> = 32..=512;
const NAME_MAX_LENGTH: usize = 64;
/// The operator's name in the log if no token was needed.
const WITHOUT_TOKEN: &str = "a process of this machine, without a token";

/// The tokens that the service accepts.
#[derive(Clone)]
pub struct AdminTokens;

impl SecretSetting for AdminTokens {
    const NAME: &'static str = "ADMIN_TOKENS";
    const HELP: &'static str = "Tokens for actions on the admin port, one name:token a line; lines that begin with # are \
                                comments. A token has 32 to 512 visible characters. Its name is logged with each action: \
                                name a role or a system. The file is read again for each action. Without tokens, actions \
                                are accepted only if ADMIN_ADDR is a loopback address.";
}

/// The token that a subcommand sends.
#[derive(Clone)]
pub struct AdminToken;

impl SecretSetting for AdminToken {
    const NAME: &'static str = "ADMIN_TOKEN";
    const HELP: &'static str = "A token that the running service accepts (ADMIN_TOKENS), without its name.";
}

/// Decides about actions.
#[derive(Clone)]
pub(crate) enum Guard {
    /// The tokens are in a file, which may change.
    File(PathBuf),
    Tokens(Arc<Tokens>),
    /// Every client is a process of this machine.
    Loopback,
    /// There are no tokens.
    Disabled,
}

impl Guard {
    /// # Errors
    /// The tokens are malformed. The message does not show them.
    pub fn new(tokens: &OptionalSecret<AdminTokens>, admin_addr: SocketAddr) -> anyhow::Result<Self> {
        let Some(text) = tokens.get() else {
            return Ok(if admin_addr.ip().is_loopback() { Self::Loopback } else { Self::Disabled });
        };
        let tokens = Tokens::parse(text.expose())?;
        Ok(OptionalSecret::<AdminTokens>::file().map_or_else(|| Self::Tokens(Arc::new(tokens)), Self::File))
    }

    /// The name of the operator that may act.
    fn operator(&self, headers: &HeaderMap) -> Result<String, Refusal> {
        let tokens = match self {
            Self::Loopback if headers.contains_key(header::ORIGIN) => return Err(Refusal::WebPage),
            Self::Loopback => return Ok(WITHOUT_TOKEN.to_owned()),
            Self::Disabled => return Err(Refusal::Disabled),
            Self::Tokens(tokens) => Arc::clone(tokens),
            Self::File(file) => Arc::new(read(file).map_err(Refusal::Unusable)?),
        };
        let token = bearer(headers).ok_or(Refusal::NoToken)?;
        tokens.name_of(token).map(str::to_owned).ok_or(Refusal::UnknownToken)
    }
}

fn read(file: &PathBuf) -> anyhow::Result<Tokens> {
    let text =
        std::fs::read_to_string(file).with_context(|| format!("cannot read ADMIN_TOKENS_FILE {}", file.display()))?;
    Tokens::parse(&text)
}

/// The token of `Authorization: Bearer`.
fn bearer(headers: &HeaderMap) -> Option<&[u8]> {
    let value = headers.get(header::AUTHORIZATION)?.as_bytes();
    let (scheme, token) = value.split_at_checked("Bearer ".len())?;
    scheme.eq_ignore_ascii_case(b"Bearer ").then_some(token)
}

/// Names and tokens. Two tokens may have the same name, so that one can replace the other.
pub(crate) struct Tokens(Vec<(String, SecretString)>);

impl Tokens {
    /// # Errors
    /// A line is malformed, or there is no token. The message names the line and does not show it.
    fn parse(text: &str) -> anyhow::Result<Self> {
        let mut tokens: Vec<(String, SecretString)> = vec![];
        for (number, line) in (1..).zip(text.lines().map(str::trim)) {
            if line.is_empty() || line.starts_with('#') {
                continue;
            }
            let malformed = || {
                format!(
                    "ADMIN_TOKENS: line {number} is not name:token, where the name has 1 to {NAME_MAX_LENGTH} letters, \
                     digits, '.', '_' and '-', and the token {} to {} visible ASCII characters",
                    TOKEN_LENGTH.start(),
                    TOKEN_LENGTH.end()
                )
            };
            let (name, token) = line.split_once(':').with_context(malformed)?;
            let (name, token) = (name.trim_end(), token.trim_start());
            let in_name = |c: char| c.is_ascii_alphanumeric() || "._-".contains(c);
            let is_name = (1..=NAME_MAX_LENGTH).contains(&name.len()) && name.chars().all(in_name);
            ensure!(is_name && is_token(token), malformed());
            let known = tokens.iter().any(|(_, known)| known.expose_secret() == token);
            ensure!(!known, "ADMIN_TOKENS: the token in line {number} is in an earlier line too: each needs its own");
            tokens.push((name.to_owned(), token.into()));
        }
        ensure!(!tokens.is_empty(), "ADMIN_TOKENS has no line name:token: add one, or remove the setting");
        Ok(Self(tokens))
    }

    /// Compares with every token, and each in constant time: how long an answer takes shows nothing
    /// about a token but its length.
    fn name_of(&self, token: &[u8]) -> Option<&str> {
        let mut found = None;
        for (name, known) in &self.0 {
            if known.expose_secret().as_bytes().ct_eq(token).into() {
                found = Some(name.as_str());
            }
        }
        found
    }
}

/// Whether the text can be a token.
pub(crate) fn is_token(text: &str) -> bool {
    TOKEN_LENGTH.contains(&text.len()) && text.bytes().all(|byte| byte.is_ascii_graphic())
}

/// Why an action is refused.
enum Refusal {
    NoToken,
    UnknownToken,
    Disabled,
    /// A browser has sent the request for a page.
    WebPage,
    Unusable(anyhow::Error),
}

impl IntoResponse for Refusal {
    fn into_response(self) -> Response {
        let required = |detail: &str| {
            let challenge = (header::WWW_AUTHENTICATE, HeaderValue::from_static("Bearer"));
            ([challenge], problem(ADMIN_TOKEN_REQUIRED, detail)).into_response()
        };
        match self {
            Self::NoToken => required(
                "this action needs a token: set ADMIN_TOKEN or ADMIN_TOKEN_FILE, or send Authorization: Bearer",
            ),
            Self::UnknownToken => {
                required("the service does not know this token: compare it with ADMIN_TOKENS of the service")
            }
            Self::Disabled => {
                let detail = "the service has no ADMIN_TOKENS, and its ADMIN_ADDR is not a loopback address: set \
                              ADMIN_TOKENS_FILE and restart it";
                problem(ADMIN_ACTIONS_DISABLED, detail).into_response()
            }
            Self::WebPage => {
                let detail = "the service has no ADMIN_TOKENS, so a web page may not act on it: set ADMIN_TOKENS_FILE and \
                              restart it, or send the request without Origin";
                problem(ADMIN_ACTIONS_DISABLED, detail).into_response()
            }
            Self::Unusable(_) => {
                problem(ADMIN_TOKENS_UNUSABLE, "the service cannot use its ADMIN_TOKENS_FILE; its log says why")
                    .into_response()
            }
        }
    }
}

/// The operator that has sent the request, for handlers of actions.
#[derive(Clone)]
pub(crate) struct Operator(pub String);

/// Adds the guard to all routes of the admin port.
pub(crate) fn guarded(routes: Router, guard: Guard) -> Router {
    routes.layer(middleware::from_fn_with_state(guard, decide))
}

async fn decide(State(guard): State<Guard>, mut request: Request, next: Next) -> Response {
    if matches!(*request.method(), Method::GET | Method::HEAD) {
        return next.run(request).await;
    }
    let route = request.extensions().get::<MatchedPath>().map(|path| path.as_str().to_owned());
    let route = route.as_deref();
    match guard.operator(request.headers()) {
        Ok(operator) => {
            request.extensions_mut().insert(Operator(operator.clone()));
            let answer = next.run(request).await;
            tracing::info!(operator, route, status = answer.status().as_u16(), "action on the admin port");
            answer
        }
        Err(refusal) => {
            let reason = match &refusal {
                Refusal::NoToken => "it has no token".to_owned(),
                Refusal::UnknownToken => "its token is unknown".to_owned(),
                Refusal::Disabled => "there are no ADMIN_TOKENS".to_owned(),
                Refusal::WebPage => "it comes from a web page, and there are no ADMIN_TOKENS".to_owned(),
                Refusal::Unusable(error) => format!("{error:#}"),
            };
            tracing::warn!(route, reason, "refused an action on the admin port");
            refusal.into_response()
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const ONE: &str = "0123456789abcdef0123456789abcdef";
    const TWO: &str = "fedcba9876543210fedcba9876543210";

    #[test]
    fn a_token_has_the_name_of_its_line() {
        let tokens = Tokens::parse(&format!("# operators\n\n  on-call: {ONE}\r\non-call:{TWO}\n")).unwrap();
        assert_eq!(tokens.name_of(ONE.as_bytes()), Some("on-call"));
        assert_eq!(tokens.name_of(TWO.as_bytes()), Some("on-call"));
        for unknown in ["", &ONE[1..], &ONE.to_uppercase(), &format!("{ONE}0"), "on-call"] {
            assert_eq!(tokens.name_of(unknown.as_bytes()), None, "{unknown}");
        }
    }

    #[test]
    fn a_malformed_line_is_named_and_not_shown() {
        for (text, error) in [
            (ONE.to_owned(), "line 1"),
            (format!("# a\nada@example.com:{ONE}"), "line 2"),
            (format!(":{ONE}"), "line 1"),
            (format!("a:{}", &ONE[1..]), "line 1"),
            (format!("a:{ONE}\nb:{}", "x".repeat(513)), "line 2"),
            (format!("a:{ONE} {TWO}"), "line 1"),
            (format!("a:{ONE}\nb:{ONE}"), "line 2 is in an earlier line"),
            ("# nothing\n".to_owned(), "no line"),
        ] {
            let refused = Tokens::parse(&text).err().unwrap().to_string();
            assert!(refused.contains(error) && !refused.contains(&ONE[1..]), "{text}: {refused}");
        }
    }

    #[test]
    fn without_tokens_only_a_loopback_address_accepts_actions() {
        let none = OptionalSecret::none();
        let guard = |addr: &str| Guard::new(&none, addr.parse().unwrap()).unwrap();
        for loopback in ["127.0.0.1:9080", "[::1]:9080"] {
            assert!(guard(loopback).operator(&HeaderMap::new()).is_ok(), "{loopback}");
        }
        let page = HeaderMap::from_iter([(header::ORIGIN, HeaderValue::from_static("http://localhost:9080"))]);
        assert!(matches!(guard("127.0.0.1:9080").operator(&page), Err(Refusal::WebPage)));
        for open in ["0.0.0.0:9080", "[::]:9080", "10.0.0.1:9080"] {
            assert!(matches!(guard(open).operator(&HeaderMap::new()), Err(Refusal::Disabled)), "{open}");
        }
    }
}
