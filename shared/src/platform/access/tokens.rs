//! Bearer tokens (RFC 6750): JSON Web Tokens that an identity provider has signed.

use std::path::PathBuf;

use anyhow::{Context, ensure};
use axum::http::{HeaderMap, HeaderName, HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use clap::Args;
use clap::builder::NonEmptyStringValueParser;
use hmac::{Hmac, KeyInit, Mac};
use jsonwebtoken::errors::ErrorKind;
use jsonwebtoken::{Validation, decode, decode_header};
use serde::Deserialize;
use sha2::Sha256;
use tokio::time::Duration;
use uuid::Uuid;

use super::caller::Principal;
use super::keys::{self, Found, Key, Keys, Source};
use super::signatures;
use crate::platform::fetch::Remote;
use crate::platform::health::Health;
use crate::platform::problem::{Kind, problem, retry_later};
use crate::platform::secret::{OptionalSecret, SecretSetting};
use crate::platform::settings::number;
use crate::platform::tls;

const NO_TOKEN: Kind = Kind::new("no-token", StatusCode::UNAUTHORIZED);
const INVALID_TOKEN: Kind = Kind::new("invalid-token", StatusCode::UNAUTHORIZED);
const TOKENS_UNCHECKED: Kind = Kind::new("tokens-unchecked", StatusCode::SERVICE_UNAVAILABLE);

/// The role of administrators, in the claim `roles` (RFC 9068 §2.2.3.1).
const ADMIN: &str = "waybill:admin";
/// How much the clocks of the identity provider and of this machine may differ, in seconds.
const LEEWAY: u64 = 30;

/// Whose tokens the public routes require. Without these settings they require none.
#[derive(Args, Clone, Debug)]
pub struct AuthConfig {
    /// The file with the public keys of the identity provider, as a JWK set. With this or with
    /// AUTH_JWKS_URL, each request to the public port needs a bearer token: a JWT signed with
    /// RS256, ES256 or EdDSA. The bearer owns the users that it registers. With the role
    /// `waybill:admin` in the claim `roles`, a list of texts, it may do everything. Without these
    /// two settings any caller may.
    #[arg(long, env)]
    auth_jwks_file: Option<PathBuf>,
    /// The URL of the public keys, often https://…/.well-known/jwks.json.
    #[arg(long, env, value_parser = NonEmptyStringValueParser::new())]
    auth_jwks_url: Option<String>,
    /// A file with the certificates of the authorities that may sign the certificate of
    /// AUTH_JWKS_URL, in PEM format. Default: the well-known public ones.
    #[arg(long, env)]
    auth_ca_file: Option<PathBuf>,
    /// How often the public keys are read again, in seconds. A key that was removed is accepted
    /// until then. They are also read when a token names an unknown key.
    #[arg(long, env, default_value_t = 300, value_parser = number::<u64>(1..=86_400))]
    auth_jwks_refresh_s: u64,
    /// The issuer of the tokens: the claim `iss`.
    #[arg(long, env, value_parser = NonEmptyStringValueParser::new())]
    auth_issuer: Option<String>,
    /// The name of this system in the tokens: the claim `aud` must contain it.
    #[arg(long, env, value_parser = NonEmptyStringValueParser::new())]
    auth_audience: Option<String>,
    #[command(flatten)]
    auth_principal_secret: OptionalSecret<PrincipalSecret>,
}

#[derive(Clone)]
struct PrincipalSecret;

impl SecretSetting for PrincipalSecret {
    const NAME: &'static str = "AUTH_PRINCIPAL_SECRET";
    const HELP: &'static str = "The key of the hashes that stand for callers: at least 32 random characters, the same in \
                                every service. Never change it: callers would lose access to what they own.";
}

impl AuthConfig {
    /// # Errors
    /// Some of the settings are missing: the service must not run without a check that the operator
    /// wants.
    pub(crate) fn check(&self) -> anyhow::Result<()> {
        ensure!(
            self.auth_jwks_file.is_none() || self.auth_jwks_url.is_none(),
            "both AUTH_JWKS_FILE and AUTH_JWKS_URL are set: remove one of them"
        );
        let has_keys = self.auth_jwks_file.is_some() || self.auth_jwks_url.is_some();
        let others = [
            ("AUTH_ISSUER", self.auth_issuer.is_some()),
            ("AUTH_AUDIENCE", self.auth_audience.is_some()),
            ("AUTH_PRINCIPAL_SECRET", self.auth_principal_secret.get().is_some()),
        ];
        for (name, is_set) in others {
            ensure!(
                !is_set || has_keys,
                "{name} has no effect without AUTH_JWKS_FILE or AUTH_JWKS_URL: set one of them"
            );
            ensure!(is_set || !has_keys, "the check of tokens needs {name}");
        }
        ensure!(
            self.auth_ca_file.is_none() || self.auth_jwks_url.is_some(),
            "AUTH_CA_FILE has no effect without AUTH_JWKS_URL"
        );
        Ok(())
    }

    /// `None`: the public routes require no tokens.
    fn source(&self) -> anyhow::Result<Option<Source>> {
        if let Some(file) = &self.auth_jwks_file {
            return Ok(Some(Source::File(file.clone())));
        }
        let Some(url) = &self.auth_jwks_url else { return Ok(None) };
        let tls = || tls::client("AUTH_CA_FILE", self.auth_ca_file.as_deref());
        Ok(Some(Source::Url(Remote::new(url, tls).context("AUTH_JWKS_URL")?)))
    }
}

/// Checks tokens.
#[derive(Clone)]
pub(crate) struct Tokens {
    keys: Keys,
    issuer: String,
    audience: String,
    principals: Principals,
}

#[derive(Deserialize)]
struct Claims {
    iss: String,
    sub: String,
    #[serde(default)]
    roles: Vec<String>,
}

impl Tokens {
    /// Returns the check, and the task that reads the keys. `None`: no tokens are required.
    ///
    /// # Errors
    /// A file cannot be read or used, the URL is malformed, or the secret is too short.
    pub async fn start(
        config: &AuthConfig,
        health: Health,
    ) -> anyhow::Result<Option<(Self, impl Future<Output = anyhow::Result<()>> + use<>)>> {
        let Some(source) = config.source()? else { return Ok(None) };
        if let Source::File(_) = source {
            source.read().await?;
        }
        signatures::install();
        let interval = Duration::from_secs(config.auth_jwks_refresh_s);
        let (keys, task) = keys::watch(source, interval, health);
        let secret = config.auth_principal_secret.get().map(|secret| secret.expose()).unwrap_or_default();
        let tokens = Self {
            keys,
            issuer: config.auth_issuer.clone().unwrap_or_default(),
            audience: config.auth_audience.clone().unwrap_or_default(),
            principals: Principals::new(secret)?,
        };
        Ok(Some((tokens, task)))
    }

    /// The bearer of the token of a request.
    pub(super) async fn principal(&self, headers: &HeaderMap) -> Result<Principal, Refusal> {
        let token = bearer_token(headers)?;
        let header = decode_header(token).map_err(|_| Refusal::Invalid("it is not a JWT with a known algorithm"))?;
        if header.crit.is_some() {
            return Err(Refusal::Invalid("it requires an extension of JWT (crit)"));
        }
        let id = header.kid.ok_or(Refusal::Invalid("it does not name its key (kid)"))?;
        match self.keys.find(&id).await {
            Found::Key(key) => self.check(token, &key),
            Found::Unknown => Err(Refusal::Invalid("its key is unknown")),
            Found::NoKeys => Err(Refusal::NoKeys),
        }
    }

    fn check(&self, token: &str, key: &Key) -> Result<Principal, Refusal> {
        // The algorithm comes from the key, never from the token: a caller could choose one that
        // takes the public key for a secret.
        let mut validation = Validation::new(key.algorithm);
        validation.leeway = LEEWAY;
        validation.validate_nbf = true;
        validation.set_issuer(&[&self.issuer]);
        validation.set_audience(&[&self.audience]);
        validation.set_required_spec_claims(&["exp", "iss", "aud", "sub"]);
        let token = decode::<Claims>(token, &key.decoding, &validation);
        let Claims { iss, sub, roles } = token.map_err(|error| Refusal::Invalid(reason(error.kind())))?.claims;
        if sub.is_empty() {
            return Err(Refusal::Invalid("it has no subject (sub)"));
        }
        let is_admin = roles.iter().any(|role| role == ADMIN);
        Ok(Principal { id: self.principals.id(&iss, &sub), is_admin })
    }
}

/// Computes the ids of principals.
#[derive(Clone)]
struct Principals(Hmac<Sha256>);

impl Principals {
    /// # Errors
    /// The secret is so short that an attacker could find it by trial.
    fn new(secret: &str) -> anyhow::Result<Self> {
        ensure!(secret.len() >= 32, "AUTH_PRINCIPAL_SECRET has {} characters, it needs at least 32", secret.len());
        Ok(Self(Hmac::new_from_slice(secret.as_bytes())?))
    }

    /// A keyed hash. A plain hash, or the subject itself, would be personal data: anybody can hash
    /// the subjects of a provider, and some providers use addresses as subjects. The length keeps
    /// the issuer apart from the subject.
    fn id(&self, issuer: &str, subject: &str) -> Uuid {
        let mut hash = self.0.clone();
        hash.update(format!("{}:{issuer}:{subject}", issuer.len()).as_bytes());
        let hash: [u8; 32] = hash.finalize().into_bytes().into();
        let (first, _) = hash.split_first_chunk::<16>().expect("a hash of 32 bytes");
        uuid::Builder::from_custom_bytes(*first).into_uuid()
    }
}

fn bearer_token(headers: &HeaderMap) -> Result<&str, Refusal> {
    let mut lines = headers.get_all(header::AUTHORIZATION).into_iter();
    let line = lines.next().ok_or(Refusal::NoToken)?;
    if lines.next().is_some() {
        return Err(Refusal::Invalid("the request has two Authorization headers"));
    }
    let (scheme, token) = line.to_str().ok().and_then(|line| line.split_once(' ')).ok_or(Refusal::NoToken)?;
    if scheme.eq_ignore_ascii_case("bearer") { Ok(token.trim()) } else { Err(Refusal::NoToken) }
}

/// Why a request has no principal.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Refusal {
    NoToken,
    /// What is wrong with the token. It quotes nothing.
    Invalid(&'static str),
    /// The keys could not be read yet.
    NoKeys,
}

fn reason(error: &ErrorKind) -> &'static str {
    match error {
        ErrorKind::ExpiredSignature => "it has expired",
        ErrorKind::ImmatureSignature => "it is not valid yet (nbf)",
        ErrorKind::InvalidIssuer => "it comes from another issuer (iss)",
        ErrorKind::InvalidAudience => "it is for another audience (aud)",
        ErrorKind::InvalidAlgorithm => "its algorithm is not that of its key",
        ErrorKind::InvalidSignature => "its signature is wrong",
        ErrorKind::MissingRequiredClaim(_) | ErrorKind::InvalidClaimFormat(_) | ErrorKind::Json(_) => {
            "one of its claims is missing or has another type"
        }
        _ => "it is not a valid JWT",
    }
}

impl IntoResponse for Refusal {
    fn into_response(self) -> Response {
        let challenge = |challenge: String| -> [(HeaderName, HeaderValue); 1] {
            let challenge = HeaderValue::try_from(challenge).expect("reasons are visible ASCII");
            [(header::WWW_AUTHENTICATE, challenge)]
        };
        match self {
            Self::NoToken => {
                let detail = "send the header Authorization: Bearer, with a token of the identity provider";
                (challenge("Bearer".to_owned()), problem(NO_TOKEN, detail)).into_response()
            }
            Self::Invalid(reason) => {
                let text = format!("Bearer error=\"invalid_token\", error_description=\"{reason}\"");
                let detail = format!("the token is not accepted: {reason}; get a new one");
                (challenge(text), problem(INVALID_TOKEN, detail)).into_response()
            }
            Self::NoKeys => retry_later(TOKENS_UNCHECKED, "the service cannot check tokens yet; retry the request"),
        }
    }
}
