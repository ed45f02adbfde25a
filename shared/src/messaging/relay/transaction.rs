//! A round of the relay as one Kafka transaction: readers see all of its records, or none.

use std::collections::HashMap;
use std::sync::mpsc::{self, Receiver, RecvTimeoutError, SyncSender};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Context, anyhow, ensure};
use rdkafka::ClientContext;
use rdkafka::error::{KafkaError, RDKafkaErrorCode};
use rdkafka::message::{Header, OwnedHeaders};
use rdkafka::producer::{BaseRecord, DeliveryResult, Producer, ProducerContext, ThreadedProducer};
use uuid::Uuid;

use super::blocks::{Scope, scope};
use crate::events::{Envelope, MAX_HEADERS};
use crate::fault;
use crate::messaging::kafka::{KafkaConfig, create_with};

const INIT_TIMEOUT: Duration = Duration::from_secs(10);
const COMMIT_TIMEOUT: Duration = Duration::from_secs(10);
/// Every record is acknowledged or fails within the delivery time-out. This limit guards against a
/// client that does neither.
const DELIVERY_TIMEOUT: Duration = Duration::from_secs(12);
/// How often the relay uses its session while it waits for a round. A round may take up to 18 s with
/// a slow Kafka, and Postgres closes a session that is idle for 15 s.
const WAIT: Duration = Duration::from_secs(3);
const QUEUE_FULL_PAUSE: Duration = Duration::from_millis(5);
/// The relay checks the number of records in flight after this part of the time that it has waited,
/// so it notices the end soon and wakes up rarely.
const CHECKS_PER_WAIT: u32 = 8;
const MIN_CHECK_INTERVAL: Duration = Duration::from_micros(100);
const MAX_CHECK_INTERVAL: Duration = Duration::from_millis(1);

/// Why a round was not committed.
#[derive(Debug)]
pub(super) enum RoundError {
    /// Kafka rejected these records of the round.
    Rejected(Vec<Rejection>),
    /// Kafka rejected the round, and the error names no record. Its code may be about a topic.
    Unexplained(KafkaError),
    /// Anything else. It ends the term.
    Other(anyhow::Error),
}

/// One rejected record.
#[derive(Debug)]
pub(super) struct Rejection {
    /// The record's place in the round.
    pub index: usize,
    pub code: RDKafkaErrorCode,
}

impl<E: Into<anyhow::Error>> From<E> for RoundError {
    fn from(error: E) -> Self {
        Self::Other(error.into())
    }
}

/// The producer of one term as leader. It has a thread of its own, so that the relay can work with
/// the database while a round is in flight. After an error it is dropped. The `init_transactions`
/// of its successor aborts the transaction that it left open.
pub(super) struct Transactions {
    /// `None` while it is dropped.
    rounds: Option<SyncSender<Arc<Vec<Outgoing>>>>,
    results: Receiver<Result<(), RoundError>>,
    thread: Option<JoinHandle<()>>,
}

struct Publisher {
    producer: ThreadedProducer<Reports>,
    failures: Arc<Mutex<Failures>>,
}

/// A record to be published.
pub(super) struct Outgoing {
    /// The row of the outbox.
    pub row: i64,
    /// The topic's logical name.
    pub topic: Arc<str>,
    /// The topic's name on the broker.
    pub destination: Arc<str>,
    /// `None`: the producer chooses it by the key.
    pub partition: Option<i32>,
    pub envelope: Envelope,
    /// `None` is a tombstone.
    pub payload: Option<Vec<u8>>,
}

