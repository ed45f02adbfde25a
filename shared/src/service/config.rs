//! The settings of every service. Doc comments are the manual: `--help` prints them.

use std::net::SocketAddr;
use std::time::Duration;

use clap::Args;

use crate::messaging::{BATCH_RECORDS as DEFAULT_BATCH_RECORDS, BreakerConfig, KafkaConfig};
use crate::platform::access::{AuthConfig, RateConfig};
use crate::platform::admin::AdminTokens;
use crate::platform::secret::OptionalSecret;
use crate::platform::server::HttpConfig;
use crate::platform::settings::number;
use crate::platform::telemetry::TelemetryConfig;

/// Settings that every service has. Each can be given as a flag or as an environment variable.
#[derive(Args, Clone, Debug)]
pub struct ServiceConfig {
    /// Address of the admin port: /livez, /readyz, /status and /metrics, and what the subcommands
    /// for operators ask for, such as /dead-letters. Keep it off the public network: reading needs
    /// no token. Actions need one of ADMIN_TOKENS.
    #[arg(long, env, default_value = "127.0.0.1:9080")]
    pub admin_addr: SocketAddr,
    #[command(flatten)]
    pub admin_tokens: OptionalSecret<AdminTokens>,
    #[command(flatten)]
    pub http: HttpConfig,
    #[command(flatten)]
    pub auth: AuthConfig,
    #[command(flatten)]
    pub rates: RateConfig,
    /// How long the process keeps serving after SIGTERM, in milliseconds. From then on /readyz
    /// answers 503. It must be longer than a load balancer needs to notice that and to stop sending
    /// requests. 0 if there is no load balancer.
    #[arg(long, env, default_value_t = 3_000, value_parser = number::<u64>(0..=600_000))]
    pub drain_ms: u64,
    /// How long tasks may take to finish their work in progress after that, in milliseconds. The
    /// process then exits without them. A supervisor must wait two seconds longer than DRAIN_MS and
    /// SHUTDOWN_MS together before it kills the process.
    #[arg(long, env, default_value_t = 8_000, value_parser = number::<u64>(1_000..=900_000))]
    pub shutdown_ms: u64,
    #[command(flatten)]
    pub telemetry: TelemetryConfig,
    /// Consumers per consumer group in this process. Consumers beyond the topic's partition count
    /// stay idle.
    #[arg(long, env, default_value_t = 1, value_parser = number::<u16>(1..=64))]
    pub consumers: u16,
    /// The largest number of records that a consumer hands to its handler at once. It waits for no
    /// record: a batch has those that Kafka has already sent. 1 if each record needs a transaction
    /// of its own.
    #[arg(long, env, default_value_t = DEFAULT_BATCH_RECORDS, value_parser = number::<u16>(1..=10_000))]
    pub batch_records: u16,
    #[command(flatten)]
    pub breaker: BreakerConfig,
    #[command(flatten)]
    pub kafka: KafkaConfig,
}

impl ServiceConfig {
    /// # Errors
    /// Two settings contradict each other.
    pub(crate) fn check(&self) -> anyhow::Result<()> {
        self.http.check()?;
        self.auth.check()?;
        self.breaker.check()?;
        self.kafka.check()
    }

    pub(crate) fn drain(&self) -> Duration {
        Duration::from_millis(self.drain_ms)
    }

    pub(crate) fn shutdown(&self) -> Duration {
        Duration::from_millis(self.shutdown_ms)
    }
}
