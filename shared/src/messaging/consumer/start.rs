//! How a consumer starts: its topics exist, it has joined its group, and the loop begins.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Instant;

use anyhow::Context;
use rdkafka::ClientConfig;
use rdkafka::consumer::{BaseConsumer, Consumer as _};
use tokio::runtime::Handle as Runtime;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use super::{Assignment, BATCH_RECORDS, Breaker, Done, Running};
use crate::events::Event;
use crate::messaging::dead_letters::{self, DeadLetters};
use crate::messaging::{Handler, topics};
use crate::service::{BreakerConfig, Health, KafkaConfig, Metrics};

/// A consumer before its thread starts.
pub(crate) struct Consumer<H> {
    pub group: String,
    pub number: u16,
    pub handler: H,
    pub kafka: KafkaConfig,
    pub breaker: BreakerConfig,
    /// Changes when an operator says that what is paused by its breaker shall go on.
    pub resumed: watch::Receiver<()>,
    pub health: Health,
    pub metrics: Metrics,
    pub stop: CancellationToken,
}

impl<H: Handler> Consumer<H> {
    /// Consumes until told to stop.
    ///
    /// # Errors
    /// What waiting cannot mend: the client's settings, an offset out of range, a topic that differs from its declaration.
    pub fn run(self) -> anyhow::Result<()> {
        let runtime = Runtime::current();
        let breaker = Breaker::new(&self.breaker)?;
        self.health.waiting(&self.part("group"), format!("the topic {}", self.topic()));
        let dead_letters = DeadLetters::new(&self.kafka, &self.group, H::Event::TOPIC.kind)?;
        let dead_letter_topic = dead_letters.topic().to_owned();
        let ready = runtime.block_on(self.stop.run_until_cancelled(async {
            topics::ensure_one(&self.kafka, &dead_letter_topic, 1, dead_letters::SETTINGS).await?;
            topics::exists(&self.kafka, &self.topic(), H::Event::TOPIC.partitions).await
        }));
        let Some(ready) = ready else { return Ok(()) };
        ready?;
        let assignment =
            Assignment::new(self.topic(), self.group.clone(), self.part("group"), &self.health, &self.metrics);
        let client: BaseConsumer<Assignment> =
            self.client().create_with_context(assignment).context("the Kafka settings are wrong")?;
        client.subscribe(&[&self.topic()]).context("cannot subscribe")?;
        let consumer = Running {
            client,
            runtime,
            dead_letters,
            batch: Vec::with_capacity(BATCH_RECORDS),
            done: Done::default(),
            dropped: BTreeSet::new(),
            breaker,
            reached: BTreeMap::new(),
            at_end: BTreeSet::new(),
            told_at: None,
            place_at: Instant::now(),
            pause: None,
            setup: self,
        };
        consumer.run()
    }

    /// The name under which `/readyz` tells what this consumer waits for.
    pub(crate) fn part(&self, aspect: &str) -> String {
        format!("{} {} {aspect}", self.group, self.number)
    }

    pub(super) fn topic(&self) -> String {
        self.kafka.prefixed(H::Event::TOPIC.name)
    }

    fn client(&self) -> ClientConfig {
        let mut client = self.kafka.client();
        client
            .set("group.id", self.kafka.prefixed(&self.group))
            .set("partition.assignment.strategy", "cooperative-sticky")
            .set("isolation.level", "read_committed")
            .set("enable.auto.offset.store", "false")
            .set("auto.commit.interval.ms", "1000")
            // Every partition's start is chosen by us; an offset that Kafka does not have stops us instead of skipping.
            .set("auto.offset.reset", "error")
            .set("enable.partition.eof", "true")
            .set("session.timeout.ms", "10000")
            .set("max.poll.interval.ms", self.kafka.max_poll_interval().as_millis().to_string())
            .set("statistics.interval.ms", "500")
            // A group that was formed while a broker did not know the new topic yet has nothing to read. It looks again after this
            // time (ms), not after librdkafka's five minutes.
            .set("topic.metadata.refresh.interval.ms", "5000")
            // The bound on memory: bytes of the whole queue, and records per partition, since the bytes leave out what a record
            // costs beside its content. By default 100,000 are fetched ahead: a backlog of small ones filled a container.
            .set("queued.max.messages.kbytes", "16384")
            .set("queued.min.messages", "1000")
            .set("fetch.wait.max.ms", "100");
        client
    }
}
