//! The heartbeat of `user.state.v1`. Kafka compacts closed segments only, and a segment is closed by nothing but a record that
//! comes after its time: on a quiet partition an erased address would stay for ever. So each partition gets a record a day: the
//! current state of one of its users, told once more, which no reader takes for news.

use std::collections::BTreeMap;
use std::time::Duration;

use shared::events::{Event, UserState};
use shared::messaging::Wake;
use shared::service::bounded;
use sqlx::PgPool;
use sqlx::postgres::types::PgInterval;
use tokio::time::sleep;
use uuid::Uuid;

use crate::commands;

/// How often it is asked whether a heartbeat is due; more often where the interval is shorter.
const CHECK_INTERVAL: Duration = Duration::from_secs(60);
/// So many of the oldest users are looked through for one in each partition. A partition that has none among them has none at all,
/// or chance has missed it a thousand times.
const CANDIDATES: i64 = 1_000;

pub async fn run(db: PgPool, wake: Wake, interval: Duration) -> anyhow::Result<()> {
    loop {
        match bounded(beat(&db, interval)).await {
            Ok(true) => wake.notify(),
            Ok(false) => {}
            Err(error) => tracing::warn!(%error, "cannot write the heartbeat; trying again later"),
        }
        sleep(interval.min(CHECK_INTERVAL)).await;
    }
}

/// One transaction: the time of the heartbeat and its records. Of many replicas one finds it due: the others wait for its lock on
/// the row and then see the new time. Crash before the commit: it is still due. While Kafka is away the records wait in
/// the outbox, one per partition and interval.
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
    commands::retell(&mut tx, &users).await?;
    tx.commit().await?;
    Ok(true)
}

fn one_per_partition(users: Vec<Uuid>) -> Vec<Uuid> {
    let partitions: BTreeMap<i32, Uuid> =
        users.into_iter().map(|user| (UserState::TOPIC.partition_of(user), user)).collect();
    partitions.into_values().collect()
}
