//! The commands. Each changes one user and writes one fact and one state record, in the caller's
//! transaction. Both carry the version of the changed row, so the row's lock orders them.
//!
//! Crash before the caller's commit: neither the change nor the events exist. Crash after it: all
//! of them exist.

use shared::events::{Cause, Profile, UserEvent, UserRef, UserState, mint_id};
use shared::messaging::outbox::{self, Draft};
use shared::platform::access::Caller;
use shared::platform::preconditions::Preconditions;
use sqlx::PgConnection;
use uuid::Uuid;

use crate::problem::Error;

/// A stored user.
pub struct User {
    pub id: Uuid,
    pub version: i64,
    pub profile: Profile,
}

/// Finds a user that is not erased.
pub async fn find(db: &mut PgConnection, id: Uuid) -> Result<User, Error> {
    let row = sqlx::query!(
        r#"select version, email as "email!", display_name as "display_name!", owner
           from users where id = $1 and email is not null"#,
        id
    );
    let row = row.fetch_optional(db).await?.ok_or(Error::UnknownUser)?;
    let profile = Profile { email: row.email, display_name: row.display_name, owner: row.owner };
    Ok(User { id, version: row.version, profile })
}

/// The caller owns the user.
pub async fn register(
    tx: &mut PgConnection,
    caller: &Caller,
    email: String,
    display_name: String,
) -> Result<User, Error> {
    let profile = Profile { email, display_name, owner: caller.actor() };
    let user = User { id: mint_id(), version: 1, profile };
    let inserted = sqlx::query!(
        "insert into users (id, version, email, display_name, owner) values ($1, $2, $3, $4, $5) on conflict do nothing",
        user.id,
        user.version,
        user.profile.email,
        user.profile.display_name,
        user.profile.owner,
    );
    if inserted.execute(&mut *tx).await?.rows_affected() == 0 {
        return Err(Error::AddressTaken);
    }
    publish_change(tx, caller, &user, UserEvent::Registered).await?;
    Ok(user)
}

pub async fn rename(
    tx: &mut PgConnection,
    caller: &Caller,
    id: Uuid,
    preconditions: &Preconditions,
    display_name: &str,
) -> Result<User, Error> {
    lock(tx, caller, id, preconditions).await?;
    let row = sqlx::query!(
        r#"update users set version = version + 1, display_name = $2 where id = $1
           returning version, email as "email!", display_name as "display_name!", owner"#,
        id,
        display_name,
    );
    let row = row.fetch_one(&mut *tx).await?;
    let profile = Profile { email: row.email, display_name: row.display_name, owner: row.owner };
    let user = User { id, version: row.version, profile };
    publish_change(tx, caller, &user, UserEvent::ProfileChanged).await?;
    Ok(user)
}

pub async fn change_email(
    tx: &mut PgConnection,
    caller: &Caller,
    id: Uuid,
    preconditions: &Preconditions,
    email: &str,
) -> Result<User, Error> {
    lock(tx, caller, id, preconditions).await?;
    let row = sqlx::query!(
        r#"update users set version = version + 1, email = $2 where id = $1
           returning version, email as "email!", display_name as "display_name!", owner"#,
        id,
        email,
    );
    let row = row.fetch_one(&mut *tx).await.map_err(Error::address_taken)?;
    let profile = Profile { email: row.email, display_name: row.display_name, owner: row.owner };
    let user = User { id, version: row.version, profile };
    publish_change(tx, caller, &user, UserEvent::EmailChanged).await?;
    Ok(user)
}

/// Erases the personal data in this database. The tombstone erases it in all other services. The
/// row and its version stay. Returns the version of the erasure.
pub async fn erase(
    tx: &mut PgConnection,
    caller: &Caller,
    id: Uuid,
    preconditions: &Preconditions,
) -> Result<i64, Error> {
    lock(tx, caller, id, preconditions).await?;
    let version = sqlx::query_scalar!(
        "update users set version = version + 1, email = null, display_name = null, owner = null where id = $1
         returning version",
        id,
    );
    let version = version.fetch_one(&mut *tx).await?;
    let cause = Cause::command(caller.actor());
    let fact = Draft::new(cause, id, &UserEvent::Deleted(UserRef { user_id: id }));
    let state = Draft::new(cause, id, &UserState::Erased);
    outbox::publish_all(tx, [fact.at(version), state.at(version)]).await?;
    Ok(version)
}

/// The numbers of records that [`republish`] wrote.
#[derive(Default)]
pub struct Republished {
    pub states: u64,
    pub tombstones: u64,
}

