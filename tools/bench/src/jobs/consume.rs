//! `consume`: a backlog of registrations in the topic, until analytics has counted all of them. The
//! limit executes the same statements in transactions of 2,000 events, one after another on one
//! connection, without Kafka. Analytics has a second consumer of the same topic, the audit. It
//! waits for a lock on its table during a slice of our side, and catches up after it.

use std::time::Duration;

use anyhow::{Result, ensure};
use shared::events::{Cause, Envelope, Topic, UserEvent, UserRef, mint_id, now};
use sqlx::{AssertSqlSafe, Connection, PgConnection, PgPool, query_scalar};
use testbed::services::RunningService;
use time::OffsetDateTime;
use tokio::time::{Instant, sleep};
use topology::ANALYTICS;
use uuid::Uuid;

use crate::bed::{Bed, Lab};
use crate::kafka::Writer;
use crate::meter::Slice;
use crate::report::{Bound, Report};
use crate::slices::{Contest, measure};
use crate::{checks, statements};

const EVENTS: u64 = 200_000;
const GOAL: f64 = 0.85;
/// CPU seconds of the service per 100,000 events.
const CPU_GOAL: f64 = 0.6;
/// MB.
const MEMORY_GOAL: f64 = 40.0;
/// Events of a transaction of the limit.
const BATCH: usize = 2_000;
const POLL: Duration = Duration::from_millis(10);
const AUDIT_POLL: Duration = Duration::from_millis(200);
/// How long a slice may take.
const LIMIT: Duration = Duration::from_secs(300);
const COUNTED: &str = "select coalesce(sum(registered), 0)::bigint from funnel_totals";
/// What the inbox of `shared` executes.
const INBOX: &str = "
    with new as (
        insert into inbox (handler, event_id) select $1, unnest($2::uuid[]) on conflict do nothing returning event_id)
    select coalesce(array_agg(event_id), '{}') from new";

/// For readers of docs/performance.md.
const LIMITED_BY: &str = "\
What limits it: Postgres, and the part of the service's work that does not overlap with it. While Postgres executes a
statement the consumer decodes the next batch; sorting, encoding the arrays and reading the answer come one after another.
Larger batches come closer to the limit and need more memory: in one comparison `BATCH_RECORDS=4000` reached a ratio of
0.72 and 118 MB, and 1,000 a ratio of 0.63 and 82 MB. Most of
the peak memory are records that the Kafka clients of two consumers have fetched ahead: the audit waits for its lock and
holds its own. A client fetches 128 KiB of each partition at once. In another comparison that gave a ratio of 0.64 and 92 MB;
with 64 KiB it was 0.53 and 65 MB, and with 32 KiB 0.50 and 63 MB, because the consumer then waits for Kafka more often.";

pub async fn run(bed: &Bed) -> Result<Report> {
    let lab = bed.lab("consume").await?;
    let mut consume = Consume::start(&lab).await?;
    let slices = measure(bed, &mut consume).await?;
    consume.check().await?;
    let what = ["analytics: inbox, hour count, funnel", "the same statements in batches of 2,000, without Kafka"];
    let report = Report::of_slices("consume", "events", what, slices, GOAL).with_memory_goal(MEMORY_GOAL);
    let cpu = report.service_cpu();
    Ok(report.with_goal("CPU of the service per 100,000", cpu, "s", Bound::AtMost(CPU_GOAL)).limited_by(LIMITED_BY))
}

struct Consume<'a> {
    lab: &'a Lab<'a>,
    service: RunningService,
    db: PgPool,
    /// Of the limit.
    session: PgConnection,
    writer: Writer,
    count: String,
    funnel: String,
    events: u64,
    /// Events of both sides.
    done: u64,
    /// Events of our side.
    consumed: u64,
}

impl<'a> Consume<'a> {
    async fn start(lab: &'a Lab<'a>) -> Result<Self> {
        lab.create_topics().await?;
        Ok(Self {
            lab,
            service: lab.start(ANALYTICS, &[]).await?,
            db: lab.owner(ANALYTICS).await?,
            session: lab.connect(ANALYTICS).await?,
            writer: Writer::transactional(lab.bed, &lab.prefixed("backlog"))?,
            count: statements::of(ANALYTICS, "insert into registrations")?,
            funnel: statements::of(ANALYTICS, "registered_at) select user_id")?,
            events: lab.bed.size().of(EVENTS),
            done: 0,
            consumed: 0,
        })
    }

    async fn counted(&self) -> Result<u64> {
        Ok(query_scalar::<_, i64>(COUNTED).fetch_one(&self.db).await? as u64)
    }

