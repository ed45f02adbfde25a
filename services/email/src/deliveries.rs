//! The states of deliveries. Every transition is one statement or one transaction that names the
//! state it comes from, so two senders cannot both make it.
//!
//! ```text
//! pending ──claim──► sending ──250──► sent
//!    ▲                  ├── 5xx ────► failed
//!    ├── 4xx, no answer ┤
//!    └ unknown ◄────────┘ no answer after the mail was sent
//! ```
//! A sender that dies leaves the state `sending` with a lease. When the lease ends, by the
//! database's clock, another sender claims the delivery. If the recipient is erased, a delivery
//! that is not being sent becomes `cancelled`. A delivery that is too old is [`held`](crate::held).

use std::time::Duration;

use shared::events::{Delivery, EmailEvent, Undelivered, mint_id};
use shared::messaging::outbox;
use sqlx::PgPool;
use sqlx::postgres::types::PgInterval;
use uuid::Uuid;

const MAX_BACKOFF: Duration = Duration::from_secs(600);

/// Limits of a delivery.
#[derive(Clone, Copy)]
pub struct Rules {
    pub lease: Duration,
    pub backoff: Duration,
    pub max_age: Duration,
}

/// A delivery that this sender may send until its lease ends.
pub struct Claim {
    pub id: Uuid,
    pub user_id: Uuid,
    pub template: String,
    pub attempt: i32,
    pub traceparent: Option<String>,
    pub tracestate: Option<String>,
    pub email: String,
    pub display_name: String,
    /// Proves that no other sender has claimed the delivery since.
    pub token: Uuid,
}

/// Claims the delivery that has waited longest, among those that may be sent:
///
/// - It is due.
/// - Its recipient is known and not erased.
/// - Its cause is not too old, or an operator released it.
/// - No other sender has it, or the lease of that sender has ended.
pub async fn claim(db: &PgPool, rules: &Rules) -> sqlx::Result<Option<Claim>> {
    let token = mint_id();
    let claimed = sqlx::query_as!(
        Claim,
        r#"update deliveries d
           set status = 'sending', attempt = attempt + 1, token = $1, lease_until = now() + $2, updated_at = now()
           from (select d.id, r.email, r.display_name
                 from deliveries d join recipients r using (user_id)
                 where d.status in ('pending', 'unknown', 'sending') and d.next_attempt_at <= now()
                     and (d.status <> 'sending' or d.lease_until < now())
                     and r.email is not null and (d.released_at is not null or d.requested_at > now() - $3::interval)
                 order by d.next_attempt_at limit 1 for update of d skip locked) due
           where d.id = due.id
           returning d.id, d.user_id, d.template, d.attempt, d.traceparent, d.tracestate,
               due.email as "email!", due.display_name as "display_name!", d.token as "token!""#,
        token,
        interval(rules.lease),
        interval(rules.max_age),
    );
    claimed.fetch_optional(db).await
}

/// Whether the sender may still send the mail, which cannot be undone. It may not if its lease has
/// ended because it was frozen, or if the recipient was erased in the meantime.
pub async fn still_ours(db: &PgPool, claim: &Claim) -> sqlx::Result<bool> {
    let ours = sqlx::query_scalar!(
        r#"select exists (
               select from deliveries d join recipients r using (user_id)
               where d.id = $1 and d.token = $2 and d.lease_until > now() and r.email is not null) as "ours!""#,
        claim.id,
        claim.token,
    );
    ours.fetch_one(db).await
}

/// Records that the server accepted the mail. Also succeeds after the lease has ended, so that the
/// sender that took over fails its check and stops. Returns whether this call changed the state. It
/// writes the event only then, so a delivery has one event.
pub async fn sent(db: &PgPool, claim: &Claim) -> sqlx::Result<bool> {
    let mut tx = db.begin().await?;
    let ended = sqlx::query!(
        "update deliveries set status = 'sent', token = null, lease_until = null, smtp_code = 250, updated_at = now()
         where id = $1 and status not in ('sent', 'failed')",
        claim.id,
    );
    let ended = ended.execute(&mut *tx).await?.rows_affected() == 1;
    if ended {
        outbox::publish(&mut tx, claim.id, FINAL_VERSION, &EmailEvent::Sent(claim.delivery())).await?;
    }
    tx.commit().await?;
    Ok(ended)
}

/// Records that the server refused the mail permanently, unless the lease has ended and another
/// sender has the delivery. Returns whether this call changed the state.
pub async fn failed(db: &PgPool, claim: &Claim, smtp_code: u16) -> sqlx::Result<bool> {
    let mut tx = db.begin().await?;
    let ended = sqlx::query!(
        "update deliveries set status = 'failed', token = null, lease_until = null, smtp_code = $3, updated_at = now()
         where id = $1 and token = $2",
        claim.id,
        claim.token,
        code(smtp_code),
    );
    let ended = ended.execute(&mut *tx).await?.rows_affected() == 1;
    if ended {
        let event = EmailEvent::Failed(Undelivered { delivery: claim.delivery(), smtp_code });
        outbox::publish(&mut tx, claim.id, FINAL_VERSION, &event).await?;
    }
    tx.commit().await?;
    Ok(ended)
}

/// Why a delivery is retried.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum RetryAs {
    /// The server has not accepted the mail.
    Pending,
    /// The server may have accepted the mail.
    Unknown,
}

/// Schedules another attempt, after a back-off that doubles with each attempt.
pub async fn retry_later(
    db: &PgPool,
    claim: &Claim,
    rules: &Rules,
    retry_as: RetryAs,
    smtp_code: Option<u16>,
) -> sqlx::Result<()> {
    let doublings = u32::try_from(claim.attempt - 1).unwrap_or(0).min(20);
    let backoff = rules.backoff.saturating_mul(1 << doublings).min(MAX_BACKOFF);
    let status = match retry_as {
        RetryAs::Pending => "pending",
        RetryAs::Unknown => "unknown",
    };
    sqlx::query!(
        "update deliveries set status = $3, token = null, lease_until = null, smtp_code = $4,
             next_attempt_at = now() + $5, updated_at = now()
         where id = $1 and token = $2",
        claim.id,
        claim.token,
        status,
        smtp_code.map(code),
        interval(backoff),
    )
    .execute(db)
    .await?;
    Ok(())
}

/// Cancels the deliveries to erased recipients that are not being sent at the moment.
pub async fn cancel_erased(db: &PgPool) -> sqlx::Result<u64> {
    let cancelled = sqlx::query!(
        "update deliveries d set status = 'cancelled', token = null, lease_until = null, updated_at = now()
         from recipients r
         where r.user_id = d.user_id and r.email is null
             and (d.status in ('pending', 'unknown') or (d.status = 'sending' and d.lease_until < now()))"
    );
    Ok(cancelled.execute(db).await?.rows_affected())
}

/// The version of a delivery's event. A delivery ends once, so it has one event.
const FINAL_VERSION: i64 = 1;

impl Claim {
    fn delivery(&self) -> Delivery {
        Delivery { delivery_id: self.id, user_id: self.user_id, template: self.template.clone() }
    }
}

fn code(smtp_code: u16) -> i16 {
    i16::try_from(smtp_code).expect("SMTP codes have three digits")
}

pub fn interval(duration: Duration) -> PgInterval {
    PgInterval::try_from(duration).expect("durations here are whole milliseconds")
}