/// Publishes the current states of these users again, with their current versions and new event
/// ids. No user changes, so there is no fact. The rows are locked, in the order of their ids. A
/// command on one of these users waits for the lock, and its events come after these. So the last
/// state record of a user is always its newest state.
pub async fn republish(tx: &mut PgConnection, users: &[Uuid]) -> sqlx::Result<Republished> {
    let rows = sqlx::query!(
        "select id, version, email, display_name, owner from users where id = any($1) order by id for update",
        users
    );
    let cause = Cause::command(None);
    let mut republished = Republished::default();
    let mut states = vec![];
    for row in rows.fetch_all(&mut *tx).await? {
        let person = row.email.zip(row.display_name);
        let profile = person.map(|(email, display_name)| Profile { email, display_name, owner: row.owner });
        let state = match profile {
            Some(profile) => {
                republished.states += 1;
                UserState::Current(profile)
            }
            None => {
                republished.tombstones += 1;
                UserState::Erased
            }
        };
        states.push(Draft::new(cause, row.id, &state).at(row.version));
    }
    outbox::publish_all(tx, states).await?;
    Ok(republished)
}

/// Publishes one fact and one state record, both with the user's version.
async fn publish_change(
    tx: &mut PgConnection,
    caller: &Caller,
    user: &User,
    fact: fn(UserRef) -> UserEvent,
) -> Result<(), Error> {
    let cause = Cause::command(caller.actor());
    let fact = Draft::new(cause, user.id, &fact(UserRef { user_id: user.id }));
    let state = Draft::new(cause, user.id, &UserState::Current(user.profile.clone()));
    outbox::publish_all(tx, [fact.at(user.version), state.at(user.version)]).await?;
    Ok(())
}

/// Locks the user's row until the end of the transaction, and checks that the caller may change it
/// and that its preconditions are true. A command that waited for the lock sees the version that
/// the other one has made.
async fn lock(tx: &mut PgConnection, caller: &Caller, id: Uuid, preconditions: &Preconditions) -> Result<(), Error> {
    let row = sqlx::query!("select version, owner from users where id = $1 and email is not null for update", id);
    let row = row.fetch_optional(tx).await?.ok_or(Error::UnknownUser)?;
    caller.require_owner(row.owner)?;
    let current = row.version;
    if preconditions.allow_change_of(Some(current)) { Ok(()) } else { Err(Error::StaleVersion { current }) }
}

#[cfg(test)]
mod tests {
    use shared::events::{Event, key_hash};

    use super::*;

    /// I3, I4: the relay publishes rows in the order of their ids.
    #[tokio::test]
    async fn events_of_one_statement_are_numbered_in_their_order() {
        let db = testbed::testing::migrated_database(testbed::services::USER, &crate::MIGRATIONS).await;
        let cause = Cause::command(None);
        let mut given = vec![];
        let mut entries = vec![];
        // In another order than that of any column.
        for _ in 0..100 {
            let [older, newer] = [mint_id(), mint_id()];
            for user in [newer, older] {
                let fact = Draft::new(cause, user, &UserEvent::Deleted(UserRef { user_id: user }));
                let state = Draft::new(cause, user, &UserState::Erased);
                for (draft, topic) in [(fact, UserEvent::TOPIC), (state, UserState::TOPIC)] {
                    let entry = draft.at(2);
                    given.push((entry.event_id(), topic.name.to_owned(), user, key_hash(user)));
                    entries.push(entry);
                }
            }
        }
        let mut tx = db.begin().await.unwrap();
        outbox::publish_all(&mut tx, entries).await.unwrap();
        tx.commit().await.unwrap();
        let rows = sqlx::query_as("select event_id, topic, aggregateid, key_hash from outbox order by id");
        let written: Vec<(Uuid, String, Uuid, i32)> = rows.fetch_all(&db).await.unwrap();
        assert_eq!(written, given);
    }

    /// I3: a republished user that was erased gets a tombstone, and a current one its state.
    #[tokio::test]
    async fn states_are_republished_with_their_users_version() {
        let db = testbed::testing::migrated_database(testbed::services::USER, &crate::MIGRATIONS).await;
        let [current, erased] = [mint_id(), mint_id()];
        sqlx::query(
            "insert into users (id, version, email, display_name) values ($1, 7, 'a@b', 'A'), ($2, 9, null, null)",
        )
        .bind(current)
        .bind(erased)
        .execute(&db)
        .await
        .unwrap();
        let mut tx = db.begin().await.unwrap();
        let republished = republish(&mut tx, &[erased, current]).await.unwrap();
        assert_eq!(republish(&mut tx, &[]).await.unwrap().states, 0, "nothing to write");
        tx.commit().await.unwrap();
        assert_eq!((republished.states, republished.tombstones), (1, 1));
        let rows = sqlx::query_as("select aggregateid, version, payload is null from outbox order by id");
        let written: Vec<(Uuid, i64, bool)> = rows.fetch_all(&db).await.unwrap();
        assert_eq!(written, [(current, 7, false), (erased, 9, true)]);
    }
}
