//! Redrive: hands the open dead letters to the same handler again, outside the topic's order. It
//! does not write the records to their topic again, because all other groups would read them too.

use std::collections::BTreeSet;
use std::time::Duration;

use anyhow::{anyhow, bail};
use clap::Args;
use rdkafka::consumer::{BaseConsumer, Consumer};
use rdkafka::error::KafkaError;
use rdkafka::message::{Message, OwnedMessage};
use rdkafka::{Offset, TopicPartitionList};
use tokio::time::Instant;

use super::letter::{DeadLetter, DeadLetterWriter};
use super::table;
use crate::events::{Event, Kind};
use crate::fault;
use crate::messaging::errors::{Class, class};
use crate::messaging::handler::{self, Delivery, Failure, Handler};
use crate::messaging::kafka::{KafkaConfig, create};
use crate::messaging::record::{Coordinates, Record};
use crate::platform::telemetry;

const READ_TIMEOUT: Duration = Duration::from_secs(10);
const POLL_INTERVAL: Duration = Duration::from_millis(100);
/// Letters that are tried together.
const CHUNK: usize = 100;
/// How often a long redrive prints its progress.
const PROGRESS_INTERVAL: Duration = Duration::from_secs(1);

/// The subcommand `redrive`.
#[derive(Args, Clone, Debug, Default)]
pub struct Redrive {
    /// Redrive only these letters, even if they are parked. Name each as topic-partition-offset, as
    /// `dead-letters` prints it.
    #[arg(long, value_name = "COORDINATES", num_args = 1..)]
    pub only: Vec<Coordinates>,
    /// Print what would be tried and change nothing.
    #[arg(long)]
    pub dry_run: bool,
}

/// Tries the group's open letters again and prints the result. The group may consume at the same
/// time. Crash after the handler's effect and before the tombstone: the letter is still open, and
/// the next redrive handles its record again. Handlers are idempotent, so this changes nothing.
///
/// # Errors
/// Kafka does not answer, or a dependency of the handler is down. Letters that are not settled stay
/// open.
#[expect(clippy::print_stdout, reason = "the output of the subcommand")]
pub async fn redrive<H: Handler>(kafka: &KafkaConfig, handler: &H, options: &Redrive) -> anyhow::Result<()> {
    telemetry::hide_panic_messages();
    let group = H::GROUP;
    let open = tokio::task::block_in_place(|| table::open(kafka, group))?;
    let topic = kafka.prefixed(H::Event::TOPIC.name);
    for named in options.only.iter().filter(|named| named.topic == topic) {
        if !open.iter().any(|letter| letter.coordinates == *named) {
            eprintln!("{group}: {named} is not an open dead letter: it was settled, or never dead-lettered");
        }
    }
    let (letters, parked) = choose(open, &options.only);
    if options.dry_run {
        for DeadLetter { coordinates, reason, attempts, .. } in &letters {
            println!("{group}: would try {coordinates}, which failed {attempts} times, the last time with: {reason}");
        }
        println!("{group}: {} would be tried, {parked} parked", letters.len());
        return Ok(());
    }
    let mut run = Run::new(kafka, handler, letters.len())?;
    let mut letters = letters.into_iter().peekable();
    while letters.peek().is_some() {
        run.redrive_chunk(letters.by_ref().take(CHUNK).collect()).await?;
    }
    let Run { settled, superseded, failed, .. } = run;
    println!("{group}: {settled} settled, {superseded} superseded, {failed} failed again, {parked} parked");
    Ok(())
}

/// The letters to try, and how many parked letters are left out. Named letters are always tried.
fn choose(open: Vec<DeadLetter>, only: &[Coordinates]) -> (Vec<DeadLetter>, usize) {
    if only.is_empty() {
        let (parked, tried): (Vec<_>, Vec<_>) = open.into_iter().partition(DeadLetter::is_parked);
        return (tried, parked.len());
    }
    (open.into_iter().filter(|letter| only.contains(&letter.coordinates)).collect(), 0)
}

/// A redrive of one group, and its results so far.
struct Run<'a, H> {
    handler: &'a H,
    letters: DeadLetterWriter,
    /// Reads the records of pointers. `None` for facts, whose letters contain the record.
    records: Option<BaseConsumer>,
    /// The time limit for one call of the handler.
    limit: Duration,
    total: usize,
    progress_printed_at: Instant,
    /// Letters that the handler accepted, now or before.
    settled: usize,
    /// Pointers to records that were compacted away, because their key has a newer record.
    superseded: usize,
    /// Letters that failed again and stay open.
    failed: usize,
}

/// What a letter holds or points to.
enum Content<E> {
    Record(Box<Record<E>>),
    /// This release does not know the type of the event.
    Skipped,
    /// The record was compacted away because its key has a newer record.
    Superseded,
    /// The record cannot be decoded, for this reason.
    Undecodable(String),
}

impl<'a, H: Handler> Run<'a, H> {
    fn new(kafka: &KafkaConfig, handler: &'a H, total: usize) -> anyhow::Result<Self> {
        let kind = H::Event::TOPIC.kind;
        let records = match kind {
            Kind::Facts => None,
            Kind::State => Some(create(&kafka.redriver(H::GROUP))?),
        };
        Ok(Self {
            handler,
            letters: DeadLetterWriter::new(kafka, H::GROUP, kind)?,
            records,
            limit: kafka.handle_timeout(),
            total,
            progress_printed_at: Instant::now(),
            settled: 0,
            superseded: 0,
            failed: 0,
        })
    }

