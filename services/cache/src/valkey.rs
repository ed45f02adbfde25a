//! The connection to Valkey. All commands share one connection. Any error of a command replaces it:
//! a broken connection, a half-open one whose answer does not come in time, and a server that does
//! not accept the command because it became a replica (READONLY, MASTERDOWN) or loads its data
//! (LOADING). The address may lead to another server by now.

use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use futures::FutureExt;
use futures::future::{BoxFuture, Shared};
use redis::aio::MultiplexedConnection;
use redis::{AsyncConnectionConfig, Client, ErrorKind, RedisError, RedisResult, Value};

/// Time for one answer. The script of a batch takes a few milliseconds.
pub const RESPONSE_TIMEOUT: Duration = Duration::from_secs(2);
const CONNECT_TIMEOUT: Duration = Duration::from_secs(1);

/// A server process and a connection to it.
#[derive(Clone)]
pub struct Server {
    pub connection: MultiplexedConnection,
    /// Made by the server when it starts. A server that comes back from a snapshot has another one
    /// than before, and a replica has another one than its master.
    pub run_id: String,
}

/// A connection attempt, in progress or done. All commands wait for the same one.
type Attempt = Shared<BoxFuture<'static, RedisResult<Server>>>;

pub struct Valkey {
    client: Client,
    current: Mutex<Attempt>,
}

impl Valkey {
    /// Connects on first use.
    ///
    /// # Errors
    /// The URL is malformed.
    pub fn new(url: &str) -> RedisResult<Self> {
        let client = Client::open(url)?;
        let current = Mutex::new(attempt(&client));
        Ok(Self { client, current })
    }

    /// Sends a command over the shared connection.
    ///
    /// # Errors
    /// Valkey's error, or no answer in time; then the command may have taken effect.
    pub async fn request<T>(&self, command: impl AsyncFnOnce(Server) -> RedisResult<T>) -> RedisResult<T> {
        let used = self.current.lock().unwrap_or_else(PoisonError::into_inner).clone();
        let answer = match used.clone().await {
            Ok(server) => command(server).await,
            Err(error) => Err(error),
        };
        if answer.is_err() {
            // Of several commands that failed on one connection the first replaces it. The others
            // on it end by their own time-outs.
            let mut current = self.current.lock().unwrap_or_else(PoisonError::into_inner);
            if current.ptr_eq(&used) {
                *current = attempt(&self.client);
            }
        }
        answer
    }
}

/// Begins when the first command waits for it.
fn attempt(client: &Client) -> Attempt {
    connect(client.clone()).boxed().shared()
}

async fn connect(client: Client) -> RedisResult<Server> {
    let config = AsyncConnectionConfig::new()
        .set_connection_timeout(Some(CONNECT_TIMEOUT))
        .set_response_timeout(Some(RESPONSE_TIMEOUT));
    let mut connection = client.get_multiplexed_async_connection_with_config(&config).await?;
    let mut about = redis::pipe();
    about.cmd("INFO").arg("server").cmd("ROLE");
    let (info, role): (String, Value) = about.query_async(&mut connection).await?;
    require_master(&role)?;
    let run_id = info.lines().find_map(|line| line.strip_prefix("run_id:"));
    let run_id = run_id.ok_or(RedisError::from((ErrorKind::Client, "INFO server has no run_id")))?.to_owned();
    Ok(Server { connection, run_id })
}

/// Checks the answer to ROLE. A replica answers reads without an error, however old its data is.
pub fn require_master(role: &Value) -> RedisResult<()> {
    match role {
        Value::Array(fields) if matches!(fields.first(), Some(Value::BulkString(role)) if role == b"master") => Ok(()),
        _ => Err((ErrorKind::Client, "the server is a replica").into()),
    }
}