impl Transactions {
    /// Fences every earlier producer of this outbox's relay. Takes up to two seconds on a new
    /// cluster.
    pub fn begin_term(kafka: &KafkaConfig, transactional_id: &str) -> anyhow::Result<Self> {
        let failures = Arc::<Mutex<Failures>>::default();
        let producer: ThreadedProducer<Reports> =
            create_with(&kafka.transactions(transactional_id), Reports(Arc::clone(&failures)))?;
        producer.init_transactions(INIT_TIMEOUT).context("cannot reach Kafka's transaction coordinator")?;
        let publisher = Publisher { producer, failures };
        let (rounds, received) = mpsc::sync_channel::<Arc<Vec<Outgoing>>>(1);
        let (sent, results) = mpsc::sync_channel(1);
        let thread = std::thread::Builder::new().name("relay publisher".to_owned()).spawn(move || {
            while let Ok(records) = received.recv() {
                let result = publisher.publish(&records);
                drop(records);
                if sent.send(result).is_err() {
                    return;
                }
            }
        })?;
        Ok(Self { rounds: Some(rounds), results, thread: Some(thread) })
    }

    /// Publishes the records as one transaction, in order. Calls `meanwhile` while they are in
    /// flight, and then `waiting` each time that [`WAIT`] has passed. Both get `context`. Returns when
    /// the transaction has ended, also if `meanwhile` fails.
    pub fn publish<C, T>(
        &mut self,
        records: &Arc<Vec<Outgoing>>,
        context: &mut C,
        meanwhile: impl FnOnce(&mut C) -> T,
        mut waiting: impl FnMut(&mut C),
    ) -> (Result<(), RoundError>, T) {
        let rounds = self.rounds.as_ref().expect("only `drop` takes the sender");
        // Fails only if the thread has ended, which the missing result shows.
        let _ = rounds.send(Arc::clone(records));
        let other = meanwhile(context);
        let received = loop {
            match self.results.recv_timeout(WAIT) {
                Err(RecvTimeoutError::Timeout) => waiting(context),
                received => break received,
            }
        };
        match received {
            Ok(result) => (result, other),
            Err(_) => match self.thread.take().map(JoinHandle::join) {
                Some(Err(panic)) => std::panic::resume_unwind(panic),
                _ => (Err(anyhow!("the thread of the producer has ended").into()), other),
            },
        }
    }
}

impl Drop for Transactions {
    fn drop(&mut self) {
        drop(self.rounds.take());
        let _ = self.thread.take().map(JoinHandle::join);
    }
}

impl Publisher {
    /// Publishes the records in order and commits. Before the commit it waits until librdkafka has
    /// accounted for every record: its own flush within `commit_transaction` sleeps in steps of 100
    /// ms (measured: 5,600 rows/s with that sleep, 38,000 rows/s without it).
    fn publish(&self, records: &[Outgoing]) -> Result<(), RoundError> {
        let total = records.len();
        self.producer.begin_transaction().context("cannot begin a Kafka transaction")?;
        let mut enqueued = 0;
        for (index, record) in records.iter().enumerate() {
            match self.enqueue(index, record)? {
                Enqueued::Yes => enqueued += 1,
                Enqueued::TransactionFailed => break,
            }
        }
        fault::point("relay.after_enqueue");
        self.wait_until_accounted()?;
        let failures = std::mem::take(&mut *lock(&self.failures));
        fault::point("relay.after_ack");
        let rejections = rejections(&failures);
        if !rejections.is_empty() {
            return Err(RoundError::Rejected(rejections));
        }
        // If Kafka refused a whole topic, or the transaction failed for another reason, librdkafka
        // has discarded all records, and the commit returns the reason.
        self.producer.commit_transaction(COMMIT_TIMEOUT).map_err(|error| {
            match error.rdkafka_error_code().map(scope) {
                Some(Scope::Term) | None => anyhow!(error).context("cannot commit the Kafka transaction").into(),
                Some(_) => RoundError::Unexplained(error),
            }
        })?;
        if enqueued < total || !failures.0.is_empty() {
            return Err(anyhow!("Kafka committed a round of which it does not have all {total} records").into());
        }
        Ok(())
    }

