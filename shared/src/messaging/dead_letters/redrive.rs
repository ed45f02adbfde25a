//! Redrive: hands open dead letters to the same handler again, outside the topic's order. It does
//! not write the records to their topic again, because all other groups would read them too.
//!
//! It runs in the process of the service, with the handler of its consumers. Each group has one
//! thread that redrives, so a process tries the letters of a group one job after another.

use std::collections::BTreeSet;
use std::ops::ControlFlow;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{anyhow, ensure};
use rdkafka::message::Message;
use tokio::runtime::Handle as Runtime;
use tokio::sync::{mpsc, oneshot, watch};
use tokio::time::{Instant, sleep_until};
use tokio_util::sync::CancellationToken;

use super::index::LetterIndex;
use super::letter::{DeadLetter, DeadLetterWriter};
use super::page::{Filter, Line};
use crate::events::{Event, Kind};
use crate::fault;
use crate::messaging::handler::{self, Delivery, Failure, Handler};
use crate::messaging::kafka::KafkaConfig;
use crate::messaging::reader::{RecordReader, TopicReader};
use crate::messaging::record::{Coordinates, Record};

/// Letters that are tried together, at most.
const CHUNK: usize = 100;
/// Bytes of letters that are tried together. One letter more may exceed it.
const CHUNK_BYTES: usize = 4 * 1024 * 1024;
/// Records that are read for one chunk, at most. A filter may match none of a million letters, and
/// the redrive reports its progress and notices the stop between two chunks.
const CHUNK_READ: usize = 10_000;

/// An order to redrive some letters of a group.
pub struct Job {
    pub chosen: Chosen,
    /// Letters per second, at most: the handler shares its database with the consumers.
    pub rate: u32,
    pub progress: watch::Sender<Progress>,
    /// Gets the result when the job has ended.
    pub ended: oneshot::Sender<anyhow::Result<()>>,
}

/// Which letters.
pub enum Chosen {
    /// These, even if they are parked.
    Named(Vec<Coordinates>),
    /// All that match and are not parked.
    Matching(Filter),
}

/// The results of a redrive so far.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Progress {
    /// Letters that the handler accepted, now or before.
    pub settled: usize,
    /// Pointers to records that were compacted away, because their key has a newer record.
    pub superseded: usize,
    /// Letters that failed again and stay open.
    pub failed: usize,
    /// Letters that were not tried, because they are parked.
    pub parked: usize,
    /// How far the reading is in the topic of the letters, in records, and where it ends. Both are
    /// 0 if the letters are named.
    pub read: i64,
    pub of: i64,
}

impl Progress {
    pub fn tried(&self) -> usize {
        self.settled + self.superseded + self.failed
    }
}

/// Redrives the letters of one group.
pub struct Redriver<H> {
    pub handler: H,
    pub kafka: KafkaConfig,
    pub index: LetterIndex,
    pub letters: Arc<DeadLetterWriter>,
    pub stop: CancellationToken,
}

impl<H: Handler> Redriver<H> {
    /// Does the jobs in turn until the process stops. Blocks the calling thread.
    pub fn run(&self, mut jobs: mpsc::Receiver<Job>) -> anyhow::Result<()> {
        Runtime::current().block_on(async {
            while let Some(Some(job)) = self.stop.run_until_cancelled(jobs.recv()).await {
                let result = self.redrive(&job.chosen, job.rate, &job.progress).await;
                // Fails if the process stops, and the receiver with it.
                let _ = job.ended.send(result);
            }
            Ok(())
        })
    }

    /// Tries the chosen letters. The group may consume at the same time, and another process may
    /// redrive the same letters. Crash after the handler's effect and before the tombstone: the
    /// letter is still open, and the next redrive handles its record again. Handlers are
    /// idempotent, so this changes nothing. A letter that fails here after another process has
    /// settled it is open again; its next redrive settles it.
    ///
    /// # Errors
    /// Kafka does not answer, a dependency of the handler is down, or the process stops. Letters that
    /// are not settled stay open.
    async fn redrive(&self, chosen: &Chosen, rate: u32, progress: &watch::Sender<Progress>) -> anyhow::Result<()> {
        let reader = TopicReader::new(&self.kafka, H::GROUP)?;
        // Letters that are written from now on, such as those that fail again, are left to the next
        // redrive.
        let end = reader.end(self.letters.topic())?;
        self.index.until_read(end).await?;
        let records = match H::Event::TOPIC.kind {
            Kind::Facts => None,
            Kind::State => Some(RecordReader::new(&self.kafka, H::GROUP)?),
        };
        let limit = self.kafka.handle_timeout();
        let mut run = Run { redriver: self, reader, records, limit, progress };
        let mut source = Source::new(chosen, end);
        let most = CHUNK.min(rate as usize);
        let started = Instant::now();
        while let Some(chunk) = run.next_chunk(&mut source, most)? {
            run.redrive_chunk(chunk).await?;
            let due = started + Duration::from_secs_f64(progress.borrow().tried() as f64 / f64::from(rate));
            self.stop.run_until_cancelled(sleep_until(due)).await;
            ensure!(!self.stop.is_cancelled(), "the redrive stopped: the process stops");
        }
        Ok(())
    }
}

