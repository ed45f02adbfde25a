//! What the email service does with events. Both handlers are idempotent by keys of their own business, without an inbox: a
//! unique key for intents, the highest version for recipients.

use std::collections::BTreeMap;

use shared::events::{UserEvent, UserState, mint_id};
use shared::fault;
use shared::messaging::{Failure, Handler, Outcome, Record};
use shared::service::telemetry::TraceContext;
use sqlx::{PgConnection, PgPool};
use uuid::Uuid;

/// `user.events.v1` → intents. A registration wants one welcome mail, however often and in whatever order it comes.
#[derive(Clone)]
pub struct Welcome {
    pub db: PgPool,
}

impl Handler for Welcome {
    type Event = UserEvent;

    /// One transaction. Crash before the commit: the batch comes again. Crash after it: it comes again and changes nothing.
    async fn handle(&self, batch: &[Record<UserEvent>]) -> Result<Outcome, Failure> {
        let mut tx = self.db.begin().await?;
        let mut outcome = Outcome::default();
        for record in batch {
            let applied = match record.event {
                UserEvent::Registered(user) => {
                    let trace = TraceContext::of(&record.envelope);
                    intend(&mut tx, user.user_id, record.envelope.version, record.envelope.time, trace).await?
                }
                UserEvent::Deleted(user) => erase(&mut tx, user.user_id, record.envelope.version).await?,
                UserEvent::ProfileChanged(_) | UserEvent::EmailChanged(_) => true,
            };
            if applied { outcome.applied += 1 } else { outcome.duplicate += 1 }
        }
        fault::point("email.before_commit");
        tx.commit().await?;
        Ok(outcome)
    }
}

async fn intend(
    tx: &mut PgConnection,
    user: Uuid,
    version: i64,
    requested_at: time::OffsetDateTime,
    trace: TraceContext,
) -> sqlx::Result<bool> {
    let inserted = sqlx::query!(
        "insert into deliveries (id, user_id, template, version, requested_at, traceparent, tracestate)
         values ($1, $2, 'welcome', $3, $4, $5, $6)
         on conflict (user_id, template, version) do nothing",
        mint_id(),
        user,
        version,
        requested_at,
        trace.traceparent,
        trace.tracestate,
    );
    Ok(inserted.execute(tx).await?.rows_affected() == 1)
}

/// The fact erases too: a consumer that was away for longer than Kafka keeps tombstones would miss the tombstone.
async fn erase(tx: &mut PgConnection, user: Uuid, version: i64) -> sqlx::Result<bool> {
    let erased = sqlx::query!(
        "insert into recipients as stored (user_id, version) values ($1, $2)
         on conflict (user_id) do update set version = excluded.version, email = null, display_name = null
             where stored.version < excluded.version",
        user,
        version,
    );
    Ok(erased.execute(tx).await?.rows_affected() == 1)
}

/// `user.state.v1` → recipients. The highest version wins; an erased recipient keeps its version and nothing else.
#[derive(Clone)]
pub struct Recipients {
    pub db: PgPool,
}

impl Handler for Recipients {
    type Event = UserState;

    /// One statement. Users are written in the order of their ids, since two transactions that lock the same rows in opposite
    /// orders would deadlock; and each once, since a statement may touch a row only once.
    async fn handle(&self, batch: &[Record<UserState>]) -> Result<Outcome, Failure> {
        let mut newest: BTreeMap<Uuid, &Record<UserState>> = BTreeMap::new();
        for record in batch {
            let known = newest.entry(record.envelope.key).or_insert(record);
            if known.envelope.version < record.envelope.version {
                *known = record;
            }
        }
        let (mut users, mut versions, mut emails, mut names) = (vec![], vec![], vec![], vec![]);
        for (user, record) in newest {
            let profile = match &record.event {
                UserState::Current(profile) => Some(profile),
                UserState::Erased => None,
            };
            users.push(user);
            versions.push(record.envelope.version);
            emails.push(profile.map(|profile| profile.email.clone()));
            names.push(profile.map(|profile| profile.display_name.clone()));
        }
        let upserted = sqlx::query!(
            "insert into recipients as stored (user_id, version, email, display_name)
             select * from unnest($1::uuid[], $2::bigint[], $3::text[], $4::text[])
             on conflict (user_id) do update set
                 version = excluded.version, email = excluded.email, display_name = excluded.display_name
                 where stored.version < excluded.version",
            &users,
            &versions,
            &emails as &[Option<String>],
            &names as &[Option<String>],
        );
        let applied = upserted.execute(&self.db).await?.rows_affected();
        Ok(Outcome { applied, duplicate: 0, stale: batch.len() as u64 - applied })
    }
}
