//! The states of deliveries. Every transition is one statement or one transaction that names the
//! state it comes from, so two senders cannot both make it.
//!
//! ```text
//! unaddressed ──address──► pending ──claim──► sending ──250──► sent
//!                             ▲                  ├── refused, or deferred for too long ──► failed
//!                             ├── later ─────────┤
//!                             └───────claim── unknown ◄── no answer after the mail was sent
//! ```
//! [`handlers`](crate::handlers) makes the first state: `pending` if the address is known, and
//! `unaddressed` otherwise. A sender that dies leaves the state `sending` with a lease. When the
//! lease ends, by the database's clock, another sender claims the delivery. If the recipient is
//! erased, a delivery that has not ended becomes `cancelled`: the handlers cancel those that no
//! sender has, a claim cancels the others. A delivery that is too old is `held`, and a delivery
//! whose answer was lost too often stays `unknown`: both wait for an
//! [operator](crate::operator).

use std::collections::HashMap;
use std::time::Duration;

use shared::events::{Cause, Delivery, EmailEvent, Undelivered, mint_id};
use shared::fault;
use shared::messaging::outbox::{self, Draft};
use sqlx::postgres::types::PgInterval;
use sqlx::{PgConnection, PgPool};
use time::OffsetDateTime;
use uuid::Uuid;

const MAX_BACKOFF: Duration = Duration::from_secs(600);
/// After this many lost answers a delivery waits for an operator. Each of these attempts may have
/// delivered a copy.
pub const MAX_UNKNOWNS: i32 = 3;
/// After this many permanent refusals that are not about the recipient a delivery fails. Refusals
/// while sending is paused do not count. With the default back-off the last one comes half a minute
/// after the first.
pub const MAX_REFUSALS: i32 = 6;

/// Limits of a delivery.
#[derive(Clone, Copy)]
pub struct Rules {
    /// How long a sender has a delivery without renewing its lease.
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
    refusals: i32,
    unknowns: i32,
    /// The time of its event, which is that of the request.
    pub requested_at: OffsetDateTime,
    /// The time since its event, or since an operator has released it.
    age: Duration,
    causationid: Option<Uuid>,
    correlationid: Option<Uuid>,
    pub traceparent: Option<String>,
    pub tracestate: Option<String>,
    pub email: String,
    /// Proves that no other sender has claimed the delivery since.
    pub token: Uuid,
}

/// What a claim did with the delivery that was due.
pub enum Due {
    Claimed(Box<Claim>),
    /// Its cause is too old, and no operator has released it.
    Held,
    /// Its recipient was erased.
    Cancelled,
}

/// Claims the deliveries that have been due for longest, at most `count`, among those with one of
/// these templates. The index contains only deliveries that can be claimed, so the cost does not
/// depend on how many others wait. If a delivery must not be sent, this statement cancels it or
/// holds it. A condition in the search would read it again in each claim.
///
/// They get one token, because no other claim has it. Crash after this: each of them waits for the
/// end of its lease, so no more are claimed than senders are idle.
pub async fn claim(db: &mut PgConnection, rules: &Rules, templates: &[String], count: usize) -> sqlx::Result<Vec<Due>> {
    let token = mint_id();
    let due = sqlx::query!(
        r#"with due as materialized (
               select first.*
               from unnest($4::text[]) wanted (template)
               cross join lateral (
                   select id, user_id, requested_at, released_at, due_at from deliveries
                   where template = wanted.template and due_at <= now()
                   order by due_at limit $5 for update skip locked) first
               order by first.due_at limit $5)
           update deliveries d
           set status = next.status, updated_at = now(),
               attempt = attempt + (next.status = 'sending')::int,
               token = case next.status when 'sending' then $1::uuid end,
               due_at = case next.status when 'sending' then now() + $2::interval end
           from (select due.id, r.email,
                     case when r.email is null and r.version > 0 then 'cancelled'
                          when r.email is null then 'unaddressed'
                          when due.released_at is null and due.requested_at <= now() - $3::interval then 'held'
                          else 'sending' end as status
                 from due left join recipients r using (user_id)) next
           where d.id = next.id
           returning d.id, d.user_id, d.template, d.status, d.attempt, d.refusals, d.unknowns, d.causationid,
               d.correlationid, d.traceparent, d.tracestate, d.requested_at, next.email as "email?",
               extract(epoch from now() - greatest(d.requested_at, d.released_at))::bigint as "age!""#,
        token,
        interval(rules.lease),
        interval(rules.max_age),
        templates,
        count as i64,
    );
    let due = due.fetch_all(db).await?.into_iter().map(|row| match (row.status.as_str(), row.email) {
        ("sending", Some(email)) => Due::Claimed(Box::new(Claim {
            id: row.id,
            user_id: row.user_id,
            template: row.template,
            attempt: row.attempt,
            refusals: row.refusals,
            unknowns: row.unknowns,
            requested_at: row.requested_at,
            // Negative, and so 0 here, if the event's clock was ahead of the database's.
            age: Duration::from_secs(u64::try_from(row.age).unwrap_or(0)),
            causationid: row.causationid,
            correlationid: row.correlationid,
            traceparent: row.traceparent,
            tracestate: row.tracestate,
            email,
            token,
        })),
        ("cancelled", _) => Due::Cancelled,
        _ => Due::Held,
    });
    Ok(due.collect())
}

