//! `Idempotency-Key`: a client repeats a request whose answer was lost, and gets the first answer.
//! Source: draft-ietf-httpapi-idempotency-key-header.

use anyhow::ensure;
use axum::http::StatusCode;
use hmac::{Hmac, KeyInit, Mac};
use secrecy::{ExposeSecret, SecretString};
use serde::de::DeserializeOwned;
use serde_json::Value;
use sha2::Sha256;
use shared::platform::database::bounded;
use sqlx::{PgConnection, PgPool};
use tokio::time::{Duration, sleep};

use crate::problem::Error;

const EXPIRY_INTERVAL: Duration = Duration::from_secs(3600);

/// Computes keyed hashes. They are stored instead of the texts that callers sent.
#[derive(Clone)]
pub struct Hasher(Hmac<Sha256>);

impl Hasher {
    /// # Errors
    /// The secret is so short that an attacker could find it by trial.
    pub fn new(secret: &SecretString) -> anyhow::Result<Self> {
        let secret = secret.expose_secret();
        ensure!(secret.len() >= 32, "IDEMPOTENCY_SECRET has {} characters, it needs at least 32", secret.len());
        Ok(Self(Hmac::new_from_slice(secret.as_bytes())?))
    }

    fn hash(&self, purpose: &str, text: &[u8]) -> Vec<u8> {
        let mut hash = self.0.clone();
        hash.update(purpose.as_bytes());
        hash.update(text);
        hash.finalize().into_bytes().to_vec()
    }
}

/// A claimed key that has no answer yet.
pub struct Claim(Vec<u8>);

/// The result of claiming a key.
pub enum Claimed<T> {
    /// The key was free. [`store`] the answer in the same transaction.
    Free(Claim),
    /// The stored answer.
    Answered(StatusCode, T),
}

/// Claims `key` for `request` within the caller's transaction. A second request with the same key
/// waits at the insert for the commit of the first, for at most `lock_timeout`. If the first fails
/// or its process dies, its claim is rolled back and the second one proceeds. A key is free again
/// after a day.
pub async fn claim<T: DeserializeOwned>(
    tx: &mut PgConnection,
    hasher: &Hasher,
    key: &str,
    request: &[u8],
) -> Result<Claimed<T>, Error> {
    let key = hasher.hash("key:", key.as_bytes());
    let request = hasher.hash("request:", request);
    let claimed = sqlx::query!(
        "insert into idempotency_keys as stored (key, request) values ($1, $2)
         on conflict (key) do update set request = excluded.request, status = null, answer = null, created_at = now()
             where stored.created_at < now() - interval '24 hours'",
        key,
        request,
    );
    if claimed.execute(&mut *tx).await?.rows_affected() == 1 {
        return Ok(Claimed::Free(Claim(key)));
    }
    let stored = sqlx::query!("select request, status, answer from idempotency_keys where key = $1", key);
    // If there is no row, the key has expired and was removed in between. This is rare, and the
    // caller may repeat the request.
    let stored = stored.fetch_optional(tx).await?.ok_or(Error::Busy)?;
    if stored.request != request {
        return Err(Error::KeyReused);
    }
    let status = stored.status.and_then(|status| StatusCode::from_u16(status.unsigned_abs()).ok());
    let answer = stored.answer.map(serde_json::from_value).transpose().map_err(anyhow::Error::new)?;
    match (status, answer) {
        (Some(status), Some(answer)) => Ok(Claimed::Answered(status, answer)),
        _ => Err(anyhow::anyhow!("an idempotency key was committed without its answer").into()),
    }
}

/// Stores the answer of a successful request. Any other result rolls back the claim together with
/// the rest of the transaction.
pub async fn store(tx: &mut PgConnection, claim: Claim, status: StatusCode, answer: &Value) -> Result<(), Error> {
    let status = i16::try_from(status.as_u16()).expect("HTTP statuses have three digits");
    sqlx::query!("update idempotency_keys set status = $2, answer = $3 where key = $1", claim.0, status, answer)
        .execute(tx)
        .await?;
    Ok(())
}

/// Removes expired answers, once an hour.
pub async fn expire(db: PgPool) -> anyhow::Result<()> {
    loop {
        let expired = sqlx::query!("delete from idempotency_keys where created_at < now() - interval '24 hours'");
        if let Err(error) = bounded(expired.execute(&db)).await {
            tracing::warn!(%error, "cannot remove expired idempotency keys; will retry in an hour");
        }
        sleep(EXPIRY_INTERVAL).await;
    }
}
