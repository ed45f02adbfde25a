//! Deliveries that wait for an operator, and the subcommands that release them.
//!
//! - `held`: the event that caused the mail is old. Most likely it comes from a replayed history (a
//!   lost database, a group that starts from the beginning), and the mail was sent before.
//! - `failed`: the server refused the mail permanently, or deferred it until it was too old. If the
//!   reason was on our side, the mails can be sent after it is corrected.
//! - `unknown` without a next attempt: the server's answer was lost several times. Each attempt may
//!   have delivered a copy.
//!
//! A command releases what waits now. A setting would stay on and release the next ones too. The
//! running service sends the released mails.
//!
//! Crash in the middle of a command: some deliveries are released and others are not, and the next
//! call releases the rest.

use std::ops::RangeInclusive;
use std::time::Duration;

use shared::platform::settings::number;
use sqlx::postgres::types::PgInterval;
use sqlx::{PgConnection, PgPool};
use time::OffsetDateTime;
use time::format_description::well_known::Rfc3339;
use uuid::Uuid;

use crate::deliveries::{self, interval};

/// Deliveries per statement. A whole history would exceed the time-out of a statement.
const BATCH: i64 = 5_000;
/// Deliveries that stay as they are, are counted up to this number.
const COUNT_LIMIT: i64 = 10_000;
/// The codes with which a mail server refuses or defers a mail.
const CODES: RangeInclusive<i16> = 400..=599;

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
    /// Only mails that failed with this code of the server, for example 554.
    #[arg(long, value_parser = number::<i16>(CODES))]
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
    let mut all = 0;
    loop {
        let mut tx = db.begin().await?;
        let Released { found, released } = release_held(&mut tx, age, options.user).await?;
        tx.commit().await?;
        all += released;
        if found < BATCH.unsigned_abs() {
            break;
        }
    }
    let held = sqlx::query_scalar!(
        r#"select count(*) as "held!" from (select from deliveries where status = 'held' limit $1) held"#,
        COUNT_LIMIT
    );
    let held = counted(held.fetch_one(db).await?);
    println!("{all} released, to be sent by the running service; {held} still held");
    Ok(())
}

/// A batch of held deliveries: how many were found, and how many of them were released. The others
/// changed between the two statements.
pub struct Released {
    pub found: u64,
    pub released: u64,
}

/// Releases a batch of held deliveries whose events are younger than `age`, in the caller's
/// transaction. A released delivery waits for the address if it is not known, so the recipients are
/// locked before the deliveries, as in the [handlers](crate::handlers). Otherwise the handler of
/// the address, at the same time, would not see that the delivery waits for it.
pub async fn release_held(
    tx: &mut PgConnection,
    age: Option<PgInterval>,
    user: Option<Uuid>,
) -> sqlx::Result<Released> {
    let held = sqlx::query!(
        "select id, user_id from deliveries
         where status = 'held' and ($1::interval is null or requested_at > now() - $1)
             and ($2::uuid is null or user_id = $2)
         limit $3",
        age,
        user,
        BATCH
    );
    let held = held.fetch_all(&mut *tx).await?;
    let ids: Vec<Uuid> = held.iter().map(|delivery| delivery.id).collect();
    let mut users: Vec<Uuid> = held.iter().map(|delivery| delivery.user_id).collect();
    users.sort();
    users.dedup();
    deliveries::lock_recipients(tx, &users).await?;
    let released = sqlx::query!(
        "update deliveries d set released_at = now(), updated_at = now(),
             status = case when r.email is null then 'unaddressed' else 'pending' end,
             due_at = case when r.email is not null then now() end
         from recipients r
         where d.id = any($1) and d.status = 'held' and r.user_id = d.user_id",
        &ids
    );
    let released = released.execute(tx).await?.rows_affected();
    Ok(Released { found: ids.len() as u64, released })
}