/// Whether the sender may still send the mail, which cannot be undone: `false` if its lease has
/// ended because it was frozen, or if the recipient was erased in the meantime. Also `false` if
/// less than half of the lease is left, so that the lease does not end immediately afterwards: then
/// [`renew`] decides. Several senders share a statement; the answers are in the order of the
/// claims.
///
/// It writes nothing. A claim by another sender that is not committed yet has found an ended lease,
/// so this statement, which finds half of it left, began before the lease ended.
pub async fn check(db: &PgPool, claims: &[(Uuid, Uuid)], rules: &Rules) -> sqlx::Result<Vec<bool>> {
    let (ids, tokens): (Vec<Uuid>, Vec<Uuid>) = claims.iter().copied().unzip();
    let checked = sqlx::query_scalar!(
        r#"select d.id is not null and r.user_id is not null as "may_send!"
           from unnest($1::uuid[], $2::uuid[]) with ordinality as claimed (id, token, number)
           left join deliveries d on d.id = claimed.id and d.token = claimed.token and d.due_at > now() + $3::interval / 2
           left join recipients r on r.user_id = d.user_id and r.email is not null
           order by claimed.number"#,
        &ids,
        &tokens,
        interval(rules.lease),
    );
    checked.fetch_all(db).await
}

/// Renews the lease. Returns whether the sender may still send the mail, which cannot be undone. It
/// may not if its lease has ended because it was frozen, or if the recipient was erased in the
/// meantime.
pub async fn renew(db: &PgPool, claim: &Claim, rules: &Rules) -> sqlx::Result<bool> {
    let renewed = sqlx::query!(
        "update deliveries d set due_at = now() + $3
         where d.id = $1 and d.token = $2 and d.due_at > now()
             and exists (select from recipients r where r.user_id = d.user_id and r.email is not null)",
        claim.id,
        claim.token,
        interval(rules.lease),
    );
    Ok(renewed.execute(db).await?.rows_affected() == 1)
}

/// A mail that the server has accepted, and the event about it.
#[derive(Clone)]
pub struct Accepted {
    id: Uuid,
    event: Draft,
}

impl Accepted {
    /// Now, in the current trace.
    pub fn new(claim: &Claim) -> Self {
        Self { id: claim.id, event: Draft::new(claim.cause(), claim.id, &EmailEvent::Sent(claim.delivery())) }
    }
}

/// Records that the server accepted these mails, and claims up to `count` deliveries in the same
/// transaction, so that several senders share one commit. Returns whether each mail's state was
/// changed, in the order of the mails.
///
/// Crash before the commit: each of these senders sends one mail a second time, as it would if it
/// recorded its mail alone. No sender has another mail whose answer is not recorded.
pub async fn record_and_claim(
    db: &PgPool,
    accepted: &[Accepted],
    rules: &Rules,
    templates: &[String],
    count: usize,
) -> sqlx::Result<(Vec<bool>, Vec<Due>)> {
    let mut tx = db.begin().await?;
    let changed = if accepted.is_empty() { vec![] } else { sent(&mut tx, accepted).await? };
    let due = if count == 0 { vec![] } else { claim(&mut tx, rules, templates, count).await? };
    if !accepted.is_empty() {
        fault::point("email.before_record");
    }
    tx.commit().await?;
    Ok((changed, due))
}

