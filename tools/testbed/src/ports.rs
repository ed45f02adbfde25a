//! Free ports, ports in use, and requests to a port.

use std::net::{Ipv4Addr, TcpListener};
use std::sync::atomic::{AtomicU16, Ordering};
use std::time::Duration;

use anyhow::{Context, Result, anyhow};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

/// The range is below the ports that systems use for outgoing connections (from 32768 on Linux,
/// from 49152 elsewhere). Otherwise a client that keeps dialling the port of a broker that is down
/// can get that same port as its own and connect to itself.
const FIRST: u16 = 20_000;
const COUNT: u16 = 12_000;
/// How long one request may take.
const REQUEST_LIMIT: Duration = Duration::from_secs(1);

/// The ports of a stack.
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
        Self { kafka: free(), further_brokers: None, postgres: free(), redis: free(), smtp: free(), mails: free() }
    }

    pub fn free_three_brokers() -> Self {
        Self { further_brokers: Some([free(), free()]), ..Self::free() }
    }

    /// Fails when another program listens on one of the ports.
    pub fn require_free(&self) -> Result<()> {
        for port in self.brokers() {
            require_free(port, "Kafka")?;
        }
        require_free(self.postgres, "Postgres")?;
        require_free(self.redis, "Redis")?;
        require_free(self.smtp, "the SMTP sink")?;
        require_free(self.mails, "the SMTP sink's list of mails")
    }

    pub fn brokers(&self) -> Vec<u16> {
        [self.kafka].into_iter().chain(self.further_brokers.into_iter().flatten()).collect()
    }
}

/// A port on loopback that no process listens on and that this process has not returned recently.
pub fn free() -> u16 {
    static NEXT: AtomicU16 = AtomicU16::new(0);
    // Processes that search at the same time start at different ports.
    let start = (std::process::id() * 97 % u32::from(COUNT)) as u16;
    (0..COUNT)
        .map(|_| FIRST + (start + NEXT.fetch_add(1, Ordering::Relaxed) % COUNT) % COUNT)
        .find(|port| is_free(*port))
        .expect("one of 12,000 ports is free")
}

/// Fails when another program listens on the port. `purpose` completes "needed for …".
pub fn require_free(port: u16, purpose: &str) -> Result<()> {
    if is_free(port) {
        return Ok(());
    }
    Err(anyhow!(
        "port {port}, needed for {purpose}, is in use: stop the program that listens on it (perhaps another \
         `cargo xtask up` or `docker compose up`) and run this again"
    ))
}

fn is_free(port: u16) -> bool {
    TcpListener::bind((Ipv4Addr::LOCALHOST, port)).is_ok()
}

/// Sends `request` to a port on loopback and reads `length` bytes of the answer.
pub async fn ask(port: u16, request: &[u8], length: usize) -> Result<Vec<u8>> {
    let exchange = async {
        let mut stream = TcpStream::connect((Ipv4Addr::LOCALHOST, port)).await?;
        stream.write_all(request).await?;
        let mut answer = vec![0; length];
        stream.read_exact(&mut answer).await?;
        anyhow::Ok(answer)
    };
    tokio::time::timeout(REQUEST_LIMIT, exchange).await.context("no answer in time")?
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_error_names_the_port_that_is_in_use() {
        let port = free();
        let _listener = TcpListener::bind((Ipv4Addr::LOCALHOST, port)).unwrap();
        let error = require_free(port, "Kafka").unwrap_err().to_string();
        assert!(error.starts_with(&format!("port {port}, needed for Kafka, is in use")));
    }

    #[test]
    fn two_free_ports_differ() {
        assert_ne!(free(), free());
    }
}
