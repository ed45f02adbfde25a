//! Kafka, Postgres, Redis and the SMTP sink, started together.

use std::net::SocketAddr;
use std::path::Path;

use anyhow::Result;
use futures::future::join_all;

use crate::fetch::Fetched;
use crate::kafka::{Kafka, start_cluster};
use crate::ports;
use crate::postgres::{Durability, Postgres};
use crate::process::Logs;
use crate::redis::Redis;
use crate::smtp_sink::SmtpSink;

#[derive(Clone, Copy)]
pub struct Ports {
    pub kafka: u16,
    /// The ports of the second and the third broker, for a cluster of three.
    pub further_brokers: Option<[u16; 2]>,
    pub postgres: u16,
    pub redis: u16,
    pub smtp: u16,
    /// The SMTP sink's list of mails.
    pub mails: u16,
}

impl Ports {
    /// The ports that docker-compose.yml publishes.
    pub const PUBLISHED: Self =
        Self { kafka: 9092, further_brokers: None, postgres: 5432, redis: 6379, smtp: 1025, mails: 8025 };
    pub const PUBLISHED_THREE_BROKERS: Self = Self { further_brokers: Some([9093, 9094]), ..Self::PUBLISHED };

    pub fn free() -> Self {
        Self {
            kafka: ports::free(),
            further_brokers: None,
            postgres: ports::free(),
            redis: ports::free(),
            smtp: ports::free(),
            mails: ports::free(),
        }
    }

    pub fn free_three_brokers() -> Self {
        Self { further_brokers: Some([ports::free(), ports::free()]), ..Self::free() }
    }

    /// Fails when another program listens on one of the ports.
    pub fn require_free(&self) -> Result<()> {
        for port in self.brokers() {
            ports::require_free(port, "Kafka")?;
        }
        ports::require_free(self.postgres, "Postgres")?;
        ports::require_free(self.redis, "Redis")?;
        ports::require_free(self.smtp, "the SMTP sink")?;
        ports::require_free(self.mails, "the SMTP sink's list of mails")
    }

    fn brokers(&self) -> Vec<u16> {
        [self.kafka].into_iter().chain(self.further_brokers.into_iter().flatten()).collect()
    }
}

pub struct Stack {
    /// The only broker, or the first of three.
    pub kafka: Kafka,
    pub further_brokers: Vec<Kafka>,
    pub postgres: Postgres,
    pub redis: Redis,
    pub sink: SmtpSink,
    pub ports: Ports,
}

impl Stack {
    /// Starts all components on the data in `folder` and waits until they are ready. A component
    /// without data there starts empty.
    pub async fn start(
        fetched: &Fetched,
        folder: &Path,
        ports: Ports,
        durability: Durability,
        logs: &Logs,
    ) -> Result<Self> {
        ports.require_free()?;
        let kafka_folder = folder.join("kafka");
        let postgres_folder = folder.join("postgres");
        let redis_folder = folder.join("redis");
        let ((kafka, further_brokers), postgres, redis, sink) = tokio::try_join!(
            start_kafka(fetched, &kafka_folder, ports, logs),
            Postgres::start(fetched, &postgres_folder, ports.postgres, durability, logs),
            Redis::start(fetched, &redis_folder, ports.redis, logs),
            SmtpSink::start(loopback(ports.smtp)),
        )?;
        sink.serve_http(loopback(ports.mails)).await?;
        Ok(Self { kafka, further_brokers, postgres, redis, sink, ports })
    }

    /// Stops each component after it has finished its writes. Dropping the stack kills the
    /// components instead, which is faster and sufficient if the data is not used again.
    pub async fn stop(mut self) {
        let Self { kafka, further_brokers, postgres, redis, .. } = &mut self;
        let brokers = [kafka].into_iter().chain(further_brokers);
        tokio::join!(join_all(brokers.map(Kafka::stop)), postgres.stop(), redis.stop());
    }

    /// Kafka's bootstrap servers, separated by commas.
    pub fn kafka_addresses(&self) -> String {
        let brokers = [&self.kafka].into_iter().chain(&self.further_brokers);
        brokers.map(Kafka::address).collect::<Vec<_>>().join(",")
    }

    pub fn brokers(&mut self) -> impl Iterator<Item = &mut Kafka> {
        [&mut self.kafka].into_iter().chain(&mut self.further_brokers)
    }
}

async fn start_kafka(fetched: &Fetched, folder: &Path, ports: Ports, logs: &Logs) -> Result<(Kafka, Vec<Kafka>)> {
    if ports.further_brokers.is_none() {
        return Ok((Kafka::start(fetched, folder, ports.kafka, "", logs).await?, vec![]));
    }
    let mut brokers = start_cluster(fetched, folder, &ports.brokers(), logs).await?;
    Ok((brokers.remove(0), brokers))
}

fn loopback(port: u16) -> SocketAddr {
    ([127, 0, 0, 1], port).into()
}
