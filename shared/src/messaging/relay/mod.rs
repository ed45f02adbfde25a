//! The relay publishes the rows of the outbox to Kafka, in order, each at least once. All copies of
//! a row have the same event id.
//!
//! Each outbox has one leader, chosen by a session advisory lock. The leader reads and deletes rows
//! on the connection that holds the lock, so losing the lock stops both. The lock cannot stop
//! records that a frozen leader sends late. Kafka fences those: each round is a transaction of one
//! `transactional.id`, and the `init_transactions` of a new leader ends the transactions of its
//! predecessor.
//!
//! While more rows wait than one round takes, rounds overlap: while Kafka takes one round, the rows
//! of the previous one are deleted and those of the next one are read.
//!
//! A fault of a topic blocks that topic, a fault of a partition the keys of that partition, and a
//! fault of a row that row and the later rows of its key. Everything else is published.
//!
//! The relay has its own thread, because librdkafka's transaction calls block.

mod rows;
mod blocks;
mod cluster;
mod election;
mod lower_bound;
mod transaction;

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Instant;

use anyhow::Context;
use clap::Args;
use rdkafka::error::RDKafkaErrorCode;
use sqlx::postgres::PgConnectOptions;
use sqlx::{Connection, PgConnection};
use tokio::runtime::Handle as Runtime;
use tokio::time::Duration;
use tokio_util::sync::CancellationToken;
use tracing_opentelemetry::OpenTelemetrySpanExt;

use super::kafka::KafkaConfig;
use super::topics::Topics;
use crate::events::{Kind, Topic, key_hash};
use crate::fault;
use crate::platform::database::bounded;
use crate::platform::health::Health;
use crate::platform::metrics::{Metrics, RoundLabels, TopicLabels};
use crate::platform::settings::number;
use crate::platform::telemetry::{self, TraceContext};
use blocks::{Blocked, Blocks, Evidence, Excluded, Probe, Scope, scope};
use cluster::{Cluster, TopicState};
use election::{Election, Names};
use lower_bound::LowerBound;
use rows::{Batch, Row};
use transaction::{Outgoing, Rejection, RoundError, Transactions};

pub use election::Wake;
pub(crate) use election::listen;

/// Rows per round, at most. With a large backlog the cost of a transaction is negligible; a small
/// backlog makes small rounds. Two rounds are in memory, and a record in librdkafka's queue takes a
/// kilobyte more than its payload.
const ROUND_ROWS: usize = 8_000;
/// A rejected round is tried again with this fraction of its rows. Each rejection costs a new
/// producer, half a second or more, and a round that succeeds costs milliseconds: so few large
/// steps find a record faster than halving.
const SPLIT: usize = 8;
/// Rows gather for as long as this many rounds take. In the benchmark `register` two cores handled
/// 2,300 registrations a second without a pause, and 2,800 to 3,000 with it.
const LINGER_ROUNDS: u32 = 3;
const RETRY_INTERVAL: Duration = Duration::from_millis(500);
/// The most spans that a round's span links to. The SDK keeps no more.
const MAX_LINKS: usize = 128;
/// The components in `/status`: whether this process can take part in publishing, and, of a leader,
/// which rows wait.
const COMPONENT: &str = "outbox relay";
const BLOCKED: &str = "outbox rows";

/// Settings of a service that has an outbox.
#[derive(Args, Clone, Debug)]
pub struct RelayConfig {
    /// How often the relay looks for rows without being notified, in milliseconds. It is notified
    /// of all rows unless a notification is lost.
    #[arg(long, env, default_value_t = 200, value_parser = number::<u64>(10..=600_000))]
    pub outbox_poll_ms: u64,
    /// The longest time for which rows gather before the next round, in milliseconds. After a round
    /// that was not full, rows gather for three times as long as the round took, at most this long.
    /// The first row after a pause never waits. 0: rows do not gather.
    #[arg(long, env, default_value_t = 100, value_parser = number::<u64>(0..=1_000))]
    pub outbox_linger_ms: u64,
    /// Distinguishes systems whose databases have the same name and that share a Kafka cluster and
    /// TOPIC_PREFIX. All replicas of a service must have the same value.
    #[arg(long, env, default_value = "", value_parser = outbox_name)]
    pub outbox_name: String,
}

