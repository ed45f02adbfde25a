//! `Idempotency-Key`: a request that is sent again, because its answer was lost, gets the first one's answer.
//! Source: draft-ietf-httpapi-idempotency-key-header.

use anyhow::ensure;
use axum::http::StatusCode;
use hmac::{Hmac, KeyInit, Mac};
use secrecy::{ExposeSecret, SecretString};
use serde::de::DeserializeOwned;
use serde_json::Value;
use sha2::Sha256;
use shared::service::bounded;
use sqlx::{PgConnection, PgPool};
use tokio::time::{Duration, sleep};

use crate::problem::Error;

const EXPIRY_INTERVAL: Duration = Duration::from_secs(3600);

/// Makes the keyed hashes that are stored instead of what callers sent.
#[derive(Clone)]
pub struct Hasher(Hmac<Sha256>);

impl Hasher {
    /// # Errors
    /// The secret is too short to keep anybody from trying all addresses.
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

/// A claimed key, whose answer is still to be made.
pub struct Claim(Vec<u8>);

/// What a key stands for.
pub enum Claimed<T> {
    /// Nobody had it: make the answer and [`store`] it in the same transaction.
    Free(Claim),
    /// The stored answer.
    Answered(StatusCode, T),
}

/// Claims `key` for `request` within the caller's transaction. A second request with the same key waits at the insert for the
/// first one's commit, no longer than `lock_timeout`. If the first fails or dies, its claim is rolled back and the second
/// goes ahead. A key older than a day is free again.
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
    // Expired and removed in between: as rare as it is harmless, since the caller may send the request again.
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

/// Stores the answer. Only successes are stored: whatever else happens rolls back the claim with everything else.
pub async fn store(tx: &mut PgConnection, claim: Claim, status: StatusCode, answer: &Value) -> Result<(), Error> {
    let status = i16::try_from(status.as_u16()).expect("HTTP statuses have three digits");
    sqlx::query!("update idempotency_keys set status = $2, answer = $3 where key = $1", claim.0, status, answer)
        .execute(tx)
        .await?;
    Ok(())
}

/// Removes answers that nobody will ask for any more.
pub async fn expire(db: PgPool) -> anyhow::Result<()> {
    loop {
        let expired = sqlx::query!("delete from idempotency_keys where created_at < now() - interval '24 hours'");
        if let Err(error) = bounded(expired.execute(&db)).await {
            tracing::warn!(%error, "cannot remove expired idempotency keys; trying again later");
        }
        sleep(EXPIRY_INTERVAL).await;
    }
}