/// Records that the server accepted the mails. Also succeeds after a lease has ended, so that the
/// sender that took over fails its check and stops, and after another sender has recorded a
/// failure: the mail was accepted. It writes the event only if it changes the state.
async fn sent(tx: &mut PgConnection, accepted: &[Accepted]) -> sqlx::Result<Vec<bool>> {
    let ids: Vec<Uuid> = accepted.iter().map(|mail| mail.id).collect();
    let ended = sqlx::query!(
        "update deliveries set status = 'sent', token = null, due_at = null, smtp_code = 250, updated_at = now(),
             events = events + 1
         where id = any($1) and status <> 'sent' returning id, events",
        &ids,
    );
    let ended = ended.fetch_all(&mut *tx).await?;
    let mut versions: HashMap<Uuid, i64> = ended.into_iter().map(|row| (row.id, row.events.into())).collect();
    let mut events = vec![];
    let mut changed = vec![];
    for mail in accepted {
        // Two senders may have sent the same mail, if the lease of one has ended.
        let version = versions.remove(&mail.id);
        changed.push(version.is_some());
        events.extend(version.map(|version| mail.event.clone().at(version)));
    }
    outbox::publish_all(tx, events).await?;
    Ok(changed)
}

/// Records that the server refused the mail permanently or for too long, unless the lease has ended
/// and another sender has the delivery. Returns whether this call changed the state.
pub async fn failed(db: &PgPool, claim: &Claim, smtp_code: u16) -> sqlx::Result<bool> {
    let mut tx = db.begin().await?;
    let ended = sqlx::query_scalar!(
        "update deliveries set status = 'failed', token = null, due_at = null, smtp_code = $3, updated_at = now(),
             events = events + 1
         where id = $1 and token = $2 returning events",
        claim.id,
        claim.token,
        code(smtp_code),
    );
    let version = ended.fetch_optional(&mut *tx).await?;
    if let Some(version) = version {
        let event = EmailEvent::Failed(Undelivered { delivery: claim.delivery(), smtp_code });
        outbox::publish(&mut tx, claim.cause(), claim.id, version.into(), &event).await?;
    }
    tx.commit().await?;
    Ok(version.is_some())
}

/// Why a delivery is retried.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Retry {
    /// The server has not accepted the mail. Waits for a back-off that doubles with each attempt.
    Later,
    /// As [`Retry::Later`], after a permanent refusal that is not about the recipient.
    Refused,
    /// The server may have accepted the mail. After [`MAX_UNKNOWNS`] of these an operator decides.
    Unknown,
    /// The sender stopped before it sent the mail. Another one may send it at once.
    Stopped,
}

/// Gives the delivery back, unless the lease has ended and another sender has it.
pub async fn retry(db: &PgPool, claim: &Claim, rules: &Rules, why: Retry, smtp_code: Option<u16>) -> sqlx::Result<()> {
    let unknown = why == Retry::Unknown;
    let wait = match why {
        Retry::Unknown if claim.is_last_unknown() => None,
        Retry::Stopped => Some(Duration::ZERO),
        Retry::Later | Retry::Refused | Retry::Unknown => Some(claim.backoff(rules)),
    };
    sqlx::query!(
        "update deliveries set status = $3, token = null, due_at = now() + $4::interval, smtp_code = $5,
             unknowns = unknowns + $6, refusals = refusals + $7, updated_at = now()
         where id = $1 and token = $2",
        claim.id,
        claim.token,
        if unknown { "unknown" } else { "pending" },
        wait.map(interval),
        smtp_code.map(code),
        i32::from(unknown),
        i32::from(why == Retry::Refused),
    )
    .execute(db)
    .await?;
    Ok(())
}

/// Locks the rows of these users in `recipients`, and inserts those that are missing. A transaction
/// whose change to deliveries depends on their recipients calls this first. So of two of them at
/// the same time one waits for the other's commit and then sees what it wrote.
///
/// One statement, so that the rows are locked in the order of the ids, whether they exist or not:
/// `users` are sorted, and each is there once. `where false`: Postgres locks the row and does not
/// write it.
pub async fn lock_recipients(tx: &mut PgConnection, users: &[Uuid]) -> sqlx::Result<()> {
    sqlx::query!(
        "insert into recipients as stored (user_id, version)
         select user_id, 0 from unnest($1::uuid[]) as wanted (user_id)
         on conflict (user_id) do update set version = stored.version where false",
        users
    )
    .execute(tx)
    .await?;
    Ok(())
}