    async fn redrive_chunk(&mut self, letters: Vec<DeadLetter>) -> anyhow::Result<()> {
        let mut tried = vec![];
        let mut records = vec![];
        for letter in letters {
            match self.content(&letter)? {
                Content::Record(record) => {
                    tried.push(letter);
                    records.push(*record);
                }
                Content::Skipped => self.settle(&[letter.coordinates]).await?,
                Content::Superseded => {
                    self.letters.tombstone(&[letter.coordinates]).await?;
                    self.superseded += 1;
                }
                Content::Undecodable(reason) => self.fail(letter, reason).await?,
            }
        }
        let handler = self.handler;
        let limit = self.limit;
        let mut chunk = Chunk { run: self, letters: tried, finished: BTreeSet::new() };
        handler::deliver_all(&mut chunk, handler, &mut records, limit).await.map_err(|failure| match failure {
            Failure::Retry(error) => error.context("the redrive stopped: a dependency is down"),
            Failure::Reject(reason) => {
                anyhow!("the redrive stopped: the handler rejected a call without a record: {reason}")
            }
            Failure::Resume => anyhow!("the redrive stopped: the handler asks for another position"),
        })
    }

    fn content(&self, letter: &DeadLetter) -> anyhow::Result<Content<H::Event>> {
        let coordinates = letter.coordinates.clone();
        let decoded = match &self.records {
            None => Record::decode(letter.record_key(), &letter.message, coordinates),
            Some(reader) => match tokio::task::block_in_place(|| read_record(reader, &coordinates))? {
                None => return Ok(Content::Superseded),
                Some(message) => Record::decode(message.key(), &message, coordinates),
            },
        };
        Ok(match decoded {
            Ok(Some(record)) => Content::Record(Box::new(record)),
            Ok(None) => Content::Skipped,
            Err(error) => Content::Undecodable(error.to_string()),
        })
    }

    async fn settle(&mut self, letters: &[Coordinates]) -> anyhow::Result<()> {
        fault::point("redrive.after_effect");
        self.letters.tombstone(letters).await?;
        self.settled += letters.len();
        self.print_progress();
        Ok(())
    }

    async fn fail(&mut self, letter: DeadLetter, reason: String) -> anyhow::Result<()> {
        self.letters.write(&DeadLetter { reason, attempts: letter.attempts + 1, ..letter }).await?;
        self.failed += 1;
        self.print_progress();
        Ok(())
    }

    fn print_progress(&mut self) {
        if self.progress_printed_at.elapsed() >= PROGRESS_INTERVAL {
            let done = self.settled + self.superseded + self.failed;
            eprintln!("{}: {done} of {} tried", H::GROUP, self.total);
            self.progress_printed_at = Instant::now();
        }
    }
}

/// Letters that are tried together.
struct Chunk<'a, 'b, H> {
    run: &'a mut Run<'b, H>,
    letters: Vec<DeadLetter>,
    /// The records that are settled or have failed again.
    finished: BTreeSet<Coordinates>,
}

impl<H: Handler> Chunk<'_, '_, H> {
    async fn fail_again(&mut self, record: &Record<H::Event>, reason: String) -> Result<(), Failure> {
        let letter = self.letters.iter().find(|letter| letter.coordinates == record.coordinates);
        let letter = letter.expect("the record was read from one of these letters").clone();
        self.finished.insert(record.coordinates.clone());
        Ok(self.run.fail(letter, reason).await?)
    }
}

impl<H: Handler> Delivery for Chunk<'_, '_, H> {
    type Event = H::Event;
    type Error = Failure;

    async fn attempt(&mut self, records: &mut [Record<H::Event>]) -> Result<(), Failure> {
        handler::call(self.run.handler, records, self.run.limit).await?;
        let accepted: Vec<Coordinates> = records.iter().map(|record| record.coordinates.clone()).collect();
        self.run.settle(&accepted).await?;
        self.finished.extend(accepted);
        Ok(())
    }

    async fn reject(&mut self, record: &Record<H::Event>, reason: String) -> Result<(), Failure> {
        self.fail_again(record, reason).await
    }

    async fn fail(&mut self, record: &Record<H::Event>, failure: Failure) -> Result<(), Failure> {
        self.fail_again(record, failure.describe()).await
    }

    fn is_finished(&self, record: &Record<H::Event>) -> bool {
        self.finished.contains(&record.coordinates)
    }
}

/// `None`: the record was compacted away.
fn read_record(reader: &BaseConsumer, coordinates: &Coordinates) -> anyhow::Result<Option<OwnedMessage>> {
    let mut start = TopicPartitionList::new();
    start.add_partition_offset(&coordinates.topic, coordinates.partition, Offset::Offset(coordinates.offset))?;
    reader.assign(&start)?;
    let deadline = Instant::now() + READ_TIMEOUT;
    while Instant::now() < deadline {
        match reader.poll(POLL_INTERVAL) {
            Some(Ok(message)) => return Ok((message.offset() == coordinates.offset).then(|| message.detach())),
            Some(Err(KafkaError::PartitionEOF(_))) => return Ok(None),
            Some(Err(error)) if class(&error) != Class::Transport => {
                bail!("Kafka refuses to send the record at {coordinates}: {error}")
            }
            Some(Err(error)) => tracing::debug!(%coordinates, %error, "cannot read the record; will retry"),
            None => {}
        }
    }
    bail!("Kafka did not send the record at {coordinates} within {READ_TIMEOUT:?}")
}
