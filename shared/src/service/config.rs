//! The settings of every service. Doc comments are the manual: `--help` prints them.

use std::net::SocketAddr;

use clap::Args;

use crate::messaging::{BreakerConfig, KafkaConfig};
use crate::platform::telemetry::TelemetryConfig;

/// Settings that every service has. Each can be given as a flag or as an environment variable.
#[derive(Args, Clone, Debug)]
pub struct ServiceConfig {
    /// Address of /livez, /readyz, /status and /metrics. Keep it off the public network.
    #[arg(long, env, default_value = "127.0.0.1:9080")]
    pub admin_addr: SocketAddr,
    #[command(flatten)]
    pub telemetry: TelemetryConfig,
    /// Consumers per consumer group in this process. Consumers beyond the topic's partition count
    /// stay idle.
    #[arg(long, env, default_value_t = 1, value_parser = clap::value_parser!(u16).range(1..=64))]
    pub consumers: u16,
    #[command(flatten)]
    pub breaker: BreakerConfig,
    #[command(flatten)]
    pub kafka: KafkaConfig,
}
