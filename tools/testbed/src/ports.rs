//! Free ports, taken ports, and asking a port whether somebody answers.

use std::net::{Ipv4Addr, TcpListener};
use std::sync::atomic::{AtomicU16, Ordering};
use std::time::Duration;

use anyhow::{Context, Result, anyhow};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

/// Below the ports that systems give to outgoing connections (32768 on Linux, 49152 elsewhere): while a broker is down, a client
/// that keeps dialling its port can otherwise be given that very port and end up connected to itself.
const FIRST: u16 = 20_000;
const COUNT: u16 = 12_000;
const ANSWER_LIMIT: Duration = Duration::from_secs(1);

/// A port on loopback that nobody listens on now and that this process has not handed out lately.
pub fn free() -> u16 {
    static NEXT: AtomicU16 = AtomicU16::new(0);
    // Processes that look at the same time begin at different places.
    let start = (std::process::id() * 97 % u32::from(COUNT)) as u16;
    (0..COUNT)
        .map(|_| FIRST + (start + NEXT.fetch_add(1, Ordering::Relaxed) % COUNT) % COUNT)
        .find(|port| is_free(*port))
        .expect("one of 12,000 ports is free")
}

/// Says in one sentence what is wrong when a port is taken.
pub fn require_free(port: u16, purpose: &str) -> Result<()> {
    if is_free(port) {
        return Ok(());
    }
    Err(anyhow!(
        "port {port}, needed for {purpose}, is in use: stop the program that listens there (perhaps another `cargo xtask up` or \
         `docker compose up`) and run this again"
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
    tokio::time::timeout(ANSWER_LIMIT, exchange).await.context("no answer in time")?
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_taken_port_is_named() {
        let port = free();
        let _listener = TcpListener::bind((Ipv4Addr::LOCALHOST, port)).unwrap();
        let error = require_free(port, "Kafka").unwrap_err().to_string();
        assert!(error.starts_with(&format!("port {port}, needed for Kafka, is in use")));
    }

    #[test]
    fn ports_differ() {
        assert_ne!(free(), free());
    }
}