/// Makes the deliveries to these users claimable, now that their addresses are known.
pub async fn address(tx: &mut PgConnection, users: &[Uuid]) -> sqlx::Result<()> {
    if users.is_empty() {
        return Ok(());
    }
    sqlx::query!(
        "update deliveries set status = 'pending', due_at = now(), updated_at = now()
         where user_id = any($1) and status = 'unaddressed'",
        users
    )
    .execute(tx)
    .await?;
    Ok(())
}

/// Cancels the deliveries to these users, who were erased, unless a sender has them. That sender
/// checks the recipient before it sends the mail. Returns how many were cancelled.
pub async fn cancel(tx: &mut PgConnection, users: &[Uuid]) -> sqlx::Result<u64> {
    if users.is_empty() {
        return Ok(0);
    }
    let cancelled = sqlx::query!(
        "update deliveries set status = 'cancelled', due_at = null, updated_at = now()
         where user_id = any($1) and status in ('unaddressed', 'pending', 'unknown', 'held')",
        users
    );
    Ok(cancelled.execute(tx).await?.rows_affected())
}

impl Claim {
    /// The wait before the next attempt.
    fn backoff(&self, rules: &Rules) -> Duration {
        let doublings = u32::try_from(self.attempt - 1).unwrap_or(0).min(20);
        rules.backoff.saturating_mul(1 << doublings).min(MAX_BACKOFF)
    }

    /// Whether the delivery will be too old for another attempt. RFC 5321 §4.5.4.1: a client gives
    /// up after some days.
    pub fn is_last_deferral(&self, rules: &Rules) -> bool {
        self.age + self.backoff(rules) >= rules.max_age
    }

    /// Whether a delivery with one more lost answer waits for an operator.
    pub fn is_last_unknown(&self) -> bool {
        self.unknowns + 1 >= MAX_UNKNOWNS
    }

    /// Whether a delivery with one more refusal that is not about its recipient has failed.
    pub fn is_last_refusal(&self) -> bool {
        self.refusals + 1 >= MAX_REFUSALS
    }

    fn cause(&self) -> Cause {
        Cause { causation: self.causationid, correlation: self.correlationid, actor: None }
    }

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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{blocks_read, database, one_session};

    const RULES: Rules = Rules {
        lease: Duration::from_secs(60),
        backoff: Duration::from_secs(1),
        max_age: Duration::from_secs(72 * 3600),
    };

    /// Inserts deliveries to users with an address.
    async fn insert(db: &PgPool, count: i64, template: &str, status: &str, requested_hours_ago: i32) {
        let insert = "
            with users as (
                insert into recipients (user_id, version, email)
                select gen_random_uuid(), 1, 'ada@example.com' from generate_series(1, $1) returning user_id)
            insert into deliveries (id, user_id, template, version, status, due_at, requested_at)
            select gen_random_uuid(), user_id, $2, 1, $3,
                case $3 when 'pending' then now() - interval '1 hour' end, now() - make_interval(hours => $4)
            from users";
        sqlx::query(insert)
            .bind(count)
            .bind(template)
            .bind(status)
            .bind(requested_hours_ago)
            .execute(db)
            .await
            .unwrap();
    }

    async fn claimed(db: &PgPool) -> Option<Claim> {
        match due(db, 1).await.pop() {
            Some(Due::Claimed(claim)) => Some(*claim),
            _ => None,
        }
    }

    async fn due(db: &PgPool, count: usize) -> Vec<Due> {
        claim(&mut db.acquire().await.unwrap(), &RULES, &["welcome".to_owned()], count).await.unwrap()
    }

