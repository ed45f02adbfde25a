//! A fourth receiver is added while the system runs and clients register users.

use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::Result;
use serde::Serialize;
use sqlx::PgPool;
use testbed::say::say;
use tests::stores::count;

use crate::lines::Changed;
use crate::load;
use crate::plan::{LIGHT, Plan};
use crate::subject::{Side, Subject};

const WAYBILL_PATCH: &str = "tests/compare/waybill-search.patch";
pub const SYNCHRONOUS_PATCH: &str = "tests/compare/synchronous-search.patch";
const POLL: Duration = Duration::from_millis(100);

/// What adding the fourth receiver to a side took.
#[derive(Clone, Debug, Serialize)]
pub struct Added {
    pub side: Side,
    pub changed: Changed,
    /// Processes that ran before and had to be replaced.
    pub restarted: usize,
    /// Registrations during the change, and those that never got 201.
    pub wanted: usize,
    pub refused: usize,
    /// Users from before the change, and those of them in the index at the end.
    pub earlier: usize,
    pub earlier_in_index: usize,
    /// Users from after the start of the change, and those of them that are not in the index at the end.
    pub later: usize,
    pub later_without_entry: usize,
    /// Seconds from the start of the change until the index had what it has at the end.
    pub took: f64,
}

/// Nothing unless `cargo xtask compare` has built the programs with the fourth receiver.
pub async fn measure(side: Side, plan: &Plan, slowest: f64) -> Result<Option<Added>> {
    let Some(programs) = std::env::var_os("WAYBILL_COMPARE_ADDED").map(PathBuf::from) else { return Ok(None) };
    say(format_args!("{:<11} A fourth receiver is added …", side.name()));
    let mut subject = Subject::start(side, false).await;
    let rate = LIGHT * slowest;
    let earlier = load::start(subject.target(), &[(rate, plan.healthy)], plan.repeat).await?;
    let requests = load::start(subject.target(), &[(rate, plan.before + plan.after)], plan.repeat);
    tokio::time::sleep(plan.before).await;
    let begin = Instant::now();
    let index = subject.add_search(&programs).await;
    let requests = requests.await?;
    let took = until_unchanged(&index, begin, plan.quiet).await;
    let indexed = "select user_id from entries";
    let indexed: Vec<uuid::Uuid> = sqlx::query_scalar(indexed).fetch_all(&index).await?;
    let users = "select id from users where email = any($1)";
    let users_of = async |requests: &[load::Registration]| {
        let emails: Vec<&str> = requests.iter().map(|request| request.email.as_str()).collect();
        sqlx::query_scalar::<_, uuid::Uuid>(users).bind(emails).fetch_all(&subject.users().await).await
    };
    let earlier = users_of(&earlier).await?;
    let later = users_of(&requests).await?;
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
        took,
    }))
}

/// Waits until the index has not changed for the time `quiet`. Returns the seconds to its last change.
async fn until_unchanged(index: &PgPool, begin: Instant, quiet: Duration) -> f64 {
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
    (changed - begin).as_secs_f64()
}