    /// Waits until no record is in flight: each was acknowledged, or its failure was reported.
    /// librdkafka reports a failure before it counts the record as done.
    fn wait_until_accounted(&self) -> anyhow::Result<()> {
        let begin = Instant::now();
        while self.producer.in_flight_count() > 0 {
            let waited = begin.elapsed();
            ensure!(waited < DELIVERY_TIMEOUT, "librdkafka did not account for all records");
            std::thread::sleep((waited / CHECKS_PER_WAIT).clamp(MIN_CHECK_INTERVAL, MAX_CHECK_INTERVAL));
        }
        Ok(())
    }

    /// Waits while the local queue is full: to skip the record would change the order.
    fn enqueue(&self, index: usize, outgoing: &Outgoing) -> Result<Enqueued, RoundError> {
        let Outgoing { destination, partition, envelope, payload, .. } = outgoing;
        let mut key = Uuid::encode_buffer();
        let key: &str = envelope.key.hyphenated().encode_lower(&mut key);
        let mut record = BaseRecord::with_opaque_to(destination, index).key(key);
        record.headers = headers(envelope);
        if let Some(partition) = partition {
            record = record.partition(*partition);
        }
        if let Some(payload) = payload {
            record = record.payload(payload);
        }
        let begin = Instant::now();
        loop {
            record = match self.producer.send(record) {
                Ok(()) => return Ok(Enqueued::Yes),
                Err((KafkaError::MessageProduction(RDKafkaErrorCode::QueueFull), unsent))
                    if begin.elapsed() < DELIVERY_TIMEOUT =>
                {
                    std::thread::sleep(QUEUE_FULL_PAUSE);
                    unsent
                }
                // Kafka has rejected an earlier record of the round. This one is not the cause.
                Err((KafkaError::MessageProduction(RDKafkaErrorCode::State), _)) => {
                    return Ok(Enqueued::TransactionFailed);
                }
                Err((cause, _)) => {
                    return Err(match cause.rdkafka_error_code() {
                        Some(code) if scope(code) != Scope::Term => {
                            RoundError::Rejected(vec![Rejection { index, code }])
                        }
                        _ => anyhow!(cause).context("cannot enqueue a row").into(),
                    });
                }
            };
        }
    }
}

fn headers(envelope: &Envelope) -> Option<OwnedHeaders> {
    let mut headers = Some(OwnedHeaders::new_with_capacity(MAX_HEADERS));
    envelope.each_header(|key, value| {
        headers = headers.take().map(|headers| headers.insert(Header { key, value: Some(value) }));
    });
    headers
}

enum Enqueued {
    Yes,
    /// The transaction cannot be committed any more, so no further record is accepted.
    TransactionFailed,
}

/// The failures by record. Records that librdkafka discarded because another one failed are left
/// out.
fn rejections(failures: &Failures) -> Vec<Rejection> {
    use RDKafkaErrorCode::{PurgeInflight, PurgeQueue};
    let coded = failures.0.iter().filter_map(|(index, cause)| Some((*index, cause.rdkafka_error_code()?)));
    let coded = coded.filter(|(_, code)| !matches!(code, PurgeInflight | PurgeQueue));
    coded.map(|(index, code)| Rejection { index, code }).collect()
}

/// The failed records, by their index in the round.
#[derive(Default)]
struct Failures(HashMap<usize, KafkaError>);

fn lock(failures: &Mutex<Failures>) -> MutexGuard<'_, Failures> {
    failures.lock().unwrap_or_else(PoisonError::into_inner)
}

struct Reports(Arc<Mutex<Failures>>);

impl ClientContext for Reports {
    fn error(&self, error: KafkaError, reason: &str) {
        // The calls return the errors that matter.
        tracing::debug!(%error, reason, "error of the Kafka producer");
    }
}

impl ProducerContext for Reports {
    type DeliveryOpaque = usize;

    fn delivery(&self, result: &DeliveryResult<'_>, index: usize) {
        if let Err((cause, _)) = result {
            lock(&self.0).0.insert(index, cause.clone());
        }
    }
}
