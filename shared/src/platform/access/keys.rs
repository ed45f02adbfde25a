//! The public keys with which tokens are checked: a JWK set (RFC 7517) from a file or from a URL.
//! One task reads it, at first, after each interval, and when a token names a key that is not in
//! the set. While it cannot be read, the known keys stay.

use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::Arc;

use anyhow::{Context, ensure};
use jsonwebtoken::jwk::{AlgorithmParameters, EllipticCurve, Jwk, PublicKeyUse};
use jsonwebtoken::{Algorithm, DecodingKey};
use serde::Deserialize;
use serde_json::Value;
use tokio::sync::{Notify, watch};
use tokio::time::{Duration, Instant, sleep_until, timeout};

use crate::platform::fetch::Remote;
use crate::platform::health::Health;

/// The shortest time between two reads that callers cause: anyone can send a token that names an
/// unknown key.
const READ_PAUSE: Duration = Duration::from_secs(5);
/// How long a request waits for a read that it caused. Longer than the time-out of a read.
const READ_WAIT: Duration = Duration::from_secs(4);
/// The wait after a failed read, unless the interval is shorter.
const READ_RETRY: Duration = Duration::from_secs(10);
/// The component's name in `/status`.
const COMPONENT: &str = "token keys";

/// A key and the only algorithm that it may be used with.
#[derive(Clone)]
pub(super) struct Key {
    pub algorithm: Algorithm,
    pub decoding: DecodingKey,
}

/// The keys by their ids.
pub(super) type KeySet = HashMap<String, Key>;

/// Where the keys come from.
pub(super) enum Source {
    File(PathBuf),
    Url(Remote),
}

impl Source {
    /// # Errors
    /// The document cannot be read, or contains no key that can be used.
    pub async fn read(&self) -> anyhow::Result<KeySet> {
        match self {
            Self::File(file) => {
                let reading = || format!("AUTH_JWKS_FILE: cannot use {}", file.display());
                let text = tokio::fs::read(file).await.with_context(reading)?;
                parse(&text).with_context(reading)
            }
            Self::Url(remote) => {
                let text = remote.fetch().await.context("cannot read AUTH_JWKS_URL")?;
                parse(&text).context("cannot use AUTH_JWKS_URL")
            }
        }
    }
}

#[derive(Deserialize)]
struct Document {
    keys: Vec<Value>,
}

/// The keys of a JWK set. Leaves out keys that cannot be used: without an id, for encryption, or of
/// another kind, above all secrets.
fn parse(text: &[u8]) -> anyhow::Result<KeySet> {
    let document: Document = serde_json::from_slice(text).context("not a JWK set: {\"keys\": [...]}")?;
    let keys: KeySet = document.keys.into_iter().filter_map(usable).collect();
    ensure!(
        !keys.is_empty(),
        "it has no usable key: each needs a `kid`, and must be of the kind RSA, EC with P-256, or OKP with Ed25519"
    );
    Ok(keys)
}

fn usable(key: Value) -> Option<(String, Key)> {
    let jwk: Jwk = serde_json::from_value(key).ok()?;
    let algorithm = match &jwk.algorithm {
        AlgorithmParameters::RSA(_) => Algorithm::RS256,
        AlgorithmParameters::EllipticCurve(key) if key.curve == EllipticCurve::P256 => Algorithm::ES256,
        AlgorithmParameters::OctetKeyPair(key) if key.curve == EllipticCurve::Ed25519 => Algorithm::EdDSA,
        _ => return None,
    };
    let is_for_another = jwk.common.key_algorithm.is_some_and(|named| named != algorithm.into());
    let is_for_encryption =
        jwk.common.public_key_use.as_ref().is_some_and(|purpose| *purpose != PublicKeyUse::Signature);
    if is_for_another || is_for_encryption {
        return None;
    }
    let decoding = DecodingKey::from_jwk(&jwk).ok()?;
    Some((jwk.common.key_id?, Key { algorithm, decoding }))
}

/// What the task has read.
#[derive(Clone)]
struct Read {
    /// `None`: nothing yet.
    keys: Option<Arc<KeySet>>,
    /// Number of reads, including those that failed.
    reads: u64,
    /// When the last read ended.
    at: Instant,
}

/// The result of looking for a key.
pub(super) enum Found {
    Key(Key),
    Unknown,
    /// The keys could not be read yet.
    NoKeys,
}

/// The keys, as requests use them.
#[derive(Clone)]
pub(super) struct Keys {
    read: watch::Receiver<Read>,
    wanted: Arc<Notify>,
}

