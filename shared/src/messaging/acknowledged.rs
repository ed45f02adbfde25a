//! Writes single records, and waits until Kafka has acknowledged each: dead letters and the actions
//! of operators. The producer is idempotent and not transactional. A record may be written twice if
//! the caller repeats it after an error.

use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use anyhow::Context;
use rdkafka::ClientConfig;
use rdkafka::producer::{FutureProducer, FutureRecord, Producer};

use super::kafka::create;

/// How long to wait for room in the producer's queue.
const QUEUE_TIMEOUT: Duration = Duration::from_secs(10);

pub(super) struct AcknowledgedWriter {
    topic: String,
    settings: ClientConfig,
    /// `None` until the first record: a producer has threads and connections, and most processes
    /// never write a record.
    producer: Mutex<Option<FutureProducer>>,
}

impl AcknowledgedWriter {
    /// The process has checked the settings at its start.
    pub fn new(topic: String, settings: ClientConfig) -> Self {
        Self { topic, settings, producer: Mutex::default() }
    }

    pub fn topic(&self) -> &str {
        &self.topic
    }

    /// Returns when Kafka has acknowledged the record.
    ///
    /// # Errors
    /// Kafka did not accept the record, or not in time.
    pub async fn send(&self, record: FutureRecord<'_, String, [u8]>) -> anyhow::Result<()> {
        let sent = self.producer()?.send(record, QUEUE_TIMEOUT).await;
        let sent = sent.map(|_| ()).map_err(|(error, _)| error);
        sent.with_context(|| format!("cannot write to the topic {}", self.topic))
    }

    /// The producer, which the first record creates. A producer that failed is replaced. It fails
    /// for good if the broker refuses its first request, for example because this service may not
    /// write to any topic yet.
    fn producer(&self) -> anyhow::Result<FutureProducer> {
        let mut current = self.producer.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(working) = current.as_ref().filter(|producer| producer.client().fatal_error().is_none()) {
            return Ok(working.clone());
        }
        let producer: FutureProducer = create(&self.settings)?;
        *current = Some(producer.clone());
        Ok(producer)
    }
}
