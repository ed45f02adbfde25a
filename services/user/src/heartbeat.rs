//! The heartbeat of `user.state.v1`. Kafka compacts only closed segments, and only a later record
//! closes a segment. So on a quiet partition an erased address would stay permanently. The user
//! service therefore writes one record per partition per day: the current state of one of its
//! users, published again unchanged. Readers ignore it because they already have that version.

use std::collections::BTreeMap;
use std::time::Duration;

use shared::events::{Event, UserState};
use shared::messaging::Wake;
use shared::platform::database::bounded;
use sqlx::PgPool;
use sqlx::postgres::types::PgInterval;
use tokio::time::sleep;
use uuid::Uuid;

use crate::commands;

/// How often the service checks whether a heartbeat is due. A shorter heartbeat interval also
/// shortens this one.
const CHECK_INTERVAL: Duration = Duration::from_secs(60);
/// How many of the oldest users are searched for one user per partition. Among a thousand users it
/// is practically certain that every partition has one.
const CANDIDATES: i64 = 1_000;

pub async fn run(db: PgPool, wake: Wake, interval: Duration) -> anyhow::Result<()> {
    loop {
        match bounded(beat(&db, interval)).await {
            Ok(true) => wake.notify(),
            Ok(false) => {}
            Err(error) => tracing::warn!(%error, "cannot write the heartbeat; will retry"),
        }
        sleep(interval.min(CHECK_INTERVAL)).await;
    }
}

/// Writes the heartbeat, if it is due. Its time and its records are one transaction. Only one
/// replica finds it due: the others wait for the lock on the row and then see the new time. Crash
/// before the commit: the heartbeat is still due. While Kafka is down the records wait in the
/// outbox, one per partition and interval.
async fn beat(db: &PgPool, interval: Duration) -> sqlx::Result<bool> {
    let mut tx = db.begin().await?;
    let due = sqlx::query!(
        "update heartbeats set beaten_at = now() where topic = $1 and beaten_at <= now() - $2::interval",
        UserState::TOPIC.name,
        PgInterval::try_from(interval).expect("a whole number of milliseconds"),
    );
    if due.execute(&mut *tx).await?.rows_affected() == 0 {
        return Ok(false);
    }
    let users = sqlx::query_scalar!("select id from users order by id limit $1", CANDIDATES);
    let users = one_per_partition(users.fetch_all(&mut *tx).await?);
    commands::republish(&mut tx, &users).await?;
    tx.commit().await?;
    Ok(true)
}

fn one_per_partition(users: Vec<Uuid>) -> Vec<Uuid> {
    let partitions: BTreeMap<i32, Uuid> =
        users.into_iter().map(|user| (UserState::TOPIC.partition_of(user), user)).collect();
    partitions.into_values().collect()
}