fn outbox_name(text: &str) -> Result<String, &'static str> {
    let allowed = |c: char| c.is_ascii_alphanumeric() || c == '-' || c == '.';
    if text.len() <= 40 && text.chars().all(allowed) {
        Ok(text.to_owned())
    } else {
        Err("at most 40 letters, digits, '-' and '.'")
    }
}

pub(crate) struct Relay {
    /// The envelope's `ce_source`.
    pub source: String,
    pub config: RelayConfig,
    pub kafka: KafkaConfig,
    pub topics: Topics,
    pub database: PgConnectOptions,
    pub wake: Wake,
    pub health: Health,
    pub metrics: Metrics,
    pub stop: CancellationToken,
}

/// One term as leader.
struct Term<'a> {
    relay: &'a Relay,
    runtime: Runtime,
    /// Holds the lock.
    db: PgConnection,
    names: Names,
    transactions: Transactions,
    cluster: Cluster,
    blocks: Blocks,
    /// `None`: nothing was reported in this term. The metrics may still have the values of an earlier
    /// term.
    reported: Option<Blocked>,
    /// Rows per round. Reduced while an unexplained rejection is narrowed down, and by a round that
    /// ended the last term: it may have been too large for the network.
    round_rows: &'a mut usize,
    lower_bound: LowerBound,
    measured_at: Instant,
    /// State topics whose number of partitions differs from their declaration. Each is reported
    /// once.
    grown: BTreeSet<&'static str>,
}

impl Relay {
    /// Leads whenever it can, until the process stops. Any error ends the term: the producer and
    /// the connection are dropped and a new term begins. This is safe at every line.
    pub fn run(self) -> anyhow::Result<()> {
        let mut round_rows = ROUND_ROWS;
        while !self.stop.is_cancelled() {
            if let Err(error) = self.lead(&mut round_rows) {
                self.metrics.relay_rounds.get_or_create(&RoundLabels { outcome: "failed" }).inc();
                let error = format!("{error:#}");
                tracing::warn!(error, "relay lost its term; reconnecting");
                self.health.report(COMPONENT, format!("the database and Kafka, to publish events: {error}"));
                Runtime::current().block_on(async {
                    self.stop.run_until_cancelled(tokio::time::sleep(RETRY_INTERVAL)).await;
                });
            }
            self.metrics.relay_leader.set(0);
            self.health.resolved(BLOCKED); // only the leader knows
        }
        Ok(())
    }

    /// One term as leader. It takes the lock, proves that it can write, fences the predecessor by
    /// `init_transactions`, and only then reads the first row. So it never reads a row that a
    /// predecessor could still publish later, and a read-only database (after a failover) is
    /// noticed before anything is published.
    fn lead(&self, round_rows: &mut usize) -> anyhow::Result<()> {
        let runtime = Runtime::current();
        let outbox = &self.config.outbox_name;
        let election =
            Election { database: &self.database, outbox, wake: &self.wake, stop: &self.stop, metrics: &self.metrics };
        let waiting = || self.health.resolved(COMPONENT);
        let Some((mut db, names)) = runtime.block_on(election.win(waiting))? else { return Ok(()) };
        // Before Kafka is asked, because it may not answer for a long time.
        runtime.block_on(rows::report_size(&mut db, &self.metrics));
        // Deletes nothing. Postgres refuses the statement on a session that is read-only.
        runtime.block_on(bounded(rows::delete(&mut db, &[]))).context("the database of the outbox is not writable")?;
        let transactions = Transactions::begin_term(&self.kafka, &names.transactional_id)?;
        tracing::info!(transactional_id = names.transactional_id, "became outbox relay leader");
        self.metrics.relay_leader.set(1);
        self.health.resolved(COMPONENT);
        let term = Term {
            relay: self,
            runtime,
            db,
            names,
            transactions,
            cluster: Cluster::new(self.topics.admin()),
            blocks: Blocks::default(),
            reported: None,
            round_rows,
            lower_bound: LowerBound::new(),
            measured_at: Instant::now(),
            grown: BTreeSet::new(),
        };
        term.run()
    }
}

