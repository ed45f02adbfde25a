//! Kafka, Postgres, Redis and the SMTP sink, started together.

use std::fs;
use std::net::SocketAddr;
use std::path::Path;
use std::sync::Arc;

use anyhow::{Error, Result};
use credentials::compose::MAIL_USER;
use futures::future::join_all;
use topology::Service;

use crate::fetch::Fetched;
use crate::kafka::{Kafka, Listener, start_cluster};
use crate::mail_front::{Front, Login, RunningFront};
use crate::ports;
use crate::postgres::{Database, Durability, Postgres, Tls};
use crate::process::{Logs, until_one_ends};
use crate::redis::Redis;
use crate::secured::Secured;
use crate::smtp_sink::SmtpSink;

pub use crate::ports::Ports;

/// The rule of pg_hba.conf for the services of a secured stack.
const TLS_ONLY: &str = "hostssl all all 127.0.0.1/32 scram-sha-256";

/// Which clients the components accept.
#[derive(Clone, Copy)]
pub enum Access<'a> {
    /// All on this machine, without encryption.
    Open,
    /// Those that log in over TLS.
    Secured(&'a Secured),
}

pub struct Stack {
    /// The only broker, or the first of three.
    pub kafka: Kafka,
    pub further_brokers: Vec<Kafka>,
    pub postgres: Postgres,
    pub redis: Redis,
    pub sink: Arc<SmtpSink>,
    pub ports: Ports,
    /// Of a secured stack. The ports are those of the listeners with TLS.
    pub secured: Option<Secured>,
    _front: Option<RunningFront>,
}

impl Stack {
    /// Starts all components on the data in `folder` and waits until they are ready. A component
    /// without data there starts empty.
    pub async fn start(
        fetched: &Fetched,
        folder: &Path,
        ports: Ports,
        durability: Durability,
        access: Access<'_>,
        logs: &Logs,
    ) -> Result<Self> {
        ports.require_free()?;
        let kafka_folder = folder.join("kafka");
        let postgres_folder = folder.join("postgres");
        let redis_folder = folder.join("redis");
        let ((kafka, further_brokers), postgres, redis, sink) = tokio::try_join!(
            start_kafka(fetched, &kafka_folder, ports, access, logs),
            start_postgres(fetched, &postgres_folder, ports, durability, access, logs),
            start_redis(fetched, &redis_folder, ports, access, logs),
            start_sink(ports, access),
        )?;
        let (sink, front) = sink;
        sink.serve_http(loopback(ports.mails)).await?;
        let secured = match access {
            Access::Open => None,
            Access::Secured(secured) => Some(secured.clone()),
        };
        Ok(Self { kafka, further_brokers, postgres, redis, sink: Arc::new(sink), ports, secured, _front: front })
    }

    /// Stops each component after it has finished its writes. Dropping the stack kills the
    /// components instead, which is faster and sufficient if the data is not used again.
    pub async fn stop(mut self) {
        let Self { kafka, further_brokers, postgres, redis, .. } = &mut self;
        let brokers = [kafka].into_iter().chain(further_brokers);
        tokio::join!(join_all(brokers.map(Kafka::stop)), postgres.stop(), redis.stop());
    }

    /// Waits until a component has ended, and returns an error that names it and quotes its log.
    /// For work that has no use for the stack without it.
    pub async fn until_one_ends(&mut self) -> Error {
        let Self { kafka, further_brokers, postgres, redis, .. } = self;
        let brokers = [kafka].into_iter().chain(further_brokers).map(|broker| &mut broker.process);
        until_one_ends(brokers.chain([&mut postgres.process, &mut redis.process])).await
    }

    /// Kafka's bootstrap servers, separated by commas. Those of a secured stack are for clients
    /// that log in.
    pub fn kafka_addresses(&self) -> String {
        if let Some(secured) = &self.secured {
            return secured.kafka_servers();
        }
        let brokers = [&self.kafka].into_iter().chain(&self.further_brokers);
        brokers.map(Kafka::address).collect::<Vec<_>>().join(",")
    }

    /// The URLs of a service's database.
    pub fn database(&self, service: Service) -> Database {
        let database = self.postgres.database(service);
        match &self.secured {
            Some(secured) => secured.over_tls(database),
            None => database,
        }
    }

    pub fn brokers(&mut self) -> impl Iterator<Item = &mut Kafka> {
        [&mut self.kafka].into_iter().chain(&mut self.further_brokers)
    }
}

async fn start_kafka(
    fetched: &Fetched,
    folder: &Path,
    ports: Ports,
    access: Access<'_>,
    logs: &Logs,
) -> Result<(Kafka, Vec<Kafka>)> {
    if let Access::Secured(secured) = access {
        let certificate = secured.certificate_with_key();
        let listener = Listener { port: ports.kafka, certificate: &certificate, users: secured.kafka_users() };
        return Ok((Kafka::start_secured(fetched, folder, ports::free(), &listener, logs).await?, vec![]));
    }
    if ports.further_brokers.is_none() {
        return Ok((Kafka::start(fetched, folder, ports.kafka, "", logs).await?, vec![]));
    }
    let mut brokers = start_cluster(fetched, folder, &ports.brokers(), logs).await?;
    Ok((brokers.remove(0), brokers))
}

async fn start_postgres(
    fetched: &Fetched,
    folder: &Path,
    ports: Ports,
    durability: Durability,
    access: Access<'_>,
    logs: &Logs,
) -> Result<Postgres> {
    let postgres = Postgres::start(fetched, folder, ports.postgres, durability, logs).await?;
    if let Access::Secured(secured) = access {
        let [certificate, key, authority] =
            [secured.certificate(), secured.key(), secured.authority()].map(fs::read_to_string);
        let tls = Tls { certificate: &certificate?, key: &key?, client_authority: &authority? };
        postgres.set_tls(Some(tls)).await?;
        postgres.set_rules(TLS_ONLY).await?;
    }
    Ok(postgres)
}

async fn start_redis(fetched: &Fetched, folder: &Path, ports: Ports, access: Access<'_>, logs: &Logs) -> Result<Redis> {
    match access {
        Access::Open => Redis::start(fetched, folder, ports.redis, logs).await,
        Access::Secured(secured) => Redis::start_secured(fetched, folder, ports.redis, secured, logs).await,
    }
}

/// The sink, and of a secured stack its front. The sink has another port then, which is not
/// published.
async fn start_sink(ports: Ports, access: Access<'_>) -> Result<(SmtpSink, Option<RunningFront>)> {
    let Access::Secured(secured) = access else {
        return Ok((SmtpSink::start(loopback(ports.smtp)).await?, None));
    };
    let sink = SmtpSink::start(loopback(0)).await?;
    let password = secured.mail_password().to_owned();
    let login = Login { mechanism: "PLAIN", user: MAIL_USER.to_owned(), password };
    let front = Front { implicit: false, login: Some(login), acceptor: secured.acceptor()? };
    let front = front.start(loopback(ports.smtp), sink.address()).await?;
    Ok((sink, Some(front)))
}

fn loopback(port: u16) -> SocketAddr {
    ([127, 0, 0, 1], port).into()
}
