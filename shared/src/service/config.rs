//! Settings that every service has. Doc comments are the manual: they are what `--help` prints.

use std::net::SocketAddr;
use std::time::Duration;

use clap::{Args, ValueEnum};
use rdkafka::ClientConfig;

/// What every service takes, from flags or from the environment.
#[derive(Args, Clone, Debug)]
pub struct ServiceConfig {
    /// Where /livez, /readyz and /metrics are answered. Keep it off the public network.
    #[arg(long, env, default_value = "127.0.0.1:9080")]
    pub admin_addr: SocketAddr,
    /// Which log lines are written, as tracing-subscriber's EnvFilter reads it. Our own, and of the libraries what is wrong.
    #[arg(long, env, default_value = "warn,rdkafka=off,user=info,email=info,analytics=info,cache=info,shared=info")]
    pub rust_log: String,
    /// How log lines look.
    #[arg(long, env, value_enum, default_value_t)]
    pub log_format: LogFormat,
    /// Where traces go, by OTLP over gRPC, for example http://localhost:4317. Not set: nowhere.
    #[arg(long, env)]
    pub otel_exporter_otlp_endpoint: Option<String>,
    /// Consumers per consumer group in this process. More than a topic has partitions is of no use.
    #[arg(long, env, default_value_t = 1, value_parser = clap::value_parser!(u16).range(1..=64))]
    pub consumers: u16,
    #[command(flatten)]
    pub breaker: BreakerConfig,
    #[command(flatten)]
    pub kafka: KafkaConfig,
}

/// When a consumer stops because it rejects too much; see `docs/operations.md`.
#[derive(Args, Clone, Debug)]
pub struct BreakerConfig {
    /// A consumer pauses when more than this share of its last records was rejected. 1: it never does.
    #[arg(long, env, default_value_t = 0.5, value_parser = share)]
    pub breaker_share: f64,
    /// How many records are "its last".
    #[arg(long, env, default_value_t = 200, value_parser = clap::value_parser!(u16).range(1..))]
    pub breaker_window: u16,
    /// It does not pause before so many of them were rejected: a few bad records in a quiet topic are no bad deploy. No more than
    /// the window.
    #[arg(long, env, default_value_t = 50, value_parser = clap::value_parser!(u16).range(1..))]
    pub breaker_minimum: u16,
}

fn share(text: &str) -> Result<f64, &'static str> {
    let share: f64 = text.parse().map_err(|_| "not a number")?;
    if share > 0.0 && share <= 1.0 { Ok(share) } else { Err("a share is above 0 and at most 1, for example 0.5") }
}

/// How log lines look.
#[derive(ValueEnum, Clone, Copy, Debug, Default)]
pub enum LogFormat {
    /// One JSON object a line.
    #[default]
    Json,
    /// For people.
    Pretty,
}

/// Where Kafka is, and how topics are named on it.
#[derive(Args, Clone, Debug)]
pub struct KafkaConfig {
    /// Kafka's bootstrap servers, separated by commas.
    #[arg(long, env, default_value = "localhost:9092")]
    pub kafka_brokers: String,
    /// Stands before every topic and consumer group, so that several systems can share a broker.
    #[arg(long, env, default_value = "")]
    pub topic_prefix: String,
    /// Whether the service creates the topics it owns. `false` where an operator does: then it only checks them.
    #[arg(long, env, default_value_t = true, action = clap::ArgAction::Set)]
    pub manage_topics: bool,
    /// How long a handler may take over one batch before the batch is put off and tried again. Keep it well above what the database
    /// may take for a statement (5 s). After five times as long Kafka gives the partitions of a consumer that hangs to another.
    #[arg(long, env, default_value_t = 60_000, value_parser = clap::value_parser!(u64).range(2_000..=600_000))]
    pub handle_timeout_ms: u64,
    /// On how many brokers the topics that the service creates are kept. Not set: as the brokers' `default.replication.factor`
    /// has it. A record is acknowledged when more than half of them have it. Topics that exist stay as they are.
    #[arg(long, env, value_parser = clap::value_parser!(i16).range(1..))]
    pub kafka_replication_factor: Option<i16>,
}

/// Time-outs of a handler until Kafka thinks its consumer dead: a turn has a few waits besides, and must not come near.
const HANDLE_TIMEOUTS_PER_POLL: u32 = 5;

impl KafkaConfig {
    /// For one call of a handler.
    pub fn handle_timeout(&self) -> Duration {
        Duration::from_millis(self.handle_timeout_ms)
    }

    /// A consumer that has not polled for so long hangs: its partitions go to another.
    pub fn max_poll_interval(&self) -> Duration {
        self.handle_timeout() * HANDLE_TIMEOUTS_PER_POLL
    }

    /// A topic's or group's name on the broker.
    pub fn prefixed(&self, name: &str) -> String {
        format!("{}{name}", self.topic_prefix)
    }

    /// What every client of ours has in common.
    pub fn client(&self) -> ClientConfig {
        let mut client = ClientConfig::new();
        client
            .set("bootstrap.servers", &self.kafka_brokers)
            .set("allow.auto.create.topics", "false")
            // After an outage the next attempt comes within this time (ms), not librdkafka's 10 s.
            .set("reconnect.backoff.max.ms", "1000")
            // A frozen broker keeps its connections and answers nothing: after this time (ms) another one is asked, not after a
            // minute. At most the relay's transaction.timeout.ms, as librdkafka demands.
            .set("socket.timeout.ms", "10000")
            // The loopback name resolves to IPv6 first on many machines; brokers in development listen on IPv4.
            .set("broker.address.family", "v4");
        client
    }

    /// A client that writes. Java clients place keys by murmur2; librdkafka's default would place them elsewhere.
    pub fn producer(&self) -> ClientConfig {
        let mut producer = self.client();
        producer.set("partitioner", "murmur2_random").set("enable.idempotence", "true").set("acks", "all");
        producer
    }
}

#[cfg(test)]
mod tests {
    use super::share;

    #[test]
    fn a_share_is_above_0_and_at_most_1() {
        assert_eq!((share("0.5"), share("1")), (Ok(0.5), Ok(1.0)));
        for wrong in ["0", "-0.1", "1.1", "NaN", "half", ""] {
            assert!(share(wrong).is_err(), "{wrong}");
        }
    }
}