/// Where the letters come from.
enum Source<'a> {
    Named(std::slice::Iter<'a, Coordinates>),
    Topic { filter: &'a Filter, next: i64, end: i64 },
}

impl<'a> Source<'a> {
    fn new(chosen: &'a Chosen, end: i64) -> Self {
        match chosen {
            Chosen::Named(named) => Self::Named(named.iter()),
            Chosen::Matching(filter) => Self::Topic { filter, next: 0, end },
        }
    }
}

/// A redrive in progress.
struct Run<'a, H> {
    redriver: &'a Redriver<H>,
    reader: TopicReader,
    /// Reads the records of pointers. `None` for facts, whose letters contain the record.
    records: Option<RecordReader>,
    /// The time limit for one call of the handler.
    limit: Duration,
    progress: &'a watch::Sender<Progress>,
}

/// What a letter holds or points to.
enum Content<E> {
    Record(Box<Record<E>>),
    /// This release does not know the type of the event. A newer one may handle it.
    Unknown,
    /// The record was compacted away because its key has a newer record.
    Superseded,
    /// The record cannot be decoded, for this reason.
    Undecodable(String),
}

impl<H: Handler> Run<'_, H> {
    /// The next letters to try. `None`: there are no more.
    fn next_chunk(&mut self, source: &mut Source<'_>, most: usize) -> anyhow::Result<Option<Vec<DeadLetter>>> {
        let Redriver { index, letters, .. } = self.redriver;
        let mut chunk = vec![];
        let mut bytes = 0;
        match source {
            Source::Named(named) => {
                for record in named {
                    let Some(offset) = index.letter_of(record) else { continue };
                    let Some(letter) = self.reader.at(letters.topic(), offset)? else { continue };
                    bytes += letter.payload().map_or(0, <[u8]>::len);
                    chunk.push(DeadLetter::read(record.clone(), letter));
                    if chunk.len() == most || bytes >= CHUNK_BYTES {
                        break;
                    }
                }
            }
            Source::Topic { filter, next, end } => {
                let progress = self.progress;
                let mut read = 0;
                *next = self.reader.scan(letters.topic(), *next, *end, |message| {
                    read += 1;
                    if let Some(record) = index.record_of(&message) {
                        let size = message.payload().map_or(0, <[u8]>::len);
                        let letter = DeadLetter::read(record, message);
                        if filter.matches(&Line::of(H::GROUP, &letter)) {
                            if letter.is_parked() {
                                progress.send_modify(|progress| progress.parked += 1);
                            } else {
                                bytes += size;
                                chunk.push(letter);
                            }
                        }
                    }
                    if chunk.len() == most || bytes >= CHUNK_BYTES || read == CHUNK_READ {
                        ControlFlow::Break(())
                    } else {
                        ControlFlow::Continue(())
                    }
                })?;
                progress.send_modify(|progress| (progress.read, progress.of) = (*next, *end));
                if chunk.is_empty() && *next < *end {
                    return Ok(Some(chunk));
                }
            }
        }
        Ok(Some(chunk).filter(|chunk| !chunk.is_empty()))
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
                Content::Unknown => {
                    tracing::warn!(
                        group = H::GROUP,
                        coordinates = %letter.coordinates,
                        "this release does not know the type of the event of a dead letter. The letter stays open; redrive \
                         it with a newer release"
                    );
                    self.progress.send_modify(|progress| progress.failed += 1);
                }
                Content::Superseded => {
                    self.redriver.letters.tombstone(&[letter.coordinates]).await?;
                    self.progress.send_modify(|progress| progress.superseded += 1);
                }
                Content::Undecodable(reason) => self.fail(letter, reason).await?,
            }
        }
        let redriver = self.redriver;
        let handler = &redriver.handler;
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
            Some(reader) => match reader.read(&coordinates)? {
                None => return Ok(Content::Superseded),
                Some(message) => Record::decode(message.key(), &message, coordinates),
            },
        };
        Ok(match decoded {
            Ok(Some(record)) => Content::Record(Box::new(record)),
            Ok(None) => Content::Unknown,
            Err(error) => Content::Undecodable(error.to_string()),
        })
    }

    async fn settle(&mut self, letters: &[Coordinates]) -> anyhow::Result<()> {
        fault::point("redrive.after_effect");
        self.redriver.letters.tombstone(letters).await?;
        self.progress.send_modify(|progress| progress.settled += letters.len());
        Ok(())
    }

    async fn fail(&mut self, letter: DeadLetter, reason: String) -> anyhow::Result<()> {
        let attempts = letter.attempts.saturating_add(1);
        self.redriver.letters.write(&DeadLetter { reason, attempts, ..letter }).await?;
        self.progress.send_modify(|progress| progress.failed += 1);
        Ok(())
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
        handler::call(&self.run.redriver.handler, records, self.run.limit).await?;
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