    async fn until_audited(&self) -> Result<()> {
        let deadline = Instant::now() + LIMIT;
        while query_scalar::<_, i64>("select count(*) from audit").fetch_one(&self.db).await? < self.consumed as i64 {
            ensure!(Instant::now() < deadline, "the audit does not store the events");
            sleep(AUDIT_POLL).await;
        }
        Ok(())
    }

    /// One transaction of the limit.
    async fn batch(&mut self, events: &[(Uuid, Uuid)], at: OffsetDateTime) -> Result<()> {
        let mut ids: Vec<Uuid> = events.iter().map(|(id, _)| *id).collect();
        ids.sort_unstable();
        let mut tx = self.session.begin().await?;
        let new: Vec<Uuid> = query_scalar(INBOX).bind("analytics.users").bind(ids).fetch_one(&mut *tx).await?;
        let partition = |user: &Uuid| Topic::USER_EVENTS.partition_of(*user);
        let mut users: Vec<Uuid> = events.iter().map(|(_, user)| *user).collect();
        users.sort_unstable();
        let partitions: Vec<i32> = users.iter().map(partition).collect();
        let mut counts = vec![0_i64; Topic::USER_EVENTS.partitions as usize];
        partitions.iter().for_each(|partition| counts[*partition as usize] += 1);
        sqlx::query(AssertSqlSafe(self.count.as_str()))
            .bind(vec![at.truncate_to_hour(); counts.len()])
            .bind((0..Topic::USER_EVENTS.partitions).collect::<Vec<i32>>())
            .bind(&counts)
            .execute(&mut *tx)
            .await?;
        sqlx::query(AssertSqlSafe(self.funnel.as_str()))
            .bind(&users)
            .bind(vec![at; users.len()])
            .bind(&partitions)
            .bind(Topic::USER_EVENTS.name)
            .execute(&mut *tx)
            .await?;
        tx.commit().await?;
        checks::require_equal("new events", new.len() as u64, events.len() as u64)
    }

    async fn check(&mut self) -> Result<()> {
        checks::require_equal("users are in the funnel", self.counted().await?, self.done)?;
        for table in ["inbox", "funnel"] {
            let rows: i64 =
                query_scalar(AssertSqlSafe(format!("select count(*) from {table}"))).fetch_one(&self.db).await?;
            checks::require_equal(&format!("rows of {table}"), rows as u64, self.done)?;
        }
        let hours: i64 =
            query_scalar("select sum(registrations)::bigint from registrations").fetch_one(&self.db).await?;
        checks::require_equal("registrations are counted", hours as u64, self.done)?;
        self.service.stop().await;
        Ok(())
    }
}

/// The registration of a new user.
pub fn registration() -> (Envelope, UserEvent) {
    let user = mint_id();
    let envelope = Envelope {
        id: mint_id(),
        kind: "user.registered".to_owned(),
        source: "/user".to_owned(),
        key: user,
        version: 1,
        time: now(),
        cause: Cause::command(None),
        traceparent: Some("00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-00".to_owned()),
        tracestate: None,
    };
    (envelope, UserEvent::Registered(UserRef { user_id: user }))
}

impl Contest for Consume<'_> {
    async fn ours(&mut self) -> Result<Slice> {
        self.writer.begin()?;
        let topic = self.lab.prefixed(Topic::USER_EVENTS.name);
        for _ in 0..self.events {
            let (envelope, event) = registration();
            self.writer.send_event(&topic, &envelope, &event)?;
        }
        self.writer.wait()?;
        self.done += self.events;
        self.consumed += self.events;
        let mut audit = self.db.begin().await?;
        sqlx::raw_sql("lock table audit in exclusive mode").execute(&mut *audit).await?;
        let meter = self.lab.bed.meter(&[&self.service])?;
        let deadline = Instant::now() + LIMIT;
        self.writer.commit()?;
        while self.counted().await? < self.done {
            ensure!(Instant::now() < deadline, "analytics does not count the events");
            sleep(POLL).await;
        }
        let slice = meter.stop(self.events)?;
        audit.commit().await?;
        self.until_audited().await?;
        Ok(slice)
    }

    async fn limit(&mut self) -> Result<Slice> {
        let events: Vec<(Uuid, Uuid)> = (0..self.events).map(|_| (mint_id(), mint_id())).collect();
        let at = now();
        let meter = self.lab.bed.meter(&[])?;
        for batch in events.chunks(BATCH) {
            self.batch(batch, at).await?;
        }
        self.done += self.events;
        meter.stop(self.events)
    }
}