/// Sends failed mails again, except those to users who were erased. The next ending of such a
/// delivery is published with its next version: `email.sent` after `email.failed` means sent.
///
/// The failed mails of each code are read once, in the order in which they failed and up to now: a
/// mail that fails again while the command runs is not released twice.
#[expect(clippy::print_stdout, reason = "the output of the subcommand")]
pub async fn retry_failed(db: &PgPool, options: &RetryFailed) -> anyhow::Result<()> {
    let Which { since, dry_run } = options.which;
    let until = sqlx::query_scalar!(r#"select now() as "now!""#).fetch_one(db).await?;
    let codes = options.code.map_or(CODES, |code| code..=code);
    let mut all = 0;
    for code in codes {
        let mut after = Position { failed_at: since.unwrap_or(OffsetDateTime::UNIX_EPOCH), id: Uuid::nil() };
        while let Some(batch) = failed(db, code, &after, until).await? {
            after = batch.last;
            all += if dry_run { batch.ids.len() as u64 } else { release_failed(db, &batch.ids).await? };
        }
    }
    if dry_run {
        println!("{all} failed mails would be sent again");
    } else {
        println!("{all} failed mails released, to be sent by the running service");
    }
    Ok(())
}

/// A place among the failed deliveries of a code.
struct Position {
    failed_at: OffsetDateTime,
    id: Uuid,
}

/// Failed deliveries to users who are not erased.
struct Failed {
    ids: Vec<Uuid>,
    /// The last delivery that was read, also if its user is erased.
    last: Position,
}

/// The next batch of the deliveries that failed with a code. The code is a value, not an option: a
/// plan for any option could not use the index.
async fn failed(db: &PgPool, code: i16, after: &Position, until: OffsetDateTime) -> sqlx::Result<Option<Failed>> {
    let rows = sqlx::query!(
        r#"select id, updated_at,
               exists (select from recipients r where r.user_id = d.user_id and r.email is not null) as "addressed!"
           from deliveries d
           where status = 'failed' and smtp_code = $1 and (updated_at, id) > ($2, $3) and updated_at <= $4
           order by updated_at, id limit $5"#,
        code,
        after.failed_at,
        after.id,
        until,
        BATCH
    );
    let rows = rows.fetch_all(db).await?;
    let Some(last) = rows.last() else { return Ok(None) };
    let last = Position { failed_at: last.updated_at, id: last.id };
    Ok(Some(Failed { ids: rows.iter().filter(|row| row.addressed).map(|row| row.id).collect(), last }))
}

/// Releases failed deliveries. If a user was erased in the meantime, the claim cancels the
/// delivery.
async fn release_failed(db: &PgPool, ids: &[Uuid]) -> sqlx::Result<u64> {
    let released = sqlx::query!(
        "update deliveries set status = 'pending', due_at = now(), released_at = now(), updated_at = now(),
             refusals = 0, unknowns = 0
         where id = any($1) and status = 'failed'",
        ids
    );
    Ok(released.execute(db).await?.rows_affected())
}

/// Sends mails again whose answer was lost several times. Each recipient may get one more copy,
/// with the same Message-ID. A mail whose answers are lost again while the command runs is not
/// released twice. If the command is killed between two batches, the next call continues.
#[expect(clippy::print_stdout, reason = "the output of the subcommand")]
pub async fn retry_unknown(db: &PgPool, options: &RetryUnknown) -> anyhow::Result<()> {
    let Which { since, dry_run } = options.which;
    let since = since.unwrap_or(OffsetDateTime::UNIX_EPOCH);
    if dry_run {
        let count = sqlx::query_scalar!(
            r#"select count(*) as "count!" from (
                   select from deliveries where status = 'unknown' and due_at is null and updated_at >= $1 limit $2)
               waiting"#,
            since,
            COUNT_LIMIT
        );
        println!("{} mails with a lost answer would be sent again", counted(count.fetch_one(db).await?));
        return Ok(());
    }
    let until = sqlx::query_scalar!(r#"select now() as "now!""#).fetch_one(db).await?;
    let mut all = 0;
    // Each batch begins after the last one. The index alone answers the search; together with the
    // update Postgres would read all rows and sort them.
    let mut last = (since, Uuid::nil());
    loop {
        let batch = sqlx::query!(
            "select id, updated_at from deliveries
             where status = 'unknown' and due_at is null and (updated_at, id) > ($1, $2)
                 and updated_at <= $3
             order by updated_at, id limit $4",
            last.0,
            last.1,
            until,
            BATCH
        );
        let batch = batch.fetch_all(db).await?;
        let Some(end) = batch.last() else { break };
        last = (end.updated_at, end.id);
        let batch: Vec<Uuid> = batch.iter().map(|row| row.id).collect();
        let released = sqlx::query!(
            "update deliveries set due_at = now(), released_at = now(), updated_at = now(), refusals = 0, unknowns = 0
             where id = any($1) and status = 'unknown' and due_at is null",
            &batch
        );
        all += released.execute(db).await?.rows_affected();
    }
    println!("{all} mails with a lost answer released, to be sent by the running service");
    Ok(())
}

/// A number that was counted up to [`COUNT_LIMIT`].
fn counted(count: i64) -> String {
    if count == COUNT_LIMIT { format!("at least {count}") } else { count.to_string() }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{blocks_read, one_session};

    /// Inserts deliveries that have ended or wait with this state.
    async fn insert(db: &PgPool, count: i64, status: &str, code: Option<i16>) {
        let insert = "
            with users as (
                insert into recipients (user_id, version, email)
                select gen_random_uuid(), 1, 'ada@example.com' from generate_series(1, $1) returning user_id)
            insert into deliveries (id, user_id, template, version, status, requested_at, smtp_code)
            select gen_random_uuid(), user_id, 'welcome', 1, $2, now(), $3 from users";
        sqlx::query(insert).bind(count).bind(status).bind(code).execute(db).await.unwrap();
    }

    async fn pending(db: &PgPool) -> i64 {
        sqlx::query_scalar("select count(*) from deliveries where due_at is not null").fetch_one(db).await.unwrap()
    }

    const WHICH: Which = Which { since: None, dry_run: false };

    /// A command reads what it releases, and not what else has failed or waits. A statement that
    /// reads everything does not end within its time-out when there is much of it.
    #[tokio::test]
    async fn a_command_reads_few_blocks_whatever_else_waits() {
        let db = one_session().await;
        insert(&db, 20_000, "failed", Some(550)).await;
        insert(&db, 20_000, "sent", Some(250)).await;
        insert(&db, 5, "failed", Some(554)).await;
        insert(&db, 5, "unknown", None).await;
        sqlx::query("vacuum analyze").execute(&db).await.unwrap();
        let due = pending(&db).await;
        let before = blocks_read(&db).await;
        retry_failed(&db, &RetryFailed { code: Some(554), which: Which { dry_run: true, ..WHICH } }).await.unwrap();
        retry_failed(&db, &RetryFailed { code: Some(554), which: WHICH }).await.unwrap();
        let read = blocks_read(&db).await - before;
        assert!((1..200).contains(&read), "retry-failed read {read} blocks");
        assert_eq!(pending(&db).await - due, 5, "deliveries released by retry-failed");
        let before = blocks_read(&db).await;
        retry_unknown(&db, &RetryUnknown { which: WHICH }).await.unwrap();
        let read = blocks_read(&db).await - before;
        assert!((1..200).contains(&read), "retry-unknown read {read} blocks");
        assert_eq!(pending(&db).await - due, 10, "deliveries released by both commands");
    }

    /// More than a batch, with the same time, codes of both kinds, and users who were erased.
    #[tokio::test]
    async fn every_failed_mail_to_a_user_who_is_not_erased_is_released_once() {
        let db = one_session().await;
        let batch_and_more = BATCH + 7;
        insert(&db, batch_and_more, "failed", Some(550)).await;
        sqlx::query("update recipients set version = 2, email = null").execute(&db).await.unwrap();
        insert(&db, batch_and_more, "failed", Some(550)).await;
        insert(&db, 3, "failed", Some(450)).await;
        retry_failed(&db, &RetryFailed { code: None, which: Which { dry_run: true, ..WHICH } }).await.unwrap();
        assert_eq!(pending(&db).await, 0, "deliveries released by a dry run");
        retry_failed(&db, &RetryFailed { code: None, which: WHICH }).await.unwrap();
        assert_eq!(pending(&db).await, batch_and_more + 3, "released deliveries");
    }
}
