//! A round of the relay as one Kafka transaction: readers see all of its records, or none.

use std::collections::HashMap;
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Context, anyhow, bail, ensure};
use rdkafka::ClientContext;
use rdkafka::error::{KafkaError, RDKafkaErrorCode};
use rdkafka::message::{Header, OwnedHeaders};
use rdkafka::producer::{BaseRecord, DeliveryResult, Producer, ProducerContext, ThreadedProducer};

use super::blocks::{Scope, scope};
use crate::events::Envelope;
use crate::fault;
use crate::messaging::kafka::{KafkaConfig, create_with};

const INIT_TIMEOUT: Duration = Duration::from_secs(10);
const COMMIT_TIMEOUT: Duration = Duration::from_secs(10);
/// All delivery reports arrive within the delivery time-out. This limit guards against a client
/// that sends none.
const REPORTS_TIMEOUT: Duration = Duration::from_secs(12);
const QUEUE_FULL_PAUSE: Duration = Duration::from_millis(5);
/// How often the number of records in flight is checked before a commit. It drops to 0 within
/// microseconds.
const ACCOUNT_INTERVAL: Duration = Duration::from_micros(100);

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

/// The producer of one term as leader. After an error it is dropped. The `init_transactions` of its
/// successor aborts the transaction that it left open.
pub(super) struct Transactions {
    producer: ThreadedProducer<Reports>,
    reports: Arc<DeliveryReports>,
}

/// A record to be published.
pub(super) struct Outgoing {
    /// The topic's name on the broker.
    pub topic: String,
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
        let reports = Arc::new(DeliveryReports::default());
        let producer: ThreadedProducer<Reports> =
            create_with(&kafka.transactions(transactional_id), Reports(Arc::clone(&reports)))?;
        producer.init_transactions(INIT_TIMEOUT).context("cannot reach Kafka's transaction coordinator")?;
        Ok(Self { producer, reports })
    }

    /// Publishes the records in order and commits. Before the commit it waits until librdkafka has
    /// accounted for every record: its own flush within `commit_transaction` sleeps in steps of 100
    /// ms (measured: 5,600 rows/s with that sleep, 38,000 rows/s without it).
    pub fn publish(&mut self, records: &[Outgoing]) -> Result<(), RoundError> {
        let total = records.len();
        self.producer.begin_transaction().context("cannot begin a Kafka transaction")?;
        self.reports.reset();
        let mut enqueued = 0;
        for (index, record) in records.iter().enumerate() {
            match self.enqueue(index, record)? {
                Enqueued::Yes => enqueued += 1,
                Enqueued::TransactionFailed => break,
            }
        }
        fault::point("relay.after_enqueue");
        let failures = self.reports.wait(enqueued)?;
        fault::point("relay.after_ack");
        let rejections = rejections(&failures);
        if !rejections.is_empty() {
            return Err(RoundError::Rejected(rejections));
        }
        self.wait_until_accounted()?;
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

    /// A delivery report arrives shortly before librdkafka counts its record as delivered.
    fn wait_until_accounted(&self) -> anyhow::Result<()> {
        let deadline = Instant::now() + REPORTS_TIMEOUT;
        while self.producer.in_flight_count() > 0 {
            ensure!(Instant::now() < deadline, "librdkafka did not account for all records");
            std::thread::sleep(ACCOUNT_INTERVAL);
        }
        Ok(())
    }

    /// Waits while the local queue is full: to skip the record would change the order.
    fn enqueue(&self, index: usize, outgoing: &Outgoing) -> Result<Enqueued, RoundError> {
        let Outgoing { topic, partition, envelope, payload } = outgoing;
        let key = envelope.key.to_string();
        let headers = envelope
            .headers()
            .iter()
            .fold(OwnedHeaders::new(), |headers, (key, value)| headers.insert(Header { key, value: Some(value) }));
        let mut record = BaseRecord::with_opaque_to(topic, index).key(&key).headers(headers);
        if let Some(partition) = partition {
            record = record.partition(*partition);
        }
        if let Some(payload) = payload {
            record = record.payload(payload);
        }
        let deadline = Instant::now() + REPORTS_TIMEOUT;
        loop {
            record = match self.producer.send(record) {
                Ok(()) => return Ok(Enqueued::Yes),
                Err((KafkaError::MessageProduction(RDKafkaErrorCode::QueueFull), unsent))
                    if Instant::now() < deadline =>
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

/// The delivery reports of the current round.
#[derive(Default)]
struct DeliveryReports {
    round: Mutex<(usize, Failures)>,
    arrived: Condvar,
}

impl DeliveryReports {
    fn reset(&self) {
        *self.round.lock().unwrap_or_else(PoisonError::into_inner) = (0, Failures::default());
    }

    fn wait(&self, total: usize) -> anyhow::Result<Failures> {
        let round = self.round.lock().unwrap_or_else(PoisonError::into_inner);
        let (mut round, _) = self
            .arrived
            .wait_timeout_while(round, REPORTS_TIMEOUT, |(reported, _)| *reported < total)
            .unwrap_or_else(PoisonError::into_inner);
        if round.0 < total {
            bail!("{} of {total} delivery reports did not arrive", total - round.0);
        }
        Ok(std::mem::take(&mut round.1))
    }
}

struct Reports(Arc<DeliveryReports>);

impl ClientContext for Reports {
    fn error(&self, error: KafkaError, reason: &str) {
        // The calls return the errors that matter.
        tracing::debug!(%error, reason, "error of the Kafka producer");
    }
}

impl ProducerContext for Reports {
    type DeliveryOpaque = usize;

    fn delivery(&self, result: &DeliveryResult<'_>, index: usize) {
        let mut round = self.0.round.lock().unwrap_or_else(PoisonError::into_inner);
        round.0 += 1;
        if let Err((cause, _)) = result {
            round.1.0.insert(index, cause.clone());
        }
        self.0.arrived.notify_all();
    }
}