impl Keys {
    /// The key with this id. If it is unknown, the keys are read again, unless that was done a
    /// moment ago.
    pub async fn find(&self, id: &str) -> Found {
        let known = self.read.borrow().clone();
        let found = known.find(id);
        if matches!(found, Found::Key(_)) || known.at.elapsed() < READ_PAUSE {
            return found;
        }
        self.wanted.notify_one();
        let mut read = self.read.clone();
        match timeout(READ_WAIT, read.wait_for(|read| read.reads > known.reads)).await {
            Ok(Ok(read)) => read.find(id),
            // The read takes too long, or the process stops.
            Ok(Err(_)) | Err(_) => found,
        }
    }
}

impl Read {
    fn find(&self, id: &str) -> Found {
        let Some(keys) = &self.keys else { return Found::NoKeys };
        keys.get(id).map_or(Found::Unknown, |key| Found::Key(key.clone()))
    }
}

/// Reads the keys. The process is not ready before it has some.
pub(super) fn watch(
    source: Source,
    interval: Duration,
    health: Health,
) -> (Keys, impl Future<Output = anyhow::Result<()>>) {
    health.waiting(COMPONENT, "the keys that check tokens");
    let (sender, receiver) = watch::channel(Read { keys: None, reads: 0, at: Instant::now() });
    let wanted = Arc::new(Notify::new());
    let keys = Keys { read: receiver, wanted: Arc::clone(&wanted) };
    let task = async move {
        let mut is_failing = false;
        loop {
            let read = source.read().await;
            let pause = if read.is_ok() { interval } else { interval.min(READ_RETRY) };
            report(&read, &sender.borrow(), is_failing, &health);
            is_failing = read.is_err();
            sender.send_modify(|last| {
                last.keys = read.ok().map(Arc::new).or(last.keys.take());
                last.reads += 1;
                last.at = Instant::now();
            });
            let at = sender.borrow().at;
            tokio::select! {
                () = sleep_until(at + pause) => {}
                () = async { wanted.notified().await; sleep_until(at + READ_PAUSE).await } => {}
            }
        }
    };
    (keys, task)
}

/// Reports in `/status` and in the log that the keys cannot be read, or that they have changed.
fn report(read: &anyhow::Result<KeySet>, last: &Read, is_failing: bool, health: &Health) {
    match read {
        Ok(keys) => {
            health.ready(COMPONENT);
            health.resolved(COMPONENT);
            let is_known =
                |known: &Arc<KeySet>| known.len() == keys.len() && keys.keys().all(|id| known.contains_key(id));
            if is_failing || !last.keys.as_ref().is_some_and(is_known) {
                tracing::info!(keys = keys.len(), "read the keys that check tokens");
            }
        }
        Err(error) => {
            let error = format!("{error:#}");
            if !is_failing {
                tracing::warn!(error, "cannot read the keys that check tokens; the known keys stay, will retry");
            }
            if last.keys.is_none() {
                health.waiting(COMPONENT, error);
            } else {
                health.report(COMPONENT, error);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    const RSA: &str = "AQAB";

    #[test]
    fn only_public_keys_for_signatures_are_used() {
        let x = "f83OJ3D2xF1Bg8vub9tLe1gHMzV76e8Tus9uPHvRVEU";
        let y = "x_FEzRu9m36HLN_tue659LNpXW6pCyStikYjKIWI5a0";
        let unusable = [
            json!({ "kty": "oct", "kid": "secret", "k": "c2VjcmV0" }),
            json!({ "kty": "EC", "crv": "P-256", "x": x, "y": y }),
            json!({ "kty": "EC", "crv": "P-384", "kid": "another curve", "x": x, "y": y }),
            json!({ "kty": "EC", "crv": "P-256", "kid": "for encryption", "use": "enc", "x": x, "y": y }),
            json!({ "kty": "RSA", "kid": "another algorithm", "alg": "PS256", "n": RSA, "e": RSA }),
            json!({ "kty": "RSA", "kid": "another algorithm", "alg": "XX", "n": RSA, "e": RSA }),
            json!({ "kty": "AKP", "kid": "unknown kind" }),
            json!("not a key"),
        ];
        for key in &unusable {
            assert!(parse(json!({ "keys": [key] }).to_string().as_bytes()).is_err(), "{key}");
        }
        let mut keys = unusable.to_vec();
        keys.push(json!({ "kty": "EC", "crv": "P-256", "kid": "ec", "use": "sig", "x": x, "y": y }));
        keys.push(json!({ "kty": "RSA", "kid": "rsa", "alg": "RS256", "n": RSA, "e": RSA }));
        keys.push(json!({ "kty": "OKP", "crv": "Ed25519", "kid": "ed", "x": x }));
        let keys = parse(json!({ "keys": keys }).to_string().as_bytes()).unwrap();
        let mut found: Vec<_> = keys.iter().map(|(id, key)| (id.as_str(), key.algorithm)).collect();
        found.sort_by_key(|(id, _)| *id);
        assert_eq!(found, [("ec", Algorithm::ES256), ("ed", Algorithm::EdDSA), ("rsa", Algorithm::RS256)]);
    }
}
