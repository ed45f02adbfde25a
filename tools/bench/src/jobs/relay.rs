//! `relay`: a backlog of the outbox, until all rows are committed in Kafka and deleted. The limit
//! does what no program can avoid: it copies the rows out of a table, and then hands the same
//! records to an idempotent producer, without transactions and without deleting a row.

use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use futures::TryStreamExt;
use rdkafka::message::{Header, OwnedHeaders};
use shared::events::Topic;
use sqlx::postgres::PgPoolCopyExt;
use sqlx::{PgPool, query_scalar};
use testbed::services::RunningService;
use tokio::time::{Instant, sleep};
use topology::USER;
use uuid::Uuid;
use uuid::fmt::Hyphenated;

use crate::bed::{Bed, Lab};
use crate::kafka::{self, Writer};
use crate::meter::Slice;
use crate::report::Report;
use crate::slices::{Contest, measure};
use crate::{checks, rows};

const ROWS: u64 = 200_000;
const GOAL: f64 = 0.40;
/// MB.
const MEMORY_GOAL: f64 = 60.0;
/// How often the outbox is asked whether its last row was deleted.
const POLL: Duration = Duration::from_millis(10);
/// How long a slice may take.
const LIMIT: Duration = Duration::from_secs(300);
/// The columns that the limit copies out, in this order. The table has no index and nothing else.
const COPY: &str = "copy (select aggregateid, event_id, version, type, payload, traceparent from backlog order by id)
                    to stdout (format binary)";
/// The bytes before the first row of a binary copy: signature, flags, length of the extension.
const COPY_HEADER: usize = 19;

/// For readers of docs/performance.md.
const LIMITED_BY: &str = "\
What limits it: the Kafka client of the relay. It has one thread for each broker, which compresses the records (about 3 us a
row), writes them (1.3 us) and frees them (1.2 us); building the headers of a record takes 2 us more on another thread.
Reading a row takes Postgres 1.7 us and deleting it 0.6 us. The limit sends without transactions, so its producer never
waits for a round to end. Both sides share the cores
with the broker.";

pub async fn run(bed: &Bed) -> Result<Report> {
    let lab = bed.lab("relay").await?;
    let mut relay = Relay::start(&lab).await?;
    let slices = measure(bed, &mut relay).await?;
    relay.check().await?;
    let what = ["the relay publishes rows of 300 bytes and deletes them", "COPY out, then an idempotent producer"];
    Ok(Report::of_slices("relay", "rows", what, slices, GOAL).with_memory_goal(MEMORY_GOAL).limited_by(LIMITED_BY))
}

/// A user service with its outbox.
pub struct Relay<'a> {
    lab: &'a Lab<'a>,
    service: RunningService,
    db: PgPool,
    writer: Writer,
    rows: u64,
    published: u64,
    copied: u64,
}

impl<'a> Relay<'a> {
    pub async fn start(lab: &'a Lab<'a>) -> Result<Self> {
        let service = lab.start(USER, &[]).await?;
        let db = lab.owner(USER).await?;
        let rows = lab.bed.size().of(ROWS);
        kafka::create_topic(lab.bed, &lab.prefixed("limit"), Topic::USER_EVENTS.partitions).await?;
        sqlx::raw_sql("create table backlog (like outbox including defaults including identity)").execute(&db).await?;
        let (_, tx) = rows::insert(&db, "backlog", rows).await?;
        tx.commit().await?;
        Ok(Self { lab, service, db, writer: Writer::new(lab.bed)?, rows, published: 0, copied: 0 })
    }

    /// Publishes a backlog of this many rows.
    pub async fn publish(&mut self, rows: u64) -> Result<Slice> {
        sqlx::raw_sql("vacuum analyze outbox").execute(&self.db).await?;
        let (last, tx) = rows::insert(&self.db, "outbox", rows).await?;
        let mut db = self.db.acquire().await?;
        let meter = self.lab.bed.meter(&[&self.service])?;
        let deadline = Instant::now() + LIMIT;
        tx.commit().await?;
        // As another replica notifies the leader.
        sqlx::query("select pg_notify('outbox/public/', '')").execute(&mut *db).await?;
        while query_scalar("select exists (select from outbox where id = $1)").bind(last).fetch_one(&mut *db).await? {
            ensure!(Instant::now() < deadline, "the relay does not publish the rows");
            sleep(POLL).await;
        }
        let slice = meter.stop(rows)?;
        let left: i64 = query_scalar("select count(*) from outbox").fetch_one(&mut *db).await?;
        checks::require_equal("rows are left in the outbox", left as u64, 0)?;
        self.published += rows;
        Ok(slice)
    }

