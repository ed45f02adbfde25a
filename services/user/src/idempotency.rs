//! `Idempotency-Key`: a client repeats a request whose answer was lost, and gets the first answer.
//! Source: draft-ietf-httpapi-idempotency-key-header.

use anyhow::ensure;
use axum::http::StatusCode;
use hmac::{Hmac, KeyInit, Mac};
use serde::de::DeserializeOwned;
use serde_json::Value;
use sha2::Sha256;
use shared::platform::database::bounded;
use sqlx::types::time::OffsetDateTime;
use sqlx::{PgConnection, PgPool};
use tokio::time::{Duration, sleep};

use crate::problem::Error;

const EXPIRY_INTERVAL: Duration = Duration::from_secs(3600);
/// The pause after a batch failed.
const EXPIRY_RETRY: Duration = Duration::from_secs(10);
/// Keys per statement. Deleting them takes a few tenths of a second at most.
const EXPIRY_BATCH: i64 = 5_000;

/// Computes keyed hashes. They are stored instead of the texts that callers sent.
#[derive(Clone)]
pub struct Hasher(Hmac<Sha256>);

impl Hasher {
    /// # Errors
    /// The secret is so short that an attacker could find it by trial.
    pub fn new(secret: &str) -> anyhow::Result<Self> {
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

/// The value of the header and its scope: the same value on two routes, or from two principals, is
/// two keys.
pub struct Key {
    /// Principal, method and route, such as `… PATCH /users/{id}`.
    pub scope: String,
    /// Printable ASCII.
    pub text: String,
}

/// Claims `key` for `request` within the caller's transaction. A second request with the same key
/// waits at the insert for the commit of the first, for at most `lock_timeout`. If the first fails
/// or its process dies, its claim is rolled back and the second one proceeds. A key is free again
/// after a day.
pub async fn claim<T: DeserializeOwned>(
    tx: &mut PgConnection,
    hasher: &Hasher,
    key: &Key,
    request: &[u8],
) -> Result<Claimed<T>, Error> {
    let key = hasher.hash("key:", format!("{}\n{}", key.scope, key.text).as_bytes());
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
        let mut after = None;
        loop {
            match bounded(expire_batch(&db, after)).await {
                Ok(None) => break,
                Ok(last) => after = last,
                Err(error) => {
                    tracing::warn!(%error, "cannot remove expired idempotency keys; will retry");
                    sleep(EXPIRY_RETRY).await;
                }
            }
        }
        sleep(EXPIRY_INTERVAL).await;
    }
}

/// Removes some expired answers: the oldest ones from `after` on. Returns the age of the last one,
/// where the next batch begins: from the beginning of the index it would read all rows that were
/// deleted and are not vacuumed yet. The rows are deleted by their place in the table (`ctid`): by
/// key, Postgres could choose to read the whole table. Several replicas do this at once; each skips
/// rows that another one is removing. A crash loses nothing: the next pass begins with the oldest
/// row.
async fn expire_batch(db: &PgPool, after: Option<OffsetDateTime>) -> sqlx::Result<Option<OffsetDateTime>> {
    let last = sqlx::query_scalar!(
        r#"with expired as (
               delete from idempotency_keys where ctid = any (array(
                   select ctid from idempotency_keys
                   where created_at < now() - interval '24 hours' and created_at >= coalesce($1, '-infinity'::timestamptz)
                   order by created_at limit $2 for update skip locked))
               returning created_at)
           select max(created_at) from expired"#,
        after,
        EXPIRY_BATCH,
    );
    last.fetch_one(db).await
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    const EXPIRED: i64 = 5 * EXPIRY_BATCH + 1;
    const VALID: i64 = 10;

    /// However many keys have expired, a statement deletes only a batch of them. Many have the same
    /// age, as after a load test.
    #[tokio::test]
    async fn expired_keys_are_deleted_in_batches() {
        let db = testbed::testing::migrated_database(testbed::services::USER, &crate::MIGRATIONS).await;
        sqlx::raw_sql(
            "create table statements (deleted bigint not null);
             create function count_deleted() returns trigger language plpgsql as $$ begin
                 insert into statements select count(*) from gone;
                 return null;
             end $$;
             create trigger count_deleted after delete on idempotency_keys
                 referencing old table as gone for each statement execute function count_deleted();",
        )
        .execute(&db)
        .await
        .unwrap();
        let insert = "insert into idempotency_keys (key, request, created_at)
                      select uuid_send(gen_random_uuid()), '', now() - $2::interval * (1 + number / 4000)
                      from generate_series(1, $1) number";
        for (keys, age) in [(EXPIRED, 25), (VALID, 0)] {
            let age = sqlx::postgres::types::PgInterval::try_from(Duration::from_secs(3600 * age)).unwrap();
            sqlx::query(insert).bind(keys).bind(age).execute(&db).await.unwrap();
        }
        let count = async || -> i64 {
            sqlx::query_scalar("select count(*) from idempotency_keys").fetch_one(&db).await.unwrap()
        };
        let until_expired = async {
            while count().await > VALID {
                sleep(Duration::from_millis(20)).await;
            }
        };
        tokio::select! {
            _ = expire(db.clone()) => panic!("the task ended"),
            () = sleep(Duration::from_secs(30)) => {}
            () = until_expired => {}
        }
        let left = count().await;
        assert_eq!(left, VALID, "keys that are left");
        let largest: i64 = sqlx::query_scalar("select max(deleted) from statements").fetch_one(&db).await.unwrap();
        assert!(largest <= EXPIRY_BATCH, "one statement deleted {largest} keys");
    }
}
