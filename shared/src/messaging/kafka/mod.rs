//! The connection to Kafka: its settings, the client settings of every kind of client, and whether
//! Kafka can be reached.

mod clients;
mod connection;
mod properties;
mod security;

use std::time::Duration;

use anyhow::Context;
use clap::Args;
use rdkafka::config::{FromClientConfig, FromClientConfigAndContext};
use rdkafka::{ClientConfig, ClientContext};

use crate::platform::settings::number;
use properties::PropertyConfig;
use security::SecurityConfig;

pub(super) use clients::LETTER_MAX_BYTES;
pub(crate) use connection::{report_unknown_connection, watch_connection, watch_files};

/// The Kafka cluster, and how topics are named on it.
#[derive(Args, Clone, Debug)]
pub struct KafkaConfig {
    /// Kafka's bootstrap servers, separated by commas.
    #[arg(long, env, default_value = "localhost:9092")]
    pub kafka_brokers: String,
    #[command(flatten)]
    security: SecurityConfig,
    #[command(flatten)]
    properties: PropertyConfig,
    /// The name under which brokers log and limit this service. Default: `waybill-` and the name of
    /// the service.
    #[arg(long, env)]
    pub kafka_client_id: Option<String>,
    /// The rack or availability zone of this process. Consumers then read from a replica in the
    /// same rack, if the brokers have a `replica.selector.class`.
    #[arg(long, env)]
    kafka_client_rack: Option<String>,
    /// Makes this process a static member of its groups: a restart causes no rebalance if it takes
    /// less than 10 s. But when the process stops, its partitions wait for these 10 s. Every
    /// process needs a value of its own, for example the name of its pod in a StatefulSet.
    #[arg(long, env)]
    kafka_group_instance_id: Option<String>,
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
/// most about four of them: one for the whole batch, two more if its records are then tried in
/// smaller calls, and one for a record that blocks its partition.
const HANDLE_TIMEOUTS_PER_POLL: u32 = 5;

impl KafkaConfig {
    /// # Errors
    /// Two settings contradict each other, a file cannot be read, or librdkafka does not accept a
    /// property.
    pub(crate) fn check(&self) -> anyhow::Result<()> {
        self.security.check()?;
        let kinds = self.kinds();
        self.properties.check(kinds.iter().map(ClientConfig::config_map))?;
        for kind in kinds {
            self.with_properties(kind).create_native_config().context(INVALID)?;
        }
        Ok(())
    }

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

    /// Adds what the setting KAFKA_PROPERTY has. It contains none of our own properties, so the
    /// order does not matter.
    fn with_properties(&self, mut client: ClientConfig) -> ClientConfig {
        for (name, value) in self.properties.iter() {
            client.set(name, value);
        }
        client
    }
}

/// Creates a client. It connects in the background.
///
/// # Errors
/// librdkafka does not accept a setting.
pub(super) fn create<C: FromClientConfig>(config: &ClientConfig) -> anyhow::Result<C> {
    config.create().context(INVALID)
}

/// As [`create`], with a context, which gets the client's reports.
pub(super) fn create_with<X: ClientContext, C: FromClientConfigAndContext<X>>(
    config: &ClientConfig,
    context: X,
) -> anyhow::Result<C> {
    config.create_with_context(context).context(INVALID)
}

const INVALID: &str = "librdkafka does not accept the Kafka settings: look at KAFKA_PROPERTY and the KAFKA_ files";
