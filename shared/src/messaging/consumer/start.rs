//! What a consumer needs before its thread starts.

use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use super::breaker::BreakerConfig;
use super::operator::BlockedRecords;
use crate::events::Event;
use crate::messaging::dead_letters;
use crate::messaging::handler::Handler;
use crate::messaging::kafka::KafkaConfig;
use crate::messaging::topics::{Declared, Topics};
use crate::platform::health::Health;
use crate::platform::metrics::{GroupLabels, GroupMetrics, Metrics};

/// A consumer before its thread starts: its handler, its settings, and what connects it to the
/// process.
pub(crate) struct ConsumerSetup<H> {
    /// Distinguishes the consumers of one group in this process.
    pub number: u16,
    pub handler: H,
    pub kafka: KafkaConfig,
    pub topics: Topics,
    pub breaker: BreakerConfig,
    /// How many records a batch has at most.
    pub batch_records: u16,
    /// Whether spans are exported to a collector.
    pub exports_spans: bool,
    /// Changes when an operator resumes the consumers whose breaker is open.
    pub resumed: watch::Receiver<()>,
    /// Why an operator has paused the consumers of this process. `None`: they are not paused.
    pub paused: watch::Receiver<Option<String>>,
    /// The records that block partitions of this process.
    pub blocked_records: BlockedRecords,
    pub health: Health,
    pub metrics: Metrics,
    /// Those metrics that each batch changes.
    pub group_metrics: GroupMetrics,
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

    /// Waits until the handler's topic exists, and creates the topic of the dead letters.
    pub async fn prepare_topics(&self) -> anyhow::Result<()> {
        self.health.report(&self.component("group"), format!("the topic {}", self.topic()));
        self.topics.ensure(&[dead_letters::declared_topic(&self.kafka, H::GROUP)]).await?;
        self.topics.wait_until_exists(&Declared::of(&self.kafka, &H::Event::TOPIC)).await
    }
}
