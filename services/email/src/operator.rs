//! Deliveries that wait for an operator, and the subcommands that release them.
//!
//! - `held`: the event that caused the mail is old. Most likely it comes from a replayed history (a
//!   lost database, a group that starts from the beginning), and the mail was sent before.
//! - `failed`: the server refused the mail permanently. If the reason was on our side, the mails
//!   can be sent after it is corrected.
//! - `unknown` without a next attempt: the server's answer was lost several times. Each attempt may
//!   have delivered a copy.
//!
//! A command releases what waits now. A setting would stay on and release the next ones too. The
//! running service sends the released mails.
//!
//! Crash in the middle of a command: some deliveries are released and others are not, and the next
//! call releases the rest.

use std::time::Duration;

use shared::platform::settings::number;
use sqlx::PgPool;
use time::OffsetDateTime;
use time::format_description::well_known::Rfc3339;
use uuid::Uuid;

use crate::deliveries::interval;

/// Deliveries per statement. A whole history would exceed the time-out of a statement.
const BATCH: i64 = 5_000;
/// Deliveries that stay held are counted up to this number.
const COUNT_LIMIT: i64 = 10_000;

/// The subcommand `send-held`. It requires at least one bound: without any it would mail a whole
/// replayed history.
#[derive(clap::Args, Clone)]
#[group(required = true, multiple = true)]
pub struct SendHeld {
    /// Send mails whose event is younger than this, for example 96 if this service was down for
    /// four days.
    #[arg(long, value_parser = number::<u32>(1..=87_600))]
    younger_than_hours: Option<u32>,
    /// Send the mails of this user.
    #[arg(long)]
    user: Option<Uuid>,
}

/// The subcommand `retry-failed`.
#[derive(clap::Args, Clone)]
pub struct RetryFailed {
    /// Only mails that the server refused with this code, for example 554.
    #[arg(long, value_parser = number::<i16>(500..=599))]
    code: Option<i16>,
    #[command(flatten)]
    which: Which,
}

/// The subcommand `retry-unknown`.
#[derive(clap::Args, Clone)]
pub struct RetryUnknown {
    #[command(flatten)]
    which: Which,
}

#[derive(clap::Args, Clone)]
struct Which {
    /// Only mails whose last attempt was at this time or later, for example 2026-11-26T18:00:00Z.
    #[arg(long, value_parser = instant)]
    since: Option<OffsetDateTime>,
    /// Only count the mails.
    #[arg(long)]
    dry_run: bool,
}

fn instant(text: &str) -> Result<OffsetDateTime, &'static str> {
    OffsetDateTime::parse(text, &Rfc3339).map_err(|_| "not a time as in RFC 3339, for example 2026-11-26T18:00:00Z")
}

/// Releases held deliveries. A released delivery stays released, however often it is retried.
#[expect(clippy::print_stdout, reason = "the output of the subcommand")]
pub async fn send_held(db: &PgPool, options: &SendHeld) -> anyhow::Result<()> {
    let age = options.younger_than_hours.map(|hours| interval(Duration::from_secs(u64::from(hours) * 3600)));
    let released = in_batches(async || {
        let batch = sqlx::query!(
            "with batch as (
                 select id, user_id from deliveries
                 where status = 'held' and ($1::interval is null or requested_at > now() - $1)
                     and ($2::uuid is null or user_id = $2)
                 limit $3 for update)
             update deliveries d set released_at = now(), updated_at = now(),
                 status = case when r.email is null then 'unaddressed' else 'pending' end,
                 due_at = case when r.email is not null then now() end
             from batch left join recipients r using (user_id) where d.id = batch.id",
            age.clone(),
            options.user,
            BATCH
        );
        Ok(batch.execute(db).await?.rows_affected())
    })
    .await?;
    let held = sqlx::query_scalar!(
        r#"select count(*) as "held!" from (select from deliveries where status = 'held' limit $1) held"#,
        COUNT_LIMIT
    );
    let held = held.fetch_one(db).await?;
    let at_least = if held == COUNT_LIMIT { "at least " } else { "" };
    println!("{released} released, to be sent by the running service; {at_least}{held} still held");
    Ok(())
}

/// Sends failed mails again, except those to users who were erased. The next ending of such a
/// delivery is published with its next version: `email.sent` after `email.failed` means sent.
#[expect(clippy::print_stdout, reason = "the output of the subcommand")]
pub async fn retry_failed(db: &PgPool, options: &RetryFailed) -> anyhow::Result<()> {
    let Which { since, dry_run } = options.which;
    if dry_run {
        let count = sqlx::query_scalar!(
            r#"select count(*) as "count!" from deliveries join recipients r using (user_id)
               where status = 'failed' and ($1::smallint is null or smtp_code = $1)
                   and ($2::timestamptz is null or deliveries.updated_at >= $2) and r.email is not null"#,
            options.code,
            since
        );
        println!("{} failed mails would be sent again", count.fetch_one(db).await?);
        return Ok(());
    }
    let released = in_batches(async || {
        let batch = sqlx::query!(
            "update deliveries set status = 'pending', due_at = now(), released_at = now(), updated_at = now(),
                 refusals = 0, unknowns = 0
             where id in (
                 select d.id from deliveries d join recipients r using (user_id)
                 where d.status = 'failed' and ($1::smallint is null or d.smtp_code = $1)
                     and ($2::timestamptz is null or d.updated_at >= $2) and r.email is not null
                 limit $3 for update of d)",
            options.code,
            since,
            BATCH
        );
        Ok(batch.execute(db).await?.rows_affected())
    })
    .await?;
    println!("{released} failed mails released, to be sent by the running service");
    Ok(())
}

/// Sends mails again whose answer was lost several times. Each recipient may get one more copy,
/// with the same Message-ID.
#[expect(clippy::print_stdout, reason = "the output of the subcommand")]
pub async fn retry_unknown(db: &PgPool, options: &RetryUnknown) -> anyhow::Result<()> {
    let Which { since, dry_run } = options.which;
    if dry_run {
        let count = sqlx::query_scalar!(
            r#"select count(*) as "count!" from deliveries
               where status = 'unknown' and due_at is null and ($1::timestamptz is null or updated_at >= $1)"#,
            since
        );
        println!("{} mails with a lost answer would be sent again", count.fetch_one(db).await?);
        return Ok(());
    }
    let released = in_batches(async || {
        let batch = sqlx::query!(
            "update deliveries set due_at = now(), released_at = now(), updated_at = now(), refusals = 0, unknowns = 0
             where id in (
                 select id from deliveries
                 where status = 'unknown' and due_at is null and ($1::timestamptz is null or updated_at >= $1)
                 limit $2 for update)",
            since,
            BATCH
        );
        Ok(batch.execute(db).await?.rows_affected())
    })
    .await?;
    println!("{released} mails with a lost answer released, to be sent by the running service");
    Ok(())
}

/// Repeats a statement that changes up to [`BATCH`] deliveries until it finds no more. Returns how
/// many it changed in all.
async fn in_batches(change: impl AsyncFn() -> sqlx::Result<u64>) -> sqlx::Result<u64> {
    let mut all = 0;
    loop {
        let changed = change().await?;
        all += changed;
        if changed < BATCH.unsigned_abs() {
            return Ok(all);
        }
    }
}