/// The result of a round.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Round {
    /// There was no row to publish.
    Empty,
    Published,
    /// Kafka rejected the round. What is blocked, or how many rows the next round takes, has changed:
    /// look at the outbox again at once.
    Rejected,
}

/// What overlaps with the round that is published next.
#[derive(Default)]
struct Pipeline {
    /// The rows of the previous round: Kafka has them, and they are not deleted yet.
    published: Vec<i64>,
    /// The rows of the next round, if they are read already. While they were read the previous
    /// round was in flight. They have no row of that round, and may have later rows of its keys.
    next: Option<Batch>,
}

impl Term<'_> {
    fn run(mut self) -> anyhow::Result<()> {
        let mut pipeline = Pipeline::default();
        while !self.relay.stop.is_cancelled() {
            self.look_up_blocked()?;
            let began = Instant::now();
            let round = match self.blocks.due_by_rejection() {
                Some(probe) => {
                    self.drain(&mut pipeline)?;
                    self.probe(&probe)?
                }
                None => self.publish_next(&mut pipeline)?,
            };
            self.report_blocks();
            self.measure_if_due();
            if round == Round::Empty {
                self.wait();
            } else if round == Round::Published && pipeline.next.is_none() {
                self.linger(began.elapsed());
            }
        }
        self.drain(&mut pipeline)?;
        self.runtime.block_on(self.db.close()).context("cannot close the relay's database connection")
    }

    /// Deletes what is published, and forgets the rows of the next round. They are read again.
    fn drain(&mut self, pipeline: &mut Pipeline) -> anyhow::Result<()> {
        let Pipeline { published, .. } = std::mem::take(pipeline);
        self.outbox().delete_published(&published)
    }

    /// Lets rows gather after a round that was not full, so that the next one has more. A
    /// transaction costs Kafka, the database and the relay about the same whatever it contains. The
    /// busier they are, the longer a round takes, and the fewer rounds there are.
    fn linger(&self, took: Duration) {
        let longest = Duration::from_millis(self.relay.config.outbox_linger_ms);
        let linger = (took * LINGER_ROUNDS).min(longest);
        self.runtime.block_on(self.relay.stop.run_until_cancelled(tokio::time::sleep(linger)));
    }

    /// Waits for a notification, for the poll interval, or until a block is due. It measures the
    /// outbox in the meantime, which also keeps Postgres from closing the session as idle.
    fn wait(&mut self) {
        let poll_at = Instant::now() + Duration::from_millis(self.relay.config.outbox_poll_ms);
        loop {
            let limit = poll_at.saturating_duration_since(Instant::now()).min(rows::MEASURE_INTERVAL);
            let notified = self.relay.stop.run_until_cancelled(self.relay.wake.wait(limit));
            let interrupted = self.runtime.block_on(notified) != Some(false); // notified, or stopped
            if interrupted || Instant::now() >= poll_at || self.blocks.is_due() {
                return;
            }
            self.measure_if_due();
        }
    }

    fn measure_if_due(&mut self) {
        if self.measured_at.elapsed() >= rows::MEASURE_INTERVAL {
            self.measured_at = Instant::now();
            self.runtime.block_on(rows::report_size(&mut self.db, &self.relay.metrics));
        }
    }

    fn outbox(&mut self) -> Outbox<'_> {
        Outbox {
            relay: self.relay,
            runtime: &self.runtime,
            db: &mut self.db,
            round_rows: *self.round_rows,
            lower_bound: &mut self.lower_bound,
        }
    }

    /// Looks up the topics again whose blocks by metadata are due.
    fn look_up_blocked(&mut self) -> anyhow::Result<()> {
        for topic in self.blocks.due_by_metadata() {
            self.blocks.forget_metadata(&topic);
            self.judge(&topic)?;
        }
        Ok(())
    }

    /// Publishes the oldest rows that are not blocked.
    fn publish_next(&mut self, pipeline: &mut Pipeline) -> anyhow::Result<Round> {
        let batch = match pipeline.next.take() {
            Some(batch) => batch,
            None => {
                self.drain(pipeline)?;
                let excluded = self.blocks.excluded();
                self.outbox().read(&excluded, &[])?
            }
        };
        let found = batch.rows.len();
        let rows = self.leave_out_unavailable(batch.rows)?;
        if rows.is_empty() {
            self.drain(pipeline)?;
            // The next read leaves out what was blocked now.
            return Ok(if found > 0 { Round::Rejected } else { Round::Empty });
        }
        let count = rows.len();
        let round = self.round(rows, batch.is_full, pipeline);
        if round.is_err() {
            *self.round_rows = (count / 2).max(1);
        }
        round
    }

    /// Tries one row of what was rejected, so that another rejection delays no other row.
    fn probe(&mut self, probe: &Probe) -> anyhow::Result<Round> {
        self.blocks.postpone(probe);
        let excluded = self.blocks.excluded();
        let row = bounded(rows::read_one(&mut self.db, probe, &excluded));
        let Some(row) = self.runtime.block_on(row).context("cannot read the outbox")? else {
            // An operator deleted it, or the topic has only rows of blocked keys and partitions.
            self.blocks.unblock(probe);
            return Ok(Round::Rejected);
        };
        let rows = self.leave_out_unavailable(vec![row])?;
        if rows.is_empty() {
            return Ok(Round::Rejected);
        }
        let begin = Instant::now();
        match self.round(rows, false, &mut Pipeline::default())? {
            Round::Published => self.blocks.unblock(probe),
            Round::Rejected => self.blocks.pause_probes(begin.elapsed()),
            Round::Empty => {}
        }
        Ok(Round::Rejected)
    }

    /// Blocks the topics and partitions of these rows that metadata shows as unavailable, and
    /// leaves out their rows.
    fn leave_out_unavailable(&mut self, rows: Vec<Row>) -> anyhow::Result<Vec<Row>> {
        let topics: BTreeSet<&str> = rows.iter().map(|row| row.topic.as_str()).collect();
        for topic in topics {
            self.judge(topic)?;
        }
        Ok(rows.into_iter().filter(|row| !self.blocks.is_unavailable(&row.topic, row.key_hash)).collect())
    }

    /// Blocks what metadata shows as unavailable: the topic, or some of its partitions.
    fn judge(&mut self, topic: &str) -> anyhow::Result<()> {
        match self.cluster.topic(&self.relay.kafka.prefixed(topic), &self.runtime)? {
            TopicState::Unavailable(reason) => self.blocks.block_topic(topic, reason, Evidence::Metadata),
            TopicState::Available { partitions, unavailable } => {
                // Records of a state topic go to the declared partitions, also if there are more.
                let count = state_topic(topic).map_or(partitions, |declared| declared.partitions);
                for (partition, reason) in unavailable.into_iter().filter(|(partition, _)| *partition < count) {
                    self.blocks.block_partition(topic, count, partition, reason);
                }
                for partition in partitions..count {
                    self.blocks.block_partition(topic, count, partition, "it does not exist".to_owned());
                }
                self.notice_growth(topic, partitions);
            }
        }
        Ok(())
    }

    /// A state topic never changes its number of partitions. If it was changed all the same,
    /// records are written to the partitions of the declaration, where the older records of their
    /// keys are. The change is logged and counted; `/status` has it from the comparison of all
    /// topics with their declarations.
    fn notice_growth(&mut self, topic: &str, partitions: i32) {
        let Some(declared) = state_topic(topic) else { return };
        let differs = partitions != declared.partitions;
        let changed = &self.relay.metrics.topic_partitions_changed;
        let labels = TopicLabels { topic: self.relay.kafka.prefixed(topic) };
        changed.get_or_create(&labels).set(i64::from(differs));
        if !differs {
            if self.grown.remove(declared.name) {
                tracing::info!(topic, partitions, "the state topic has its declared number of partitions again");
            }
        } else if self.grown.insert(declared.name) {
            tracing::error!(
                topic,
                partitions,
                declared = declared.partitions,
                "the number of partitions of a state topic was changed. Records are written to the declared partitions only; \
                 the service will not start again until the topic is replaced"
            );
        }
    }

    /// Publish → delete. Crash before the Kafka commit: the transaction is aborted, readers see
    /// none of its records, and the rows are still in the outbox. Crash between commit and delete:
    /// the rows are published again, at new offsets, with the same event ids, and consumers
    /// recognise them as duplicates. No database transaction is open while the relay waits for
    /// Kafka.
    ///
    /// If more rows wait (`is_full`), its own rows are deleted while the next round is in flight.
    /// So a crash between that round's commit and this delete publishes two rounds again, and never
    /// more: the next but one is read after this delete. If Kafka rejects this round, the rows of
    /// the next one are forgotten: they may have later rows of a key that is blocked now.
    fn round(&mut self, rows: Vec<Row>, is_full: bool, pipeline: &mut Pipeline) -> anyhow::Result<Round> {
        fault::point("relay.after_read");
        let span = tracing::error_span!("publish", rows = rows.len(), "otel.kind" = "producer");
        let records = Arc::new(self.encode(rows));
        records.iter().take(MAX_LINKS).for_each(|record| telemetry::link(&span, &TraceContext::of(&record.envelope)));
        let ids: Vec<i64> = records.iter().map(|record| record.row).collect();
        let previous = std::mem::take(&mut pipeline.published);
        let excluded = self.blocks.excluded();
        let Self { relay, runtime, db, transactions, round_rows, lower_bound, .. } = self;
        let mut outbox = Outbox { relay, runtime, db, round_rows: **round_rows, lower_bound };
        let meanwhile = |outbox: &mut Outbox<'_>| {
            outbox.delete_published(&previous)?;
            if is_full { outbox.read_ahead(&excluded, &ids).map(Some) } else { Ok(None) }
        };
        let (published, next) = transactions.publish(&records, &mut outbox, meanwhile, Outbox::keep_session);
        let next = next?;
        match published {
            Ok(()) => {}
            Err(RoundError::Other(error)) => return Err(error),
            Err(RoundError::Rejected(rejections)) => {
                let found = self.block_rejected(&rejections, &records)?;
                return if found { self.give_up_round() } else { self.split(&records, None) };
            }
            Err(RoundError::Unexplained(error)) => {
                return self.split(&records, error.rdkafka_error_code());
            }
        }
        fault::point("relay.after_commit");
        self.blocks.accepted(records.iter().map(|record| &*record.topic));
        *self.round_rows = (*self.round_rows * 2).min(ROUND_ROWS);
        span.set_attribute("messaging.batch.message_count", ids.len() as i64);
        self.relay.metrics.relay_rounds.get_or_create(&RoundLabels { outcome: "published" }).inc();
        if next.is_some() {
            *pipeline = Pipeline { published: ids, next };
        } else {
            self.outbox().delete_published(&ids)?;
            self.renew(&records);
        }
        Ok(Round::Published)
    }

    /// Asks Kafka about the topics of these records again, because the next rows are probably for
    /// the same ones. If Kafka does not answer, the next round asks again.
    fn renew(&mut self, records: &[Outgoing]) {
        let names: BTreeSet<&str> = records.iter().map(|record| &*record.destination).collect();
        for name in names {
            if let Err(error) = self.cluster.renew(name, &self.runtime) {
                tracing::debug!(error = format!("{error:#}"), "cannot ask Kafka about a topic; will retry");
                return;
            }
        }
    }

    fn encode(&self, rows: Vec<Row>) -> Vec<Outgoing> {
        // A round has few topics.
        let mut topics: BTreeMap<String, (Arc<str>, Arc<str>)> = BTreeMap::new();
        let records = rows.into_iter().map(|row| {
            let destination = || self.relay.kafka.prefixed(&row.topic);
            if !topics.contains_key(&row.topic) {
                topics.insert(row.topic.clone(), (row.topic.as_str().into(), destination().into()));
            }
            let (topic, destination) = topics[&row.topic].clone();
            let partition = state_topic(&row.topic).map(|topic| topic.partition_of(row.envelope.aggregateid));
            let envelope = row.envelope.into_envelope(&self.relay.source);
            Outgoing { row: row.id, topic, destination, partition, envelope, payload: row.payload }
        });
        records.collect()
    }

    /// Begins with a new producer: the failed one is dropped, never aborted and reused. No record
    /// of its round becomes visible.
    fn give_up_round(&mut self) -> anyhow::Result<Round> {
        self.relay.metrics.relay_rounds.get_or_create(&RoundLabels { outcome: "failed" }).inc();
        self.transactions = Transactions::begin_term(&self.relay.kafka, &self.names.transactional_id)?;
        Ok(Round::Rejected)
    }

    /// The round was rejected, and the record that caused it is not known: Kafka rejects a whole
    /// batch for one record of it. Tries fewer rows, until the record is found.
    /// A code about a topic blocks the topic as soon as the round has no other.
    fn split(&mut self, records: &[Outgoing], code: Option<RDKafkaErrorCode>) -> anyhow::Result<Round> {
        let reason = code.map_or("rejected by Kafka".to_owned(), |code| code.to_string());
        let first = &records[0];
        if code.map(scope) == Some(Scope::Topic) && records.iter().all(|record| record.topic == first.topic) {
            self.blocks.block_topic(&first.topic, reason, Evidence::Rejection);
        } else if records.len() == 1 {
            self.blocks.block_key(first.envelope.key, &first.topic, first.row, reason);
        } else {
            *self.round_rows = (records.len() / SPLIT).max(1);
        }
        self.give_up_round()
    }

    /// Blocks what the rejections are about. Returns whether they name it.
    ///
    /// # Errors
    /// One of them concerns the whole term.
    fn block_rejected(&mut self, rejections: &[Rejection], records: &[Outgoing]) -> anyhow::Result<bool> {
        let mut rejected_records = vec![];
        let mut judged = BTreeSet::new();
        let mut found = false;
        for Rejection { index, code } in rejections {
            let record = &records[*index];
            match scope(*code) {
                Scope::Topic => {
                    self.blocks.block_topic(&record.topic, code.to_string(), Evidence::Rejection);
                    found = true;
                }
                Scope::Partition => {
                    // One look at the topic for all of its records: a partition without a leader
                    // may have thousands in the round.
                    if judged.insert(&record.topic) {
                        self.cluster.forget(&self.relay.kafka.prefixed(&record.topic));
                        self.judge(&record.topic)?;
                    }
                    // If metadata does not show why, the term ends, and the next one tries again.
                    let is_blocked = self.blocks.is_unavailable(&record.topic, key_hash(record.envelope.key));
                    anyhow::ensure!(is_blocked, "Kafka did not acknowledge the round: {code}");
                    found = true;
                }
                Scope::Record => rejected_records.push((record, *code)),
                Scope::Term => anyhow::bail!("Kafka did not acknowledge the round: {code}"),
            }
        }
        if let [(record, code)] = rejected_records.as_slice() {
            self.blocks.block_key(record.envelope.key, &record.topic, record.row, code.to_string());
            found = true;
        }
        Ok(found)
    }

    /// Reports a change of what is blocked: one line with the counts and three examples.
    fn report_blocks(&mut self) {
        let blocked = self.blocks.count();
        if self.reported == Some(blocked) {
            return;
        }
        let earlier = self.reported.replace(blocked);
        let Blocked { topics, partitions, keys } = blocked;
        self.relay.metrics.outbox_blocked_topics.set(topics as i64);
        self.relay.metrics.outbox_blocked_partitions.set(partitions as i64);
        self.relay.metrics.outbox_blocked_keys.set(keys as i64);
        if blocked == Blocked::default() {
            if earlier.is_some() {
                tracing::info!("all outbox rows can be published again");
                self.relay.health.resolved(BLOCKED);
            }
        } else {
            let examples = self.blocks.examples();
            let reason = format!(
                "Kafka to accept rows of {topics} topics, {partitions} partitions and {keys} keys, for example {}",
                examples.join(", ")
            );
            self.relay.health.report(BLOCKED, reason);
            tracing::error!(topics, partitions, keys, ?examples, "outbox rows wait because Kafka does not accept them");
        }
    }
}

