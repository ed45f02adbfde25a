//! The connection to Valkey. All commands share one connection. Any error of a command replaces it:
//! a broken connection, a half-open one whose answer does not come in time, and a server that does
//! not accept the command because it became a replica (READONLY, MASTERDOWN) or loads its data
//! (LOADING). The address may lead to another server by now.

use std::path::PathBuf;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use anyhow::{Context, ensure};
use futures::FutureExt;
use futures::future::{BoxFuture, Shared};
use redis::aio::MultiplexedConnection;
use redis::{AsyncConnectionConfig, Client, ClientTlsConfig, ErrorKind, RedisResult, TlsCertificates};
use shared::platform::secret::{Secret, SecretSetting};

/// Time for one answer. The script of a batch takes a few milliseconds.
pub const RESPONSE_TIMEOUT: Duration = Duration::from_secs(2);
const CONNECT_TIMEOUT: Duration = Duration::from_secs(1);

/// A server process and a connection to it.
#[derive(Clone)]
pub struct Server {
    pub connection: MultiplexedConnection,
    pub identity: Identity,
    pub evicts: bool,
}

/// What completeness marks name. Both parts are made by the server.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Identity {
    /// New at each start of the process. A server that comes back from a snapshot has another one
    /// than before, and a replica has another one than its master.
    run_id: String,
    /// The replication id: new when a replica becomes a master. A server that was a replica in
    /// between has the data of its former master, and another replication id than before. It also
    /// changes when a master gets its first replica.
    replication_id: String,
}

impl Identity {
    pub fn mark(&self) -> String {
        format!("{} {}", self.run_id, self.replication_id)
    }
}

/// A connection attempt, in progress or done. All commands wait for the same one.
type Attempt = Shared<BoxFuture<'static, RedisResult<Server>>>;

pub struct Valkey {
    client: Client,
    current: Mutex<Attempt>,
}

/// How to reach Valkey.
#[derive(clap::Args, Clone)]
pub struct ValkeyConfig {
    #[command(flatten)]
    valkey_url: Secret<ValkeyUrl>,
    /// A file with the certificates of the authorities that may sign the server's certificate, in
    /// PEM format. Only with rediss://. Default: the authorities of the operating system.
    #[arg(long, env)]
    valkey_ca_file: Option<PathBuf>,
    /// A file with the certificate of this service, in PEM format, if the server asks for one.
    #[arg(long, env, requires = "valkey_key_file")]
    valkey_certificate_file: Option<PathBuf>,
    /// A file with the private key of this certificate, in PEM format.
    #[arg(long, env, requires = "valkey_certificate_file")]
    valkey_key_file: Option<PathBuf>,
}

#[derive(Clone)]
struct ValkeyUrl;

impl SecretSetting for ValkeyUrl {
    const NAME: &'static str = "VALKEY_URL";
    const HELP: &'static str = "Valkey, or another server with the protocol of Redis: redis://user:password@host:port, or \
                                rediss:// with TLS. It must not evict keys: maxmemory-policy noeviction.";
    const DEFAULT: Option<&'static str> = Some("redis://localhost:6379");
}

impl ValkeyConfig {
    /// # Errors
    /// The URL is malformed, a file cannot be read, or there are files and no TLS.
    pub fn client(&self) -> anyhow::Result<Client> {
        let url = self.valkey_url.expose();
        let read = |setting: &str, file: &Option<PathBuf>| {
            let read = |file: &PathBuf| {
                std::fs::read(file).with_context(|| format!("{setting}: cannot read {}", file.display()))
            };
            file.as_ref().map(read).transpose()
        };
        let root_cert = read("VALKEY_CA_FILE", &self.valkey_ca_file)?;
        let certificate = read("VALKEY_CERTIFICATE_FILE", &self.valkey_certificate_file)?;
        let key = read("VALKEY_KEY_FILE", &self.valkey_key_file)?;
        if !url.starts_with("rediss://") {
            let files = root_cert.is_some() || certificate.is_some();
            ensure!(!files, "VALKEY_CA_FILE and VALKEY_CERTIFICATE_FILE need a VALKEY_URL with rediss://");
            return Client::open(url).context(MALFORMED);
        }
        let client_tls =
            certificate.zip(key).map(|(client_cert, client_key)| ClientTlsConfig { client_cert, client_key });
        Client::build_with_tls(url, TlsCertificates { client_tls, root_cert }).context(MALFORMED)
    }
}

const MALFORMED: &str = "VALKEY_URL is not redis://user:password@host:port, or a certificate is not in PEM format";

impl Valkey {
    /// Connects on first use.
    pub fn new(client: Client) -> Self {
        let current = Mutex::new(attempt(&client));
        Self { client, current }
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
    about.atomic().cmd("INFO").arg("server").cmd("INFO").arg("replication").cmd("INFO").arg("memory");
    let (server, replication, memory): (String, String, String) = about.query_async(&mut connection).await?;
    let run_id = field(&server, "run_id")?.to_owned();
    let replication_id = replication_id_of_master(&replication)?.to_owned();
    Ok(Server { connection, identity: Identity { run_id, replication_id }, evicts: evicts(&memory)? })
}

impl Server {
    /// Checks the answer to INFO replication. A replica answers reads without an error, however old
    /// its data is. A server that was a replica since the connection was made has replaced its
    /// data.
    pub fn require_unchanged_master(&self, replication: &str) -> RedisResult<()> {
        if replication_id_of_master(replication)? == self.identity.replication_id {
            return Ok(());
        }
        Err((ErrorKind::Client, "the replication id of the server has changed; connecting again").into())
    }

    /// Checks the answer to INFO memory.
    pub fn require_unchanged_policy(&self, memory: &str) -> RedisResult<()> {
        if evicts(memory)? == self.evicts {
            return Ok(());
        }
        Err((ErrorKind::Client, "maxmemory-policy of the server has changed; connecting again").into())
    }

    /// # Errors
    /// The server evicts keys.
    pub fn require_no_eviction(&self) -> RedisResult<()> {
        if self.evicts {
            Err((ErrorKind::Client, "the server evicts keys: set maxmemory-policy noeviction").into())
        } else {
            Ok(())
        }
    }
}

fn replication_id_of_master(replication: &str) -> RedisResult<&str> {
    if field(replication, "role")? != "master" {
        return Err((ErrorKind::Client, "the server is a replica").into());
    }
    field(replication, "master_replid")
}

/// Whether the server deletes keys without an expiry when its memory is full. The policies
/// `volatile-…` delete only keys with one, and the view has none.
fn evicts(memory: &str) -> RedisResult<bool> {
    Ok(field(memory, "maxmemory_policy")?.starts_with("allkeys-"))
}

/// A field of an answer to INFO.
fn field<'a>(info: &'a str, name: &'static str) -> RedisResult<&'a str> {
    let value = info.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'));
    value.ok_or_else(|| (ErrorKind::Client, "the answer to INFO lacks a field", name.to_owned()).into())
}
