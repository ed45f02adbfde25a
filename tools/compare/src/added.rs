//! A fourth receiver is added while the system runs and clients register users.

use std::collections::BTreeSet;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::Result;
use serde::{Deserialize, Serialize};
use sqlx::PgPool;
use testbed::say::say;
use tests::stores::count;
use uuid::Uuid;

use crate::lines::Changed;
use crate::load;
use crate::plan::{LIGHT, Plan};
use crate::subject::{Side, Subject};

const WAYBILL_PATCH: &str = "tests/compare/waybill-search.patch";
pub const SYNCHRONOUS_PATCH: &str = "tests/compare/synchronous-search.patch";
const POLL: Duration = Duration::from_millis(100);

/// What adding the fourth receiver to a side took.
#[derive(Clone, Debug, Deserialize, Serialize)]
pub struct Added {
    pub side: Side,
    pub changed: Changed,
    /// Processes that ran before and have to be replaced, by the design of the side.
    pub restarted: usize,
    /// Registrations during the change, and those that never got 201.
    pub wanted: usize,
    pub refused: usize,
    /// Users that existed when the change began, and those of them in the index at the end.
    pub earlier: usize,
    pub earlier_in_index: usize,
    /// Users that were registered afterwards, and those of them that are not in the index at the
    /// end.
    pub later: usize,
    pub later_without_entry: usize,
    /// Seconds from the start of the change until the index had all earlier users. `None`: it never
    /// had.
    pub history: Option<f64>,
}

/// Nothing unless `cargo xtask compare` has built the programs with the fourth receiver.
pub async fn measure(side: Side, plan: &Plan, slowest: f64) -> Result<Option<Added>> {
    let Some(programs) = std::env::var_os("WAYBILL_COMPARE_ADDED").map(PathBuf::from) else { return Ok(None) };
    say(format_args!("{:<11} A fourth receiver is added …", side.name()));
    let mut subject = Subject::start(side, false).await;
    let rate = LIGHT * slowest;
    load::start(subject.target(), &[(rate, plan.healthy)], plan.repeat).await?;
    let requests = load::start(subject.target(), &[(rate, plan.before + plan.after)], plan.repeat);
    tokio::time::sleep(plan.before).await;
    let users = subject.users().await;
    let begin = Instant::now();
    let earlier = ids(&users, "select id from users").await?;
    let index = subject.add_search(&programs).await;
    let (requests, history) = tokio::join!(requests, until_has(&index, &earlier, begin, plan.after + plan.quiet));
    let requests = requests?;
    until_unchanged(&index, plan.quiet).await;
    let indexed = ids(&index, "select user_id from entries").await?;
    let mut later = ids(&users, "select id from users").await?;
    later.retain(|user| !earlier.contains(user));
    let synchronous = side != Side::Waybill;
    Ok(Some(Added {
        side,
        changed: Changed::by(if synchronous { SYNCHRONOUS_PATCH } else { WAYBILL_PATCH }),
        restarted: usize::from(synchronous),
        wanted: requests.len(),
        refused: requests.iter().filter(|request| request.answered.is_none()).count(),
        earlier: earlier.len(),
        earlier_in_index: earlier.iter().filter(|user| indexed.contains(user)).count(),
        later: later.len(),
        later_without_entry: later.iter().filter(|user| !indexed.contains(user)).count(),
        history,
    }))
}

async fn ids(db: &PgPool, query: &'static str) -> sqlx::Result<BTreeSet<Uuid>> {
    Ok(sqlx::query_scalar(query).fetch_all(db).await?.into_iter().collect())
}

/// Waits until the index has these users. Returns the seconds since `begin`.
async fn until_has(index: &PgPool, users: &BTreeSet<Uuid>, begin: Instant, limit: Duration) -> Option<f64> {
    let users: Vec<Uuid> = users.iter().copied().collect();
    let having = "select count(*) from entries where user_id = any($1)";
    while begin.elapsed() < limit {
        let found: i64 = sqlx::query_scalar(having).bind(&users).fetch_one(index).await.unwrap();
        if found == users.len() as i64 {
            return Some(begin.elapsed().as_secs_f64());
        }
        tokio::time::sleep(POLL).await;
    }
    None
}

/// Waits until the index has not changed for the time `quiet`.
async fn until_unchanged(index: &PgPool, quiet: Duration) {
    let mut entries = -1;
    let mut changed = Instant::now();
    while changed.elapsed() < quiet {
        let found = count(index, "select count(*) from entries").await;
        if found != entries {
            entries = found;
            changed = Instant::now();
        }
        tokio::time::sleep(POLL).await;
    }
}
