//! The connection to Valkey. The client makes a broken one anew by itself; one that has fallen silent (half open, as after a
//! firewall's restart) it would keep for as long as the system does, a quarter of an hour. So an answer that did not come in
//! time costs the connection.

use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use redis::aio::{ConnectionManager, ConnectionManagerConfig};
use redis::{Client, RedisError, RedisResult};

/// For one answer; a batch's script takes a few milliseconds.
pub const RESPONSE_TIMEOUT: Duration = Duration::from_secs(2);
const CONNECT_TIMEOUT: Duration = Duration::from_secs(1);
/// Consumers and callers try again themselves; the client's own six retries would keep each of them waiting for some ten seconds.
const CONNECT_RETRIES: usize = 1;

pub struct Valkey {
    client: Client,
    current: Mutex<ConnectionManager>,
}

impl Valkey {
    /// Connects when first used.
    ///
    /// # Errors
    /// The URL is malformed.
    pub fn new(url: &str) -> RedisResult<Self> {
        let client = Client::open(url)?;
        let current = Mutex::new(connection(&client)?);
        Ok(Self { client, current })
    }

    /// Asks over the connection that all share.
    ///
    /// # Errors
    /// Valkey's own, or no answer in time: the question may have taken effect.
    pub async fn ask<T>(&self, question: impl AsyncFnOnce(ConnectionManager) -> RedisResult<T>) -> RedisResult<T> {
        let connection_now = self.current.lock().unwrap_or_else(PoisonError::into_inner).clone();
        let answer = question(connection_now).await;
        if answer.as_ref().is_err_and(RedisError::is_timeout) {
            // Whoever asks over the old one is told by its own time-out.
            *self.current.lock().unwrap_or_else(PoisonError::into_inner) = connection(&self.client)?;
        }
        answer
    }
}

fn connection(client: &Client) -> RedisResult<ConnectionManager> {
    let config = ConnectionManagerConfig::new()
        .set_connection_timeout(Some(CONNECT_TIMEOUT))
        .set_number_of_retries(CONNECT_RETRIES)
        .set_response_timeout(Some(RESPONSE_TIMEOUT));
    ConnectionManager::new_lazy_with_config(client.clone(), config)
}
