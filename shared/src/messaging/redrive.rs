//! Redrive: the open dead letters go through the same handler once more, outside the topic's order. Nothing is ever published
//! into a source topic again: every other group would see it twice.

use std::slice;
use std::time::Duration;

use anyhow::{Context, bail};
use clap::Args;
use rdkafka::consumer::{BaseConsumer, Consumer};
use rdkafka::error::KafkaError;
use rdkafka::message::{Message, OwnedMessage};
use rdkafka::{Offset, TopicPartitionList};
use tokio::time::Instant;

use super::dead_letters::{self, DeadLetter, DeadLetters};
use super::{Failure, Handler, Record, Source, handler};
use crate::events::{Event, Kind};
use crate::fault;
use crate::service::{KafkaConfig, telemetry};

const READ_TIMEOUT: Duration = Duration::from_secs(10);
const POLL: Duration = Duration::from_millis(100);

/// Letters that are tried together, as a consumer handles a batch; one by one where one of them fails.
const CHUNK: usize = 100;
/// How often a long redrive says how far it is.
const PROGRESS: Duration = Duration::from_secs(1);

/// The subcommand `redrive`.
#[derive(Args, Clone, Debug, Default)]
pub struct Redrive {
    /// Only these letters, by topic-partition-offset as `dead-letters` lists them; also when they are parked.
    #[arg(long, value_name = "SOURCE", num_args = 1..)]
    pub only: Vec<Source>,
    /// Say what would be tried, and change nothing.
    #[arg(long)]
    pub dry_run: bool,
}

/// Tries the group's open letters again and prints what became of them. Crash after the handler's effect and before the
/// tombstone: the letter is still open and the next redrive's second effect is a duplicate, which handlers are made for. The
/// group may go on consuming meanwhile.
///
/// # Errors
/// Kafka does not answer, or a dependency of the handler is down: what is not settled yet stays open.
#[expect(clippy::print_stdout, reason = "it is what the subcommand answers")]
pub async fn redrive<H: Handler>(
    kafka: &KafkaConfig,
    group: &str,
    handler: &H,
    options: &Redrive,
) -> anyhow::Result<()> {
    telemetry::hide_panic_messages();
    let open = tokio::task::block_in_place(|| dead_letters::open(kafka, group))?;
    let of_group = |named: &&Source| named.topic == kafka.prefixed(H::Event::TOPIC.name);
    for named in options.only.iter().filter(of_group) {
        if !open.iter().any(|letter| letter.source == *named) {
            eprintln!("{group}: {named} is not open: it was settled, or never set aside");
        }
    }
    let (letters, parked) = choose(open, &options.only);
    if options.dry_run {
        for DeadLetter { source, reason, attempts, .. } in &letters {
            println!("{group}: would try {source}, which failed {attempts} times, the last time with: {reason}");
        }
        println!("{group}: {} would be tried, {parked} parked", letters.len());
        return Ok(());
    }
    let mut run = Run::new(kafka, group, handler, letters.len())?;
    let mut letters = letters.into_iter().peekable();
    while letters.peek().is_some() {
        run.try_together(letters.by_ref().take(CHUNK).collect()).await?;
    }
    let Run { settled, superseded, failed, .. } = run;
    println!("{group}: {settled} settled, {superseded} superseded, {failed} failed again, {parked} parked");
    Ok(())
}

/// The letters to be tried, and how many of the others are parked. What is named is tried in any case.
fn choose(open: Vec<DeadLetter>, only: &[Source]) -> (Vec<DeadLetter>, usize) {
    if only.is_empty() {
        let (parked, tried): (Vec<_>, Vec<_>) = open.into_iter().partition(DeadLetter::parked);
        return (tried, parked.len());
    }
    (open.into_iter().filter(|letter| only.contains(&letter.source)).collect(), 0)
}

/// A redrive of one group, and what it has done so far.
struct Run<'a, H> {
    group: &'a str,
    handler: &'a H,
    dead_letters: DeadLetters,
    /// Reads what pointers point to; facts lie in their letters.
    sources: Option<BaseConsumer>,
    /// For one call of the handler.
    limit: Duration,
    total: usize,
    told: Instant,
    /// The handler took it, now or before.
    settled: usize,
    /// A pointer whose record is gone: something newer has taken its place.
    superseded: usize,
    /// It failed again and stays open.
    failed: usize,
}

/// What a letter stands for.
enum Content<E> {
    Record(Record<E>),
    /// Of a type that this release skips.
    Skipped,
    /// Compaction took it, because its key has a newer record.
    Gone,
    /// It cannot be read, and why.
    Undecodable(String),
}