    /// A claim costs the same however many deliveries wait for something else: an address, an
    /// operator, or a release that knows their template.
    #[tokio::test]
    async fn a_claim_reads_few_blocks_whatever_else_waits() {
        let db = one_session().await;
        for (template, status) in [("welcome", "unaddressed"), ("welcome", "held"), ("farewell", "pending")] {
            insert(&db, 20_000, template, status, 0).await;
        }
        insert(&db, 5, "welcome", "pending", 0).await;
        sqlx::query("analyze").execute(&db).await.unwrap();
        let before = blocks_read(&db).await;
        assert!(claimed(&db).await.is_some());
        let read = blocks_read(&db).await - before;
        assert!((1..100).contains(&read), "a claim read {read} blocks");
    }

    /// T36: a delivery that became too old while it waited is held by the claim, which does not
    /// find it again.
    #[tokio::test]
    async fn a_delivery_that_became_too_old_is_held_when_it_is_claimed() {
        let db = database().await;
        insert(&db, 1, "welcome", "pending", 73).await;
        assert!(matches!(due(&db, 1).await[..], [Due::Held]));
        assert!(due(&db, 1).await.is_empty());
    }

    async fn claims(db: &PgPool, count: usize) -> Vec<Claim> {
        let due = due(db, count).await.into_iter();
        due.map(|due| if let Due::Claimed(claim) = due { *claim } else { panic!("not claimed") }).collect()
    }

    /// I5, I6: senders that check together get their own answers.
    #[tokio::test]
    async fn a_mail_may_be_sent_by_the_owner_of_its_lease_to_a_recipient_who_is_not_erased() {
        let db = database().await;
        insert(&db, 5, "welcome", "pending", 0).await;
        let claims = claims(&db, 5).await;
        let change = async |sql: &str, claim: &Claim| {
            let changed = sqlx::query(sqlx::AssertSqlSafe(sql)).bind(claim.id).execute(&db).await.unwrap();
            assert_eq!(changed.rows_affected(), 1, "{sql}");
        };
        change("update deliveries set token = gen_random_uuid() where id = $1", &claims[0]).await;
        change("update deliveries set due_at = now() - interval '1 s' where id = $1", &claims[2]).await;
        // Too little of it is left.
        change("update deliveries set due_at = now() + interval '29 s' where id = $1", &claims[3]).await;
        let erase = "update recipients set version = 2, email = null
                     where user_id = (select user_id from deliveries where id = $1)";
        change(erase, &claims[4]).await;
        let asked: Vec<_> = claims.iter().map(|claim| (claim.id, claim.token)).collect();
        assert_eq!(check(&db, &asked, &RULES).await.unwrap(), [false, true, false, false, false]);
        let mut renewed = vec![];
        for claim in &claims {
            renewed.push(renew(&db, claim, &RULES).await.unwrap());
        }
        assert_eq!(renewed, [false, true, false, true, false]);
        assert_eq!(check(&db, &asked[3..4], &RULES).await.unwrap(), [true]);
    }

    /// I6: two senders have sent the same mail, because the lease of one has ended.
    #[tokio::test]
    async fn a_mail_that_two_senders_have_sent_is_recorded_once() {
        let db = database().await;
        insert(&db, 3, "welcome", "pending", 0).await;
        let claims = claims(&db, 2).await;
        let accepted = [0, 1, 0].map(|index| Accepted::new(&claims[index]));
        let recorded = record_and_claim(&db, &accepted, &RULES, &["welcome".to_owned()], 3).await.unwrap();
        assert_eq!((recorded.0, recorded.1.len()), (vec![true, true, false], 1));
        let again = record_and_claim(&db, &accepted[..1], &RULES, &[], 0).await.unwrap();
        assert_eq!((again.0, again.1.len()), (vec![false], 0));
        let events = "select aggregateid, version from outbox order by id";
        let events: Vec<(Uuid, i64)> = sqlx::query_as(events).fetch_all(&db).await.unwrap();
        let mut expected = vec![(claims[0].id, 1), (claims[1].id, 1)];
        expected.sort();
        let mut published = events;
        published.sort();
        assert_eq!(published, expected);
    }

    #[tokio::test]
    async fn a_delivery_whose_template_is_unknown_is_left_for_another_release() {
        let db = database().await;
        insert(&db, 1, "farewell", "pending", 0).await;
        assert!(claimed(&db).await.is_none());
        insert(&db, 1, "welcome", "pending", 0).await;
        assert_eq!(claimed(&db).await.unwrap().template, "welcome");
        assert!(claimed(&db).await.is_none());
    }
}