/// The outbox, through the session that holds the lock.
struct Outbox<'a> {
    relay: &'a Relay,
    runtime: &'a Runtime,
    db: &'a mut PgConnection,
    /// Rows per round.
    round_rows: usize,
    lower_bound: &'a mut LowerBound,
}

impl Outbox<'_> {
    /// Reads the next round while one is in flight.
    fn read_ahead(&mut self, excluded: &Excluded, in_flight: &[i64]) -> anyhow::Result<Batch> {
        let batch = self.read(excluded, in_flight)?;
        fault::point("relay.after_read_ahead");
        Ok(batch)
    }

    fn read(&mut self, excluded: &Excluded, in_flight: &[i64]) -> anyhow::Result<Batch> {
        let limit = i64::try_from(self.round_rows)?;
        let has_excluded = !excluded.is_empty();
        self.runtime.block_on(bounded(self.lower_bound.settle(self.db))).context("cannot observe the outbox")?;
        let read = bounded(rows::read(self.db, excluded, self.lower_bound.first(), in_flight, limit));
        let batch = self.runtime.block_on(read).context("cannot read the outbox")?;
        self.lower_bound.note(&batch, in_flight, has_excluded);
        Ok(batch)
    }

    /// Uses the session, so that Postgres does not close it while a round takes long. A failure needs
    /// no answer: the next statement on the session fails too, and ends the term.
    fn keep_session(&mut self) {
        let ping = sqlx::query("select 1").execute(&mut *self.db);
        if let Err(error) = self.runtime.block_on(bounded(ping)) {
            tracing::debug!(%error, "the relay's session does not work while a round is in flight");
        }
    }

    /// Deletes the rows that Kafka has. If Postgres refuses (the table is locked), the delete is
    /// retried on the session that holds the lock: a new term would publish the same rows again
    /// each time. A session that became read-only ends the term: the next one begins with a session
    /// that can write. Crash before the delete succeeds: the next leader publishes the rows again.
    fn delete_published(&mut self, ids: &[i64]) -> anyhow::Result<()> {
        if ids.is_empty() {
            return Ok(());
        }
        while let Err(error) = self.runtime.block_on(bounded(rows::delete(self.db, ids))) {
            if !may_succeed_later(&error) || self.relay.stop.is_cancelled() {
                return Err(error).context("cannot delete published rows");
            }
            self.relay.metrics.relay_rounds.get_or_create(&RoundLabels { outcome: "failed" }).inc();
            tracing::warn!(%error, "cannot delete published rows; will retry");
            self.runtime.block_on(self.relay.stop.run_until_cancelled(tokio::time::sleep(RETRY_INTERVAL)));
        }
        fault::point("relay.after_delete");
        Ok(())
    }
}

/// The declaration of a state topic, by its logical name.
fn state_topic(name: &str) -> Option<Topic> {
    Topic::named(name).filter(|topic| topic.kind == Kind::State)
}

/// Whether the same statement may succeed on the same session. Not if the connection broke, the
/// server shuts down, or the session is read-only (SQLSTATE 25006).
fn may_succeed_later(error: &sqlx::Error) -> bool {
    let code = error.as_database_error().and_then(|error| error.code());
    code.is_some_and(|code| code != "25006" && !code.starts_with("57P") && !code.starts_with("08"))
}

#[cfg(test)]
mod tests {
    use super::outbox_name;

    #[test]
    fn the_name_of_an_outbox_is_short_and_plain() {
        assert!(outbox_name("").is_ok() && outbox_name("blue-1.eu").is_ok());
        assert!(outbox_name("a b").is_err() && outbox_name(&"a".repeat(41)).is_err());
    }
}
