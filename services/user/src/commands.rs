//! The commands: each changes one user and writes one fact and one state, in the caller's transaction. All three carry the
//! version that the changed row has, so whoever holds the row's lock decides the order.
//!
//! Crash: before the caller's commit there is neither a change nor an event; after it there are both.

use shared::events::{Profile, UserEvent, UserRef, UserState, mint_id};
use shared::messaging::outbox;
use sqlx::PgConnection;
use uuid::Uuid;

use crate::problem::Error;

/// A user as stored.
pub struct User {
    pub id: Uuid,
    pub version: i64,
    pub profile: Profile,
}

/// Who is registered under `id` now.
pub async fn find(db: &mut PgConnection, id: Uuid) -> Result<User, Error> {
    let row = sqlx::query!(
        r#"select version, email as "email!", display_name as "display_name!" from users where id = $1 and email is not null"#,
        id
    );
    let row = row.fetch_optional(db).await?.ok_or(Error::UnknownUser)?;
    Ok(User { id, version: row.version, profile: Profile { email: row.email, display_name: row.display_name } })
}

pub async fn register(tx: &mut PgConnection, profile: Profile) -> Result<User, Error> {
    let user = User { id: mint_id(), version: 1, profile };
    let inserted = sqlx::query!(
        "insert into users (id, version, email, display_name) values ($1, $2, $3, $4) on conflict do nothing",
        user.id,
        user.version,
        user.profile.email,
        user.profile.display_name,
    );
    if inserted.execute(&mut *tx).await?.rows_affected() == 0 {
        return Err(Error::AddressTaken);
    }
    tell(tx, &user, UserEvent::Registered).await?;
    Ok(user)
}

/// `expected` is the version that the caller has seen (`If-Match`), if it says so.
pub async fn rename(tx: &mut PgConnection, id: Uuid, expected: Option<i64>, display_name: &str) -> Result<User, Error> {
    let row = sqlx::query!(
        r#"update users set version = version + 1, display_name = $3
           where id = $1 and email is not null and version = coalesce($2, version)
           returning version, email as "email!", display_name as "display_name!""#,
        id,
        expected,
        display_name,
    );
    let Some(row) = row.fetch_optional(&mut *tx).await? else { return Err(refusal(tx, id).await?) };
    let profile = Profile { email: row.email, display_name: row.display_name };
    let user = User { id, version: row.version, profile };
    tell(tx, &user, UserEvent::ProfileChanged).await?;
    Ok(user)
}

pub async fn change_email(tx: &mut PgConnection, id: Uuid, expected: Option<i64>, email: &str) -> Result<User, Error> {
    let row = sqlx::query!(
        r#"update users set version = version + 1, email = $3
           where id = $1 and email is not null and version = coalesce($2, version)
           returning version, email as "email!", display_name as "display_name!""#,
        id,
        expected,
        email,
    );
    let row = row.fetch_optional(&mut *tx).await.map_err(Error::address_taken)?;
    let Some(row) = row else { return Err(refusal(tx, id).await?) };
    let profile = Profile { email: row.email, display_name: row.display_name };
    let user = User { id, version: row.version, profile };
    tell(tx, &user, UserEvent::EmailChanged).await?;
    Ok(user)
}

/// Erases the personal data here, and by the tombstone everywhere else. The row stays, with its version.
pub async fn erase(tx: &mut PgConnection, id: Uuid, expected: Option<i64>) -> Result<(), Error> {
    let version = sqlx::query_scalar!(
        "update users set version = version + 1, email = null, display_name = null
         where id = $1 and email is not null and version = coalesce($2, version)
         returning version",
        id,
        expected,
    );
    let Some(version) = version.fetch_optional(&mut *tx).await? else { return Err(refusal(tx, id).await?) };
    outbox::publish(tx, id, version, &UserEvent::Deleted(UserRef { user_id: id })).await?;
    outbox::publish(tx, id, version, &UserState::Erased).await?;
    Ok(())
}

/// What [`retell`] wrote.
#[derive(Default)]
pub struct Retold {
    pub states: u64,
    pub tombstones: u64,
}

/// Tells the current states of these users once more, at the versions they have, under new event ids. No user changes, so there is
/// no fact. The rows are locked, in the order of their ids: a command that comes meanwhile waits, and its events lie behind
/// these; so the last state that is told of a user is the newest.
pub async fn retell(tx: &mut PgConnection, users: &[Uuid]) -> sqlx::Result<Retold> {
    let rows = sqlx::query!(
        "select id, version, email, display_name from users where id = any($1) order by id for update",
        users
    );
    let mut retold = Retold::default();
    for row in rows.fetch_all(&mut *tx).await? {
        let profile = row.email.zip(row.display_name).map(|(email, display_name)| Profile { email, display_name });
        *if profile.is_some() { &mut retold.states } else { &mut retold.tombstones } += 1;
        outbox::publish(tx, row.id, row.version, &profile.map_or(UserState::Erased, UserState::Current)).await?;
    }
    Ok(retold)
}

/// One fact, one state, one version.
async fn tell(tx: &mut PgConnection, user: &User, fact: fn(UserRef) -> UserEvent) -> Result<(), Error> {
    outbox::publish(tx, user.id, user.version, &fact(UserRef { user_id: user.id })).await?;
    outbox::publish(tx, user.id, user.version, &UserState::Current(user.profile.clone())).await?;
    Ok(())
}

/// Why no row was changed.
async fn refusal(tx: &mut PgConnection, id: Uuid) -> Result<Error, Error> {
    find(tx, id).await.map(|user| Error::StaleVersion { current: user.version })
}
