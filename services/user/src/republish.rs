//! `user republish`: tells the current state of users once more, for a `user.state.v1` that lost records, or a new one that has
//! none. Whoever has a state already sees its version and leaves it.

use std::time::Duration;

use anyhow::{Context, ensure};
use shared::fault;
use shared::messaging::outbox;
use sqlx::PgPool;
use tokio::time::{Instant, sleep};
use uuid::Uuid;

use crate::commands::{self, Retold};

/// Users per transaction: locked for some hundred milliseconds, which a command that meets the lock waits out.
const BATCH_USERS: i64 = 500;
/// With more rows than this in the outbox the relay is left to work first: all users at once would fill the database.
const OUTBOX_ROWS: i64 = 2_000;
const ROOM_INTERVAL: Duration = Duration::from_millis(50);
/// How often it is said that the relay makes no room.
const SAY_INTERVAL: Duration = Duration::from_secs(5);

/// The subcommand `republish`.
#[derive(clap::Args, Clone)]
pub struct Republish {
    /// Only this user.
    #[arg(long, conflicts_with = "after")]
    user: Option<Uuid>,
    /// Go on behind this user, which is the last one that a run named before it was cut off.
    #[arg(long)]
    after: Option<Uuid>,
}

/// Writes the states to the outbox, from where the relay of a running service takes them.
///
/// Crash: a batch is in the outbox or it is not, and a state that is told twice is known by its version. So a run that was cut
/// off is run again, from the beginning or `--after` its last line. Whoever registers meanwhile tells their own state.
#[expect(clippy::print_stdout, reason = "it is what the subcommand answers")]
pub async fn republish(db: &PgPool, options: &Republish) -> anyhow::Result<()> {
    let mut total = Retold::default();
    if let Some(user) = options.user {
        total = batch(db, &[user]).await?;
        ensure!(total.states + total.tombstones == 1, "--user {user}: nobody was ever registered under this id");
    } else {
        let last = sqlx::query_scalar!("select id from users order by id desc limit 1").fetch_optional(db).await?;
        let mut after = options.after.unwrap_or(Uuid::nil());
        while let Some(users) = next(db, after, last).await? {
            until_there_is_room(db).await?;
            let go_on = || format!("cut off; nothing is wrong with what was written: go on with --after {after}");
            let retold = batch(db, &users).await.with_context(go_on)?;
            total.states += retold.states;
            total.tombstones += retold.tombstones;
            after = users[users.len() - 1];
            println!("{} users, the last one is {after}", total.states + total.tombstones);
        }
    }
    println!("republished: {} states, {} tombstones", total.states, total.tombstones);
    Ok(())
}

/// The next users in the order of their ids; `None` behind `last`.
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

async fn batch(db: &PgPool, users: &[Uuid]) -> anyhow::Result<Retold> {
    let mut tx = db.begin().await?;
    let retold = commands::retell(&mut tx, users).await?;
    fault::point("republish.before_commit");
    tx.commit().await?;
    Ok(retold)
}

/// Waits for as long as it takes: the relay goes on when Kafka does.
#[expect(clippy::print_stdout, reason = "whoever looks on should know why nothing happens")]
async fn until_there_is_room(db: &PgPool) -> sqlx::Result<()> {
    let mut said = Instant::now();
    while outbox::waiting(db, OUTBOX_ROWS).await? >= OUTBOX_ROWS {
        if said.elapsed() > SAY_INTERVAL {
            println!("the outbox is full: waiting until a running user service has published it, so is Kafka there?");
            said = Instant::now();
        }
        sleep(ROOM_INTERVAL).await;
    }
    Ok(())
}
