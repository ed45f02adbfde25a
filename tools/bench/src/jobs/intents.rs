//! `intents`: a backlog of registrations in the topic, until email has an intent for each. The
//! limit executes the same statements in transactions of 2,000 events, one after another on one
//! connection, without Kafka.

use std::time::Duration;

use anyhow::{Result, ensure};
use shared::events::{Topic, mint_id, now};
use sqlx::postgres::types::PgInterval;
use sqlx::{AssertSqlSafe, Connection, PgConnection, PgPool, query_scalar};
use testbed::services::RunningService;
use tokio::time::{Instant, sleep};
use topology::EMAIL;
use uuid::Uuid;

use super::consume::registration;
use crate::bed::{Bed, Lab};
use crate::kafka::Writer;
use crate::meter::Slice;
use crate::report::Report;
use crate::slices::{Contest, measure};
use crate::{checks, statements};

const EVENTS: u64 = 100_000;
const GOAL: f64 = 0.7;
/// Events of a transaction of the limit.
const BATCH: usize = 2_000;
const POLL: Duration = Duration::from_millis(10);
/// How long a slice may take.
const LIMIT: Duration = Duration::from_secs(300);
/// An event that is older is held.
const MAX_AGE: Duration = Duration::from_secs(72 * 3600);

/// For readers of docs/performance.md.
const LIMITED_BY: &str = "\
What limits it: Postgres. The unique index over user, template and version and two partial indexes make a row expensive, on both
sides. The service adds the decoding of the records and four round trips for each batch.";

pub async fn run(bed: &Bed) -> Result<Report> {
    let lab = bed.lab("intents").await?;
    let mut intents = Intents::start(&lab).await?;
    let slices = measure(bed, &mut intents).await?;
    intents.check().await?;
    let what = ["email's consumer of registrations", "the same statements in batches of 2,000, without Kafka"];
    Ok(Report::of_slices("intents", "events", what, slices, GOAL).limited_by(LIMITED_BY))
}

struct Intents<'a> {
    lab: &'a Lab<'a>,
    service: RunningService,
    db: PgPool,
    /// Of the limit.
    session: PgConnection,
    writer: Writer,
    lock: String,
    store: String,
    events: u64,
    done: u64,
}

impl<'a> Intents<'a> {
    async fn start(lab: &'a Lab<'a>) -> Result<Self> {
        lab.create_topics().await?;
        Ok(Self {
            lab,
            service: lab.start(EMAIL, &[]).await?,
            db: lab.owner(EMAIL).await?,
            session: lab.connect(EMAIL).await?,
            writer: Writer::transactional(lab.bed, &lab.prefixed("backlog"))?,
            lock: statements::of(EMAIL, "insert into recipients as stored (user_id, version)\n")?,
            store: statements::of(EMAIL, "insert into deliveries")?,
            events: lab.bed.size().of(EVENTS),
            done: 0,
        })
    }

    /// One transaction of the limit.
    async fn batch(&mut self, users: &[Uuid]) -> Result<()> {
        let ids = || users.iter().map(|_| mint_id()).collect::<Vec<_>>();
        let none: Vec<Option<Uuid>> = vec![None; users.len()];
        let mut tx = self.session.begin().await?;
        sqlx::query(AssertSqlSafe(self.lock.as_str())).bind(users).execute(&mut *tx).await?;
        let stored = sqlx::query(AssertSqlSafe(self.store.as_str()))
            .bind(ids())
            .bind(users)
            .bind(vec![1_i64; users.len()])
            .bind(vec![now(); users.len()])
            .bind(ids())
            .bind(ids())
            .bind(none)
            .bind(vec![Some("00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-00"); users.len()])
            .bind(vec![None::<&str>; users.len()])
            .bind("welcome")
            .bind(PgInterval::try_from(MAX_AGE).expect("whole seconds"))
            .fetch_all(&mut *tx)
            .await?;
        tx.commit().await?;
        checks::require_equal("new intents", stored.len() as u64, users.len() as u64)
    }

    async fn check(&mut self) -> Result<()> {
        let intents: i64 = query_scalar("select count(*) from deliveries").fetch_one(&self.db).await?;
        checks::require_equal("intents", intents as u64, self.done)?;
        self.service.stop().await;
        Ok(())
    }
}

impl Contest for Intents<'_> {
    /// The last event of each partition is handled after all others of the partition.
    async fn ours(&mut self) -> Result<Slice> {
        let topic = self.lab.prefixed(Topic::USER_EVENTS.name);
        let mut last = vec![Uuid::nil(); Topic::USER_EVENTS.partitions as usize];
        self.writer.begin()?;
        for _ in 0..self.events {
            let (envelope, event) = registration();
            last[Topic::USER_EVENTS.partition_of(envelope.key) as usize] = envelope.key;
            self.writer.send_event(&topic, &envelope, &event)?;
        }
        last.retain(|user| !user.is_nil());
        self.writer.wait()?;
        self.done += self.events;
        let meter = self.lab.bed.meter(&[&self.service])?;
        let deadline = Instant::now() + LIMIT;
        self.writer.commit()?;
        let stored = || query_scalar::<_, i64>("select count(*) from deliveries where user_id = any($1)").bind(&last);
        while stored().fetch_one(&self.db).await? != last.len() as i64 {
            ensure!(Instant::now() < deadline, "email does not store the intents");
            sleep(POLL).await;
        }
        meter.stop(self.events)
    }

    async fn limit(&mut self) -> Result<Slice> {
        let mut users: Vec<Uuid> = (0..self.events).map(|_| mint_id()).collect();
        users.sort_unstable();
        let meter = self.lab.bed.meter(&[])?;
        for batch in users.chunks(BATCH) {
            self.batch(batch).await?;
        }
        self.done += self.events;
        meter.stop(self.events)
    }
}
