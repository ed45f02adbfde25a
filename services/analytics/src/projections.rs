//! Facts folded into tables. The folds commute: each fact adds to a sum or sets a minimum, so their order does not matter,
//! and the inbox sees to it that each comes once.

use std::collections::BTreeMap;

use shared::events::{EmailEvent, UserEvent};
use shared::messaging::{Failure, Projection, Record};
use sqlx::PgConnection;
use time::OffsetDateTime;
use uuid::Uuid;

/// `user.events.v1` → `registrations`, `funnel`.
pub struct Registered;

impl Projection for Registered {
    type Event = UserEvent;

    async fn apply(&self, tx: &mut PgConnection, fresh: &[&Record<UserEvent>]) -> Result<(), Failure> {
        let mut hours: BTreeMap<OffsetDateTime, i64> = BTreeMap::new();
        let mut users = BTreeMap::new();
        for record in fresh {
            match record.event {
                UserEvent::Registered(user) => {
                    *hours.entry(hour(record.envelope.time)).or_default() += 1;
                    earliest(&mut users, user.user_id, record.envelope.time);
                }
                UserEvent::ProfileChanged(_) | UserEvent::EmailChanged(_) | UserEvent::Deleted(_) => {}
            }
        }
        count(tx, hours).await?;
        let (users, times): (Vec<_>, Vec<_>) = users.into_iter().unzip();
        sqlx::query!(
            "insert into funnel as stored (user_id, registered_at)
             select * from unnest($1::uuid[], $2::timestamptz[])
             on conflict (user_id) do update set registered_at = least(stored.registered_at, excluded.registered_at)",
            &users,
            &times,
        )
        .execute(tx)
        .await?;
        Ok(())
    }
}

/// `email.events.v1` → `funnel`.
pub struct Mailed;

impl Projection for Mailed {
    type Event = EmailEvent;

    async fn apply(&self, tx: &mut PgConnection, fresh: &[&Record<EmailEvent>]) -> Result<(), Failure> {
        let mut users = BTreeMap::new();
        for record in fresh {
            match &record.event {
                EmailEvent::Sent(delivery) => earliest(&mut users, delivery.user_id, record.envelope.time),
                EmailEvent::Failed(_) => {}
            }
        }
        let (users, times): (Vec<_>, Vec<_>) = users.into_iter().unzip();
        sqlx::query!(
            "insert into funnel as stored (user_id, mailed_at)
             select * from unnest($1::uuid[], $2::timestamptz[])
             on conflict (user_id) do update set mailed_at = least(stored.mailed_at, excluded.mailed_at)",
            &users,
            &times,
        )
        .execute(tx)
        .await?;
        Ok(())
    }
}

/// Rows are written in the order of their keys: two transactions that lock the same rows in opposite orders would deadlock.
async fn count(tx: &mut PgConnection, hours: BTreeMap<OffsetDateTime, i64>) -> sqlx::Result<()> {
    let (hours, registrations): (Vec<_>, Vec<_>) = hours.into_iter().unzip();
    sqlx::query!(
        "insert into registrations as stored (hour, registrations)
         select * from unnest($1::timestamptz[], $2::bigint[])
         on conflict (hour) do update set registrations = stored.registrations + excluded.registrations",
        &hours,
        &registrations,
    )
    .execute(tx)
    .await?;
    Ok(())
}

/// A statement may touch a row once, so what a batch says about a user is folded first.
fn earliest(users: &mut BTreeMap<Uuid, OffsetDateTime>, user: Uuid, time: OffsetDateTime) {
    users.entry(user).and_modify(|known| *known = time.min(*known)).or_insert(time);
}

fn hour(time: OffsetDateTime) -> OffsetDateTime {
    time.to_offset(time::UtcOffset::UTC).truncate_to_hour()
}
