//! The tables of the role `user`.

use hmac::{Hmac, KeyInit, Mac};
use sha2::Sha256;
use shared::events::mint_id;
use sqlx::postgres::types::PgInterval;
use sqlx::{PgConnection, PgPool, Row};
use uuid::Uuid;

use crate::problem::Error;
use crate::receiver::Receiver;
use crate::server::REQUEST_TIMEOUT;

/// A registered user, as the receivers get it.
#[derive(Clone)]
pub struct User {
    pub id: Uuid,
    pub version: i64,
    pub email: String,
    pub display_name: String,
}

/// A request that may make calls.
pub struct Begun {
    pub user: User,
    /// The receivers to call.
    pub missing: Vec<Receiver>,
    key: Option<Vec<u8>>,
}

/// Computes keyed hashes, as the user service does: callers may put personal data into a key.
#[derive(Clone)]
pub struct Hasher(Hmac<Sha256>);

impl Hasher {
    /// # Errors
    /// The secret is so short that an attacker could find it by trial.
    pub fn new(secret: &str) -> anyhow::Result<Self> {
        anyhow::ensure!(secret.len() >= 32, "IDEMPOTENCY_SECRET needs at least 32 characters");
        Ok(Self(Hmac::new_from_slice(secret.as_bytes())?))
    }

    fn hash(&self, purpose: &str, text: &[u8]) -> Vec<u8> {
        let mut hash = self.0.clone();
        hash.update(purpose.as_bytes());
        hash.update(text);
        hash.finalize().into_bytes().to_vec()
    }
}

/// The text of an `Idempotency-Key`, and the request that it belongs to.
pub struct Key {
    pub text: String,
    pub request: Vec<u8>,
}

/// Inserts the user and claims the key in one transaction, or takes over what a request with the
/// same key has left. Crash before the commit: nothing is stored. Crash after it: the user exists,
/// and no receiver knows it until a request with the same key is sent after [`REQUEST_TIMEOUT`].
pub async fn begin(
    db: &PgPool,
    hasher: &Hasher,
    key: Option<Key>,
    email: String,
    display_name: String,
) -> Result<Begun, Error> {
    let user = User { id: mint_id(), version: 1, email, display_name };
    let mut tx = db.begin().await?;
    let mut claimed = None;
    if let Some(Key { text, request }) = key {
        let key = hasher.hash("key:", text.as_bytes());
        let request = hasher.hash("request:", &request);
        // A second request with the same key waits here for the commit of the first.
        let claim = "insert into idempotency_keys (key, request, user_id, missing, calling_until)
                     values ($1, $2, $3, $4, now() + $5) on conflict (key) do nothing";
        let claim =
            sqlx::query(claim).bind(&key).bind(&request).bind(user.id).bind(names(&Receiver::ALL)).bind(lease());
        if claim.execute(&mut *tx).await?.rows_affected() == 0 {
            let begun = take_over(&mut tx, key, &request).await?;
            tx.commit().await?;
            return Ok(begun);
        }
        claimed = Some(key);
    }
    let insert = "insert into users (id, version, email, display_name) values ($1, $2, $3, $4) on conflict do nothing";
    let insert = sqlx::query(insert).bind(user.id).bind(user.version).bind(&user.email).bind(&user.display_name);
    if insert.execute(&mut *tx).await?.rows_affected() == 0 {
        return Err(Error::AddressTaken);
    }
    tx.commit().await?;
    Ok(Begun { user, missing: Receiver::ALL.to_vec(), key: claimed })
}

/// The user and the missing calls of an earlier request with this key. Only one request at a time
/// makes calls: two would send two mails.
async fn take_over(tx: &mut PgConnection, key: Vec<u8>, request: &[u8]) -> Result<Begun, Error> {
    let stored = "select request, user_id, missing, calling_until is null or calling_until < now() as free
                  from idempotency_keys where key = $1 for update";
    let stored = sqlx::query(stored).bind(&key).fetch_one(&mut *tx).await?;
    if stored.try_get::<Vec<u8>, _>("request")? != request {
        return Err(Error::KeyReused);
    }
    let missing: Vec<String> = stored.try_get("missing")?;
    let missing: Vec<Receiver> = missing.iter().filter_map(|name| Receiver::named(name)).collect();
    if !missing.is_empty() {
        if !stored.try_get::<bool, _>("free")? {
            return Err(Error::Busy);
        }
        let lease = sqlx::query("update idempotency_keys set calling_until = now() + $2 where key = $1")
            .bind(&key)
            .bind(self::lease());
        lease.execute(&mut *tx).await?;
    }
    let user = find(&mut *tx, stored.try_get("user_id")?).await?;
    Ok(Begun { user, missing, key: Some(key) })
}

/// Claims the missing calls of a registration again, and returns them. `None`: it has no key, so
/// that no other request can make them.
///
/// # Errors
/// [`Error::Busy`]: a request with the same key makes them now.
pub async fn resume(db: &PgPool, begun: &Begun) -> Result<Option<Vec<Receiver>>, Error> {
    let Some(key) = &begun.key else { return Ok(None) };
    let claim = "update idempotency_keys set calling_until = now() + $2
                 where key = $1 and (calling_until is null or calling_until < now()) returning missing";
    let claimed = sqlx::query_scalar::<_, Vec<String>>(claim).bind(key).bind(lease()).fetch_optional(db).await?;
    let missing = claimed.ok_or(Error::Busy)?;
    Ok(Some(missing.iter().filter_map(|name| Receiver::named(name)).collect()))
}

/// Stores which receivers still lack the registration. Crash before it: a repeated request makes
/// the same calls again. Counts and profiles stay correct. A second mail with the same Message-ID
/// is sent.
pub async fn finish(db: &PgPool, begun: &Begun, missing: &[Receiver]) -> Result<(), Error> {
    let Some(key) = &begun.key else { return Ok(()) };
    let note = "update idempotency_keys set missing = $2, calling_until = null where key = $1";
    sqlx::query(note).bind(key).bind(names(missing)).execute(db).await?;
    Ok(())
}

pub async fn find(db: &mut PgConnection, id: Uuid) -> Result<User, Error> {
    let row = sqlx::query("select version, email, display_name from users where id = $1").bind(id);
    let row = row.fetch_optional(db).await?.ok_or(Error::UnknownUser)?;
    let version = row.try_get("version")?;
    Ok(User { id, version, email: row.try_get("email")?, display_name: row.try_get("display_name")? })
}

fn names(receivers: &[Receiver]) -> Vec<String> {
    receivers.iter().map(|receiver| receiver.name().to_owned()).collect()
}

/// How long a request keeps the right to make calls. All calls of a registration together take
/// less. If the commit was so slow that they end later, a repeated request may send a second mail
/// with the same Message-ID.
fn lease() -> PgInterval {
    PgInterval::try_from(REQUEST_TIMEOUT).expect("the time-out is whole microseconds")
}
