//! Redrive: the open dead letters go through the same handler once more, outside the topic's order. Nothing is ever published
//! into a source topic again: every other group would see it twice.

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

/// The subcommand `redrive`.
#[derive(Args, Clone, Debug, Default)]
pub struct Redrive {
    /// Only this letter, by its key topic-partition-offset; also when it is parked.
    #[arg(long)]
    pub only: Option<String>,
}

/// What a redrive did.
#[derive(Default)]
struct Summary {
    /// The handler took it, now or before.
    settled: u64,
    /// A pointer whose record is gone: something newer has taken its place.
    superseded: u64,
    /// It failed again and stays open.
    failed: u64,
    /// Left alone after too many attempts.
    parked: u64,
}

/// Tries the group's open letters again and prints what became of them. Crash after the handler's effect and before the tombstone: the letter is still open
/// and the next redrive's second effect is a duplicate, which handlers are made for. The group may go on consuming meanwhile.
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
    let kind = H::Event::TOPIC.kind;
    let dead_letters = DeadLetters::new(kafka, group, kind)?;
    let letters = tokio::task::block_in_place(|| dead_letters::open(kafka, group))?;
    let mut summary = Summary::default();
    for letter in letters {
        let named = options.only.as_ref().map(|only| *only == letter.source.to_string());
        match named {
            Some(false) => continue,
            None if letter.parked() => {
                summary.parked += 1;
                continue;
            }
            _ => {}
        }
        let Some(message) = original(kafka, kind, &letter)? else {
            dead_letters.tombstone(&letter.source).await?;
            summary.superseded += 1;
            continue;
        };
        match attempt(kafka, handler, kind, &message, &letter.source).await? {
            None => {
                fault::point("redrive.after_effect");
                dead_letters.tombstone(&letter.source).await?;
                summary.settled += 1;
            }
            Some(reason) => {
                tracing::warn!(source = %letter.source, reason, attempts = letter.attempts + 1, "failed again");
                dead_letters.write(&DeadLetter { reason, attempts: letter.attempts + 1, ..letter }).await?;
                summary.failed += 1;
            }
        }
    }
    println!(
        "{group}: {} settled, {} superseded, {} failed again, {} parked",
        summary.settled, summary.superseded, summary.failed, summary.parked
    );
    Ok(())
}

/// `None`: it worked, or is of a type that this release skips. Otherwise why it was rejected again.
async fn attempt<H: Handler>(
    kafka: &KafkaConfig,
    handler: &H,
    kind: Kind,
    message: &OwnedMessage,
    source: &Source,
) -> anyhow::Result<Option<String>> {
    let key = if kind == Kind::Facts { dead_letters::source_key(message) } else { message.key() };
    let record = match Record::decode(key, message, source.clone()) {
        Ok(Some(record)) => record,
        Ok(None) => return Ok(None),
        Err(error) => return Ok(Some(error.to_string())),
    };
    match handler::call(handler, &[record], kafka.handle_timeout()).await {
        Ok(_) => Ok(None),
        Err(failure) => match (failure.rejection(), failure) {
            (Some(reason), _) => Ok(Some(reason)),
            (None, Failure::Retry(error)) => Err(error.context("a dependency of the handler is down")),
            (None, _) => bail!("the handler asks for another position, which a redrive does not have"),
        },
    }
}

/// The letter's record: facts are in the letter itself; a pointer is resolved by reading the source. `None`: compaction took
/// it, because the key has a newer record.
fn original(kafka: &KafkaConfig, kind: Kind, letter: &DeadLetter) -> anyhow::Result<Option<OwnedMessage>> {
    if kind == Kind::Facts {
        return Ok(Some(letter.message.clone()));
    }
    tokio::task::block_in_place(|| read_source(kafka, &letter.source))
}

fn read_source(kafka: &KafkaConfig, source: &Source) -> anyhow::Result<Option<OwnedMessage>> {
    let consumer: BaseConsumer = kafka
        .client()
        .set("group.id", kafka.prefixed("redrive")) // never joined: the client asks for a name
        .set("enable.auto.commit", "false")
        .set("enable.partition.eof", "true")
        .set("auto.offset.reset", "earliest")
        .create()
        .context("the Kafka settings are wrong")?;
    let mut start = TopicPartitionList::new();
    start.add_partition_offset(&source.topic, source.partition, Offset::Offset(source.offset))?;
    consumer.assign(&start)?;
    let deadline = Instant::now() + READ_TIMEOUT;
    while Instant::now() < deadline {
        match consumer.poll(POLL) {
            Some(Ok(message)) => return Ok((message.offset() == source.offset).then(|| message.detach())),
            Some(Err(KafkaError::PartitionEOF(_))) => return Ok(None),
            Some(Err(error)) => tracing::debug!(%source, %error, "cannot read the source yet"),
            None => {}
        }
    }
    bail!("Kafka did not hand out {source} in time")
}
