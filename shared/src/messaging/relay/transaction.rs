//! A round of the relay as one Kafka transaction: readers see all of its records, or none.

use std::collections::HashMap;
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Context, anyhow, bail};
use rdkafka::ClientContext;
use rdkafka::error::{KafkaError, RDKafkaErrorCode};
use rdkafka::message::{Header, OwnedHeaders};
use rdkafka::producer::{BaseRecord, DeliveryResult, Producer, ProducerContext, ThreadedProducer};
use uuid::Uuid;

use crate::events::Envelope;
use crate::fault;
use crate::messaging::kafka::KafkaConfig;

/// Readers of committed records wait at most this long (ms) for a transaction whose leader died.
const TRANSACTION_TIMEOUT_MS: &str = "10000";
/// A round fails if a record is not acknowledged within this time (ms). Below the transaction's time-out.
const DELIVERY_TIMEOUT_MS: &str = "8000";
/// A topic that is unknown for this long (ms) does not exist. Below the delivery time-out.
const TOPIC_UNKNOWN_MS: &str = "4000";
const INIT_TIMEOUT: Duration = Duration::from_secs(10);
const COMMIT_TIMEOUT: Duration = Duration::from_secs(10);
/// All delivery reports arrive within the delivery time-out. This limit guards against a client that sends none.
const REPORTS_TIMEOUT: Duration = Duration::from_secs(12);
const QUEUE_FULL_PAUSE: Duration = Duration::from_millis(5);

/// Kafka rejected these records, and would reject them again.
#[derive(Debug, thiserror::Error)]
#[error("Kafka rejects the rows of {} keys", keys.len())]
pub(super) struct Refused {
    pub keys: Vec<Uuid>,
    #[source]
    pub cause: KafkaError,
}

/// The producer of one term as leader. After an error it is dropped. The `init_transactions` of its successor aborts the
/// transaction that it left open.
pub(super) struct Transactions {
    producer: ThreadedProducer<Reports>,
    reports: Arc<DeliveryReports>,
}

/// A record to be published.
pub(super) struct Outgoing {
    /// The topic's name on the broker.
    pub topic: String,
    pub envelope: Envelope,
    /// `None` is a tombstone.
    pub payload: Option<Vec<u8>>,
}

impl Transactions {
    /// Fences every earlier producer of this database's relay. Takes up to two seconds on a new cluster.
    pub fn begin_term(kafka: &KafkaConfig, database: &str) -> anyhow::Result<Self> {
        let reports = Arc::new(DeliveryReports::default());
        let producer: ThreadedProducer<Reports> = kafka
            .producer()
            .set("transactional.id", kafka.prefixed(&format!("{database}.relay")))
            .set("transaction.timeout.ms", TRANSACTION_TIMEOUT_MS)
            .set("message.timeout.ms", DELIVERY_TIMEOUT_MS)
            .set("topic.metadata.propagation.max.ms", TOPIC_UNKNOWN_MS)
            .set("linger.ms", "1") // the round is the batch
            .create_with_context(Reports(Arc::clone(&reports)))
            .context("librdkafka does not accept the Kafka settings")?;
        producer.init_transactions(INIT_TIMEOUT).context("cannot reach Kafka's transaction coordinator")?;
        Ok(Self { producer, reports })
    }

    /// Publishes the records in order and commits. It waits for all delivery reports before the commit, because
    /// librdkafka's own flush within `commit_transaction` sleeps in steps of 100 ms (measured).
    pub fn publish(&mut self, records: &[Outgoing]) -> anyhow::Result<()> {
        let total = records.len();
        let keys: Vec<Uuid> = records.iter().map(|record| record.envelope.key).collect();
        self.producer.begin_transaction().context("cannot begin a Kafka transaction")?;
        self.reports.reset();
        for (index, record) in records.iter().enumerate() {
            self.enqueue(index, record)?;
        }
        fault::point("relay.after_enqueue");
        let failures = self.reports.wait(total)?;
        fault::point("relay.after_ack");
        let refused: Vec<&usize> =
            failures.0.iter().filter(|(_, cause)| refuses(cause)).map(|(index, _)| index).collect();
        if let Some(first) = refused.first() {
            let cause = failures.0[first].clone();
            return Err(Refused { keys: refused.iter().map(|index| keys[**index]).collect(), cause }.into());
        }
        if let Some(cause) = failures.0.into_values().next() {
            return Err(anyhow!(cause).context("Kafka did not acknowledge the round"));
        }
        self.producer.commit_transaction(COMMIT_TIMEOUT).context("cannot commit the Kafka transaction")
    }

    /// Waits while the local queue is full: to skip the record would change the order.
    fn enqueue(&self, index: usize, outgoing: &Outgoing) -> anyhow::Result<()> {
        let Outgoing { topic, envelope, payload } = outgoing;
        let key = envelope.key.to_string();
        let headers = envelope
            .headers()
            .iter()
            .fold(OwnedHeaders::new(), |headers, (key, value)| headers.insert(Header { key, value: Some(value) }));
        let mut record = BaseRecord::with_opaque_to(topic, index).key(&key).headers(headers);
        if let Some(payload) = payload {
            record = record.payload(payload);
        }
        let deadline = Instant::now() + REPORTS_TIMEOUT;
        loop {
            record = match self.producer.send(record) {
                Ok(()) => return Ok(()),
                Err((KafkaError::MessageProduction(RDKafkaErrorCode::QueueFull), unsent))
                    if Instant::now() < deadline =>
                {
                    std::thread::sleep(QUEUE_FULL_PAUSE);
                    unsent
                }
                Err((cause, _)) if refuses(&cause) => return Err(Refused { keys: vec![envelope.key], cause }.into()),
                Err((cause, _)) => return Err(cause).context("cannot enqueue a row"),
            };
        }
    }
}

/// Whether the error is about this record, so that a retry would fail too.
fn refuses(cause: &KafkaError) -> bool {
    use RDKafkaErrorCode::{
        InvalidMessage, InvalidMessageSize, InvalidRecord, MessageSizeTooLarge, TopicAuthorizationFailed, UnknownTopic,
        UnknownTopicOrPartition,
    };
    matches!(
        cause.rdkafka_error_code(),
        Some(
            InvalidMessage
                | InvalidMessageSize
                | InvalidRecord
                | MessageSizeTooLarge
                | TopicAuthorizationFailed
                | UnknownTopic
                | UnknownTopicOrPartition
        )
    )
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
