//! The connection to Valkey. The client replaces a broken connection by itself. It would keep a
//! half-open one (for example after the restart of a firewall) for as long as the operating system
//! does, which is a quarter of an hour. So this module replaces the connection whenever an answer
//! does not arrive in time.

use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use redis::aio::{ConnectionManager, ConnectionManagerConfig};
use redis::{Client, RedisError, RedisResult};

/// Time for one answer. The script of a batch takes a few milliseconds.
pub const RESPONSE_TIMEOUT: Duration = Duration::from_secs(2);
const CONNECT_TIMEOUT: Duration = Duration::from_secs(1);
/// Consumers and callers retry by themselves. With the client's default of six retries each of them
/// would wait about ten seconds.
const CONNECT_RETRIES: usize = 1;

pub struct Valkey {
    client: Client,
    current: Mutex<ConnectionManager>,
}

impl Valkey {
    /// Connects on first use.
    ///
    /// # Errors
    /// The URL is malformed.
    pub fn new(url: &str) -> RedisResult<Self> {
        let client = Client::open(url)?;
        let current = Mutex::new(connection(&client)?);
        Ok(Self { client, current })
    }

    /// Sends a command over the shared connection.
    ///
    /// # Errors
    /// Valkey's error, or no answer in time; then the command may have taken effect.
    pub async fn request<T>(&self, command: impl AsyncFnOnce(ConnectionManager) -> RedisResult<T>) -> RedisResult<T> {
        let current = self.current.lock().unwrap_or_else(PoisonError::into_inner).clone();
        let answer = command(current).await;
        if answer.as_ref().is_err_and(RedisError::is_timeout) {
            // Other commands on the old connection end by their own time-outs.
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
