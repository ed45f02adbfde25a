//! Kafka, Postgres, Redis and the SMTP sink, started together.

use std::net::SocketAddr;
use std::path::Path;

use anyhow::Result;

use crate::fetch::Fetched;
use crate::kafka::Kafka;
use crate::ports;
use crate::postgres::{Durability, Postgres};
use crate::process::Logs;
use crate::redis::Redis;
use crate::smtp_sink::SmtpSink;

#[derive(Clone, Copy)]
pub struct Ports {
    pub kafka: u16,
    pub postgres: u16,
    pub redis: u16,
    pub smtp: u16,
    pub mails: u16,
}

impl Ports {
    /// The ports that docker-compose.yml publishes.
    pub const PUBLISHED: Self = Self { kafka: 9092, postgres: 5432, redis: 6379, smtp: 1025, mails: 8025 };

    pub fn free() -> Self {
        Self {
            kafka: ports::free(),
            postgres: ports::free(),
            redis: ports::free(),
            smtp: ports::free(),
            mails: ports::free(),
        }
    }

    pub fn require_free(&self) -> Result<()> {
        ports::require_free(self.kafka, "Kafka")?;
        ports::require_free(self.postgres, "Postgres")?;
        ports::require_free(self.redis, "Redis")?;
        ports::require_free(self.smtp, "the SMTP sink")?;
        ports::require_free(self.mails, "the SMTP sink's list of mails")
    }
}

pub struct Stack {
    pub kafka: Kafka,
    pub postgres: Postgres,
    pub redis: Redis,
    pub sink: SmtpSink,
    pub ports: Ports,
}

impl Stack {
    /// On the data in `folder`; what is missing there is made.
    pub async fn start(
        fetched: &Fetched,
        folder: &Path,
        ports: Ports,
        durability: Durability,
        logs: &Logs,
    ) -> Result<Self> {
        ports.require_free()?;
        let (kafka_folder, postgres_folder, redis_folder) =
            (folder.join("kafka"), folder.join("postgres"), folder.join("redis"));
        let (kafka, postgres, redis, sink) = tokio::try_join!(
            Kafka::start(fetched, &kafka_folder, ports.kafka, "", logs),
            Postgres::start(fetched, &postgres_folder, ports.postgres, durability, logs),
            Redis::start(fetched, &redis_folder, ports.redis, logs),
            SmtpSink::start(loopback(ports.smtp)),
        )?;
        sink.serve_http(loopback(ports.mails)).await?;
        Ok(Self { kafka, postgres, redis, sink, ports })
    }

    /// Lets each finish what it writes. Dropping the stack kills instead, which is quicker and enough for data that is thrown away.
    pub async fn stop(mut self) {
        tokio::join!(self.kafka.stop(), self.postgres.stop(), self.redis.stop());
    }
}

fn loopback(port: u16) -> SocketAddr {
    ([127, 0, 0, 1], port).into()
}