    /// Fails unless the topics have every row once and in order.
    pub async fn check(&mut self) -> Result<()> {
        let require = |name: &str, expected| {
            let topic = self.lab.prefixed(name);
            let starts = kafka::ends(self.lab.bed, &topic)?.into_keys().map(|partition| (partition, 0)).collect();
            checks::require_events(self.lab.bed, &topic, &starts, expected)
        };
        require(Topic::USER_EVENTS.name, self.published)?;
        if self.copied > 0 {
            let written: i64 = kafka::ends(self.lab.bed, &self.lab.prefixed("limit"))?.into_values().sum();
            checks::require_equal("records of the limit", written as u64, self.copied)?;
        }
        self.service.stop().await;
        Ok(())
    }
}

impl Contest for Relay<'_> {
    async fn ours(&mut self) -> Result<Slice> {
        self.publish(self.rows).await
    }

    async fn limit(&mut self) -> Result<Slice> {
        let meter = self.lab.bed.meter(&[])?;
        let mut stream = self.db.copy_out_raw(COPY).await?;
        let mut copied = Vec::new();
        while let Some(bytes) = stream.try_next().await? {
            copied.extend_from_slice(&bytes);
        }
        let topic = self.lab.prefixed("limit");
        let mut rows = Rows { rest: copied.get(COPY_HEADER..).context("the copy has no header")? };
        let mut count = 0;
        while let Some(row) = rows.next_row()? {
            row.write(&self.writer, &topic)?;
            count += 1;
        }
        self.writer.wait()?;
        self.copied += count;
        meter.stop(count)
    }
}

/// The rows of a binary copy.
struct Rows<'a> {
    rest: &'a [u8],
}

/// A row as it was copied.
struct Row<'a> {
    key: Uuid,
    id: Uuid,
    version: i64,
    kind: &'a [u8],
    payload: &'a [u8],
    traceparent: &'a [u8],
}

impl<'a> Rows<'a> {
    fn next_row(&mut self) -> Result<Option<Row<'a>>> {
        match i16::from_be_bytes(self.take(2)?.try_into()?) {
            -1 => return Ok(None),
            6 => {}
            fields => bail!("a row has {fields} fields"),
        }
        Ok(Some(Row {
            key: Uuid::from_slice(self.field()?)?,
            id: Uuid::from_slice(self.field()?)?,
            version: i64::from_be_bytes(self.field()?.try_into()?),
            kind: self.field()?,
            payload: self.field()?,
            traceparent: self.field()?,
        }))
    }

    fn field(&mut self) -> Result<&'a [u8]> {
        let length = i32::from_be_bytes(self.take(4)?.try_into()?);
        self.take(usize::try_from(length)?)
    }

    fn take(&mut self, length: usize) -> Result<&'a [u8]> {
        let (taken, rest) = self.rest.split_at_checked(length).context("the copy is incomplete")?;
        self.rest = rest;
        Ok(taken)
    }
}

impl Row<'_> {
    /// Writes a record with as many headers as the relay's, whose values have the same length.
    fn write(&self, writer: &Writer, topic: &str) -> Result<()> {
        let mut buffers = [[0; Hyphenated::LENGTH]; 2];
        let [key, id] = &mut buffers;
        let key: &[u8] = self.key.hyphenated().encode_lower(key).as_bytes();
        let id: &[u8] = self.id.hyphenated().encode_lower(id).as_bytes();
        let version = self.version.to_string();
        let headers: [(&str, &[u8]); 12] = [
            ("ce_specversion", b"1.0"),
            ("ce_id", id),
            ("ce_type", self.kind),
            ("ce_source", b"/user"),
            ("ce_subject", key),
            ("ce_time", b"2026-01-01T00:00:00.000000Z"),
            ("ce_dataschema", b"urn:waybill:user.registered:1"),
            ("ce_sequence", version.as_bytes()),
            ("content-type", b"application/json"),
            ("ce_causationid", id),
            ("ce_correlationid", id),
            ("traceparent", self.traceparent),
        ];
        let headers = headers.iter().fold(OwnedHeaders::new_with_capacity(headers.len()), |owned, (key, value)| {
            owned.insert(Header { key, value: Some(*value) })
        });
        writer.send(topic, key, headers, Some(self.payload))
    }
}
