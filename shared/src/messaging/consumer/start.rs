//! What a consumer needs before its thread starts.

use rdkafka::ClientConfig;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use super::breaker::BreakerConfig;
use super::operator::BlockedRecords;
use crate::events::Event;
use crate::messaging::dead_letters;
use crate::messaging::handler::Handler;
use crate::messaging::kafka::KafkaConfig;
use crate::messaging::topics::{self, Declared};
use crate::platform::health::Health;
use crate::platform::metrics::{ConsumedLabels, GroupLabels, Metrics};

/// A consumer before its thread starts: its handler, its settings, and what connects it to the
/// process.
pub(crate) struct ConsumerSetup<H> {
    /// Distinguishes the consumers of one group in this process.
    pub number: u16,
    pub handler: H,
    pub kafka: KafkaConfig,
    pub breaker: BreakerConfig,
    /// Changes when an operator resumes the consumers whose breaker is open.
    pub resumed: watch::Receiver<()>,
    /// The records that block partitions of this process.
    pub blocked_records: BlockedRecords,
    pub health: Health,
    pub metrics: Metrics,
    pub stop: CancellationToken,
}

impl<H: Handler> ConsumerSetup<H> {
    /// The component's name in `/status`. `aspect` is what the consumer waits for.
    pub fn component(&self, aspect: &str) -> String {
        format!("{} {aspect}", self.consumer())
    }

    /// The consumer's name in `/status`.
    pub fn consumer(&self) -> String {
        format!("{} {}", H::GROUP, self.number)
    }

    /// The topic's name on the broker.
    pub fn topic(&self) -> String {
        self.kafka.prefixed(H::Event::TOPIC.name)
    }

    pub fn labels(&self) -> GroupLabels {
        GroupLabels { group: H::GROUP.to_owned() }
    }

    /// Counts finished records.
    pub fn count(&self, outcome: &'static str, records: u64) {
        let labels = ConsumedLabels { group: H::GROUP.to_owned(), outcome };
        self.metrics.events_consumed.get_or_create(&labels).inc_by(records);
    }

    /// Waits until the handler's topic exists, and creates the topic of the dead letters.
    pub async fn prepare_topics(&self) -> anyhow::Result<()> {
        self.health.report(&self.component("group"), format!("the topic {}", self.topic()));
        topics::ensure(&self.kafka, &[dead_letters::declared_topic(&self.kafka, H::GROUP)]).await?;
        topics::wait_until_exists(&self.kafka, &Declared::of(&self.kafka, &H::Event::TOPIC)).await
    }

    pub fn client_config(&self) -> ClientConfig {
        let mut client = self.kafka.client();
        client
            .set("group.id", self.kafka.prefixed(H::GROUP))
            .set("partition.assignment.strategy", "cooperative-sticky")
            .set("isolation.level", "read_committed")
            .set("enable.auto.offset.store", "false")
            .set("auto.commit.interval.ms", self.kafka.offset_commit_ms.to_string())
            // We choose the start of every partition. An offset that Kafka does not have is an
            // error and skips nothing.
            .set("auto.offset.reset", "error")
            .set("enable.partition.eof", "true")
            .set("session.timeout.ms", "10000")
            .set("max.poll.interval.ms", self.kafka.max_poll_interval().as_millis().to_string())
            .set("statistics.interval.ms", "500")
            // A group that forms before a broker knows the new topic gets no partitions. It looks
            // again after this time (ms); librdkafka's default is five minutes.
            .set("topic.metadata.refresh.interval.ms", "5000")
            // Two bounds on memory: bytes of the whole queue, and records per partition, because
            // the bytes do not count the overhead of a record. The default of 100,000 small records
            // exceeded the memory of a container.
            .set("queued.max.messages.kbytes", "16384")
            .set("queued.min.messages", "1000")
            .set("fetch.wait.max.ms", "100");
        client
    }
}
