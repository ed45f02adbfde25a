//! `user republish`: publishes the current state of users again, for a `user.state.v1` that lost
//! records, or for a new one. A reader that already has a state recognises its version and ignores
//! it.

use std::time::Duration;

use anyhow::{Context, ensure};
use shared::events::{Event, UserState};
use shared::fault;
use shared::messaging::outbox;
use sqlx::PgPool;
use tokio::time::{Instant, sleep};
use uuid::Uuid;

use crate::commands::{self, Republished};

/// Users per transaction. They are locked for a few hundred milliseconds, and a command on one of
/// them waits for that long.
const BATCH_USERS: i64 = 500;
/// The command waits while the outbox has this many rows of the state topic: all users at once
/// would fill the database.
const OUTBOX_LIMIT: i64 = 2_000;
const ROOM_POLL_INTERVAL: Duration = Duration::from_millis(50);
/// How often the command reports that it waits.
const REPORT_INTERVAL: Duration = Duration::from_secs(5);

/// The subcommand `republish`.
#[derive(clap::Args, Clone)]
pub struct Republish {
    /// Only this user.
    #[arg(long, conflicts_with = "after")]
    user: Option<Uuid>,
    /// Continue after this user: the last one that an interrupted run printed.
    #[arg(long)]
    after: Option<Uuid>,
}

/// Writes the states to the outbox. The relay of a running service publishes them.
///
/// Crash: a batch is in the outbox completely or not at all, and readers recognise a repeated state
/// by its version. So run the command again, from the beginning or with `--after` and the last
/// printed user. Users who register in the meantime publish their own state.
#[expect(clippy::print_stdout, reason = "the output of the subcommand")]
pub async fn republish(db: &PgPool, options: &Republish) -> anyhow::Result<()> {
    let mut total = Republished::default();
    if let Some(user) = options.user {
        total = batch(db, &[user]).await?;
        ensure!(total.states + total.tombstones == 1, "--user {user}: no user was ever registered with this id");
    } else {
        let last = sqlx::query_scalar!("select id from users order by id desc limit 1").fetch_optional(db).await?;
        let mut after = options.after.unwrap_or(Uuid::nil());
        while let Some(users) = next(db, after, last).await? {
            until_there_is_room(db).await?;
            let resume = || format!("interrupted; what was written is correct: continue with --after {after}");
            let batch = batch(db, &users).await.with_context(resume)?;
            total.states += batch.states;
            total.tombstones += batch.tombstones;
            after = users[users.len() - 1];
            println!("{} users, the last one is {after}", total.states + total.tombstones);
        }
    }
    println!("republished: {} states, {} tombstones", total.states, total.tombstones);
    Ok(())
}

/// The next users in the order of their ids; `None` after `last`.
async fn next(db: &PgPool, after: Uuid, last: Option<Uuid>) -> sqlx::Result<Option<Vec<Uuid>>> {
    let users = sqlx::query_scalar!(
        "select id from users where id > $1 and id <= $2 order by id limit $3",
        after,
        last.unwrap_or(Uuid::nil()),
        BATCH_USERS
    );
    let users = users.fetch_all(db).await?;
    Ok((!users.is_empty()).then_some(users))
}

async fn batch(db: &PgPool, users: &[Uuid]) -> anyhow::Result<Republished> {
    let mut tx = db.begin().await?;
    let republished = commands::republish(&mut tx, users).await?;
    fault::point("republish.before_commit");
    tx.commit().await?;
    Ok(republished)
}

/// Waits indefinitely: the relay continues when Kafka is back.
#[expect(clippy::print_stdout, reason = "the output of the subcommand")]
async fn until_there_is_room(db: &PgPool) -> sqlx::Result<()> {
    let mut reported_at = Instant::now();
    while outbox::waiting::<UserState>(db, OUTBOX_LIMIT).await? >= OUTBOX_LIMIT {
        if reported_at.elapsed() > REPORT_INTERVAL {
            println!(
                "the outbox has {OUTBOX_LIMIT} rows of {}; waiting for the user service to publish them (is Kafka reachable, \
                 and does it accept records of this topic?)",
                UserState::TOPIC.name
            );
            reported_at = Instant::now();
        }
        sleep(ROOM_POLL_INTERVAL).await;
    }
    Ok(())
}