impl<'a, H: Handler> Run<'a, H> {
    fn new(kafka: &KafkaConfig, group: &'a str, handler: &'a H, total: usize) -> anyhow::Result<Self> {
        let kind = H::Event::TOPIC.kind;
        let sources = if kind == Kind::State { Some(source_reader(kafka)?) } else { None };
        let dead_letters = DeadLetters::new(kafka, group, kind)?;
        let (limit, told) = (kafka.handle_timeout(), Instant::now());
        Ok(Self { group, handler, dead_letters, sources, limit, total, told, settled: 0, superseded: 0, failed: 0 })
    }

    async fn try_together(&mut self, letters: Vec<DeadLetter>) -> anyhow::Result<()> {
        let (mut tried, mut records) = (vec![], vec![]);
        for letter in letters {
            match self.content(&letter)? {
                Content::Record(record) => {
                    tried.push(letter);
                    records.push(record);
                }
                Content::Skipped => self.settle(&[letter.source]).await?,
                Content::Gone => {
                    self.dead_letters.tombstone(&[letter.source]).await?;
                    self.superseded += 1;
                }
                Content::Undecodable(reason) => self.fail(letter, reason).await?,
            }
        }
        if self.attempt(&records).await?.is_none() {
            let sources: Vec<Source> = tried.into_iter().map(|letter| letter.source).collect();
            return self.settle(&sources).await;
        }
        for (letter, record) in tried.into_iter().zip(&records) {
            match self.attempt(slice::from_ref(record)).await? {
                None => self.settle(&[letter.source]).await?,
                Some(reason) => self.fail(letter, reason).await?,
            }
        }
        Ok(())
    }

    fn content(&self, letter: &DeadLetter) -> anyhow::Result<Content<H::Event>> {
        let source = letter.source.clone();
        let decoded = match &self.sources {
            None => Record::decode(dead_letters::source_key(&letter.message), &letter.message, source),
            Some(reader) => match tokio::task::block_in_place(|| read_source(reader, &source))? {
                None => return Ok(Content::Gone),
                Some(message) => Record::decode(message.key(), &message, source),
            },
        };
        Ok(match decoded {
            Ok(Some(record)) => Content::Record(record),
            Ok(None) => Content::Skipped,
            Err(error) => Content::Undecodable(error.to_string()),
        })
    }

    /// `None`: it worked. Otherwise why one of the records was rejected again, or that they were too many; then none of them counts
    /// as handled.
    async fn attempt(&self, records: &[Record<H::Event>]) -> anyhow::Result<Option<String>> {
        if records.is_empty() {
            return Ok(None);
        }
        match handler::call(self.handler, records, self.limit).await {
            Ok(_) => Ok(None),
            // Fewer at once may be quick enough.
            Err(failure) if records.len() > 1 && failure.took_too_long() => Ok(Some("too slow together".to_owned())),
            Err(failure) => match (failure.rejection(), failure) {
                (Some(reason), _) => Ok(Some(reason)),
                (None, Failure::Retry(error)) => Err(error.context("a dependency of the handler is down")),
                (None, _) => bail!("the handler asks for another position, which a redrive does not have"),
            },
        }
    }

    async fn settle(&mut self, sources: &[Source]) -> anyhow::Result<()> {
        fault::point("redrive.after_effect");
        self.dead_letters.tombstone(sources).await?;
        self.settled += sources.len();
        self.tell_progress();
        Ok(())
    }

    async fn fail(&mut self, letter: DeadLetter, reason: String) -> anyhow::Result<()> {
        self.dead_letters.write(&DeadLetter { reason, attempts: letter.attempts + 1, ..letter }).await?;
        self.failed += 1;
        self.tell_progress();
        Ok(())
    }

    fn tell_progress(&mut self) {
        if self.told.elapsed() >= PROGRESS {
            let done = self.settled + self.superseded + self.failed;
            eprintln!("{}: {done} of {} tried", self.group, self.total);
            self.told = Instant::now();
        }
    }
}

fn source_reader(kafka: &KafkaConfig) -> anyhow::Result<BaseConsumer> {
    kafka
        .client()
        .set("group.id", kafka.prefixed("redrive")) // never joined: the client asks for a name
        .set("enable.auto.commit", "false")
        .set("enable.partition.eof", "true")
        .set("auto.offset.reset", "earliest")
        .create()
        .context("the Kafka settings are wrong")
}

/// `None`: it is not there any more.
fn read_source(reader: &BaseConsumer, source: &Source) -> anyhow::Result<Option<OwnedMessage>> {
    let mut start = TopicPartitionList::new();
    start.add_partition_offset(&source.topic, source.partition, Offset::Offset(source.offset))?;
    reader.assign(&start)?;
    let deadline = Instant::now() + READ_TIMEOUT;
    while Instant::now() < deadline {
        match reader.poll(POLL) {
            Some(Ok(message)) => return Ok((message.offset() == source.offset).then(|| message.detach())),
            Some(Err(KafkaError::PartitionEOF(_))) => return Ok(None),
            Some(Err(error)) => tracing::debug!(%source, %error, "cannot read the source yet"),
            None => {}
        }
    }
    bail!("Kafka did not hand out {source} in time")
}
