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
use redis::{
    AsyncConnectionConfig, Client, ClientTlsConfig, ErrorKind, RedisError, RedisResult, TlsCertificates, Value,
};
use shared::platform::secret::{Secret, SecretSetting};

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
