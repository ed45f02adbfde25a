//! The connection to Kafka: its settings, and the client settings that all clients share.

use std::time::Duration;

use anyhow::Context;
use clap::Args;
use rdkafka::ClientConfig;
use rdkafka::config::FromClientConfig;

use crate::platform::settings::number;

/// The Kafka cluster, and how topics are named on it.
#[derive(Args, Clone, Debug)]
pub struct KafkaConfig {
    /// Kafka's bootstrap servers, separated by commas.
    #[arg(long, env, default_value = "localhost:9092")]
    pub kafka_brokers: String,
    /// Prefix of every topic and consumer group, so that several systems can share a cluster.
    #[arg(long, env, default_value = "")]
    pub topic_prefix: String,
    /// Whether the service creates the topics that it owns. Set it to `false` if an operator
    /// creates them. The service then only checks them.
    #[arg(long, env, default_value_t = true, action = clap::ArgAction::Set)]
    pub manage_topics: bool,
    /// How long a handler may take for one batch, in milliseconds, before the batch is retried
    /// later. Keep it well above the time-out of a database statement (5000). If a consumer hangs
    /// for five times as long, Kafka assigns its partitions to another one.
    #[arg(long, env, default_value_t = 60_000, value_parser = number::<u64>(2_000..=600_000))]
    pub handle_timeout_ms: u64,
    /// How often a consumer commits its offsets, in milliseconds. It also commits when it loses a
    /// partition and when it stops. After a crash the records since the last commit are delivered
    /// again, which changes nothing.
    #[arg(long, env, default_value_t = 1_000, value_parser = number::<u32>(100..=60_000))]
    pub offset_commit_ms: u32,
    /// Replicas of each topic that the service creates. Default: the brokers'
    /// `default.replication.factor`. A record is acknowledged when more than half of the replicas
    /// have it. Existing topics do not change.
    #[arg(long, env, value_parser = number::<i16>(1..=100))]
    pub kafka_replication_factor: Option<i16>,
}

/// The longest time between two polls, in handler time-outs. A turn of the consumer's loop takes at
/// most about four of them: one for the whole batch, two more if its records are then tried one by
/// one, and one for a record that blocks its partition.
const HANDLE_TIMEOUTS_PER_POLL: u32 = 5;

impl KafkaConfig {
    /// The time limit for one call of a handler.
    pub fn handle_timeout(&self) -> Duration {
        Duration::from_millis(self.handle_timeout_ms)
    }

    /// If a consumer does not poll for this long, Kafka assigns its partitions to another one.
    pub fn max_poll_interval(&self) -> Duration {
        self.handle_timeout() * HANDLE_TIMEOUTS_PER_POLL
    }

    /// The name of a topic or group on the broker.
    pub fn prefixed(&self, name: &str) -> String {
        format!("{}{name}", self.topic_prefix)
    }

    /// The settings that all our clients have in common.
    pub fn client(&self) -> ClientConfig {
        let mut client = ClientConfig::new();
        client
            .set("bootstrap.servers", &self.kafka_brokers)
            .set("allow.auto.create.topics", "false")
            // The longest wait (ms) before the next connection attempt after an outage;
            // librdkafka's default is 10 s.
            .set("reconnect.backoff.max.ms", "1000")
            // A frozen broker keeps its connections open and does not answer. After this time (ms)
            // the client tries another broker; the default is a minute. librdkafka allows no more
            // than the relay's transaction.timeout.ms.
            .set("socket.timeout.ms", "10000")
            // `localhost` resolves to IPv6 first on many machines, and brokers in development
            // listen on IPv4.
            .set("broker.address.family", "v4");
        client
    }

    /// The settings of a producer. Java clients choose partitions by murmur2; librdkafka's default
    /// would choose others.
    pub fn producer(&self) -> ClientConfig {
        let mut producer = self.client();
        producer.set("partitioner", "murmur2_random").set("enable.idempotence", "true").set("acks", "all");
        producer
    }

    /// The settings of a consumer that joins no group and commits nothing: it assigns partitions to
    /// itself. `name` is its group id, which librdkafka requires nevertheless. An offset that Kafka
    /// does not have is an error.
    pub fn reader(&self, name: &str) -> ClientConfig {
        let mut reader = self.client();
        reader
            .set("group.id", self.prefixed(name))
            .set("enable.auto.commit", "false")
            .set("enable.auto.offset.store", "false")
            .set("isolation.level", "read_committed")
            .set("auto.offset.reset", "error")
            .set("enable.partition.eof", "true")
            .set("queued.max.messages.kbytes", "16384");
        reader
    }
}

/// Creates a client. It connects in the background.
///
/// # Errors
/// librdkafka does not accept a setting.
pub(super) fn create<C: FromClientConfig>(config: &ClientConfig) -> anyhow::Result<C> {
    config.create().context("librdkafka does not accept the Kafka settings")
}
