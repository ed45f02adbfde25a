//! Whether Kafka can be reached, and why not. Most faults of a login or a certificate never fail a
//! call: a client reports them to its context and keeps trying. A client of its own collects these
//! reports for the whole process, because all clients have the same settings.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use anyhow::bail;
use rdkafka::ClientContext;
use rdkafka::consumer::{BaseConsumer, Consumer, ConsumerContext};
use rdkafka::error::{KafkaError, RDKafkaErrorCode};
use tokio_util::sync::CancellationToken;

use super::{KafkaConfig, create_with};
use crate::platform::health::Health;
use crate::platform::tls::{self, HandshakeFault};

/// The component in `/status`.
const COMPONENT: &str = "kafka";
const CHECK_INTERVAL: Duration = Duration::from_secs(2);
const ANSWER_TIMEOUT: Duration = Duration::from_secs(2);
/// How long to collect reports.
const REPORT_TIME: Duration = Duration::from_millis(100);
const FILE_INTERVAL: Duration = Duration::from_secs(10);
/// Replicas see a changed file at the same time. Each waits for a random part of this time before
/// it ends, so that they do not all restart at once.
const RESTART_SPREAD: Duration = Duration::from_secs(20);

/// The last report that says why Kafka cannot be reached. It counts until Kafka is reached, because
/// librdkafka does not repeat each report.
#[derive(Clone, Default)]
struct Reports(Arc<Mutex<Option<RDKafkaErrorCode>>>);

impl Reports {
    fn last(&self) -> Option<RDKafkaErrorCode> {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn clear(&self) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = None;
    }
}

impl ClientContext for Reports {
    fn error(&self, error: KafkaError, _reason: &str) {
        // All other errors follow from these, or say only that a connection failed.
        use RDKafkaErrorCode::{Authentication, Resolve, SSL, SaslAuthenticationFailed};
        let code = error.rdkafka_error_code();
        if matches!(code, Some(Authentication | SaslAuthenticationFailed | SSL | Resolve)) {
            *self.0.lock().unwrap_or_else(PoisonError::into_inner) = code;
        }
    }
}

/// The client reads nothing and joins no group.
impl ConsumerContext for Reports {}

/// Reports that it is not known yet whether Kafka can be reached.
pub(crate) fn report_unknown_connection(health: &Health) {
    health.report(COMPONENT, "a broker to answer");
}

/// Reports to `/status` whether Kafka can be reached, and why not. Runs on a thread of its own,
/// because the calls block.
pub(crate) fn watch_connection(kafka: &KafkaConfig, health: &Health, stop: &CancellationToken) -> anyhow::Result<()> {
    let reports = Reports::default();
    // Without a group id, because a service may have no group.
    let client: BaseConsumer<Reports> = create_with(&kafka.client(), reports.clone())?;
    let mut reason = String::new();
    while !stop.is_cancelled() {
        let is_reached = client.client().fetch_cluster_id(ANSWER_TIMEOUT).is_some();
        // Hands the client's reports to its context, and its log lines to the log. Also while Kafka
        // is reached: the client would keep them otherwise.
        let until = Instant::now() + REPORT_TIME;
        while Instant::now() < until {
            let _ = client.poll(REPORT_TIME);
        }
        if is_reached {
            reports.clear();
            health.resolved(COMPONENT);
            if !std::mem::take(&mut reason).is_empty() {
                tracing::info!("Kafka can be reached again");
            }
        } else if !stop.is_cancelled() {
            let found = why(kafka, reports.last());
            if found != reason {
                tracing::warn!(reason = found, "cannot reach Kafka; will retry");
                reason = found;
            }
            health.report(COMPONENT, &reason);
        }
        wait(stop, CHECK_INTERVAL);
    }
    Ok(())
}

fn why(kafka: &KafkaConfig, code: Option<RDKafkaErrorCode>) -> String {
    match code {
        Some(RDKafkaErrorCode::Authentication | RDKafkaErrorCode::SaslAuthenticationFailed) => {
            "Kafka to accept the login: check KAFKA_USER, KAFKA_PASSWORD and KAFKA_SASL_MECHANISM".to_owned()
        }
        Some(RDKafkaErrorCode::Resolve) => "the host names in KAFKA_BROKERS to be resolved".to_owned(),
        // A broker that refuses our certificate only closes the connection.
        code => match certificate_fault(kafka) {
            Some(HandshakeFault::Refused(cause)) => {
                format!("a broker to accept our certificate: {cause}; check KAFKA_CERTIFICATE_FILE and KAFKA_KEY_FILE")
            }
            Some(fault) => {
                format!("a broker with a valid certificate: {}; check KAFKA_CA_FILE and KAFKA_BROKERS", fault.text())
            }
            None if code == Some(RDKafkaErrorCode::SSL) => {
                "a broker with a valid certificate: the TLS handshake fails; check KAFKA_CA_FILE and KAFKA_BROKERS"
                    .to_owned()
            }
            None => {
                "a broker to answer: check KAFKA_BROKERS, and whether KAFKA_SECURITY_PROTOCOL fits the port".to_owned()
            }
        },
    }
}

/// What is wrong with the certificate of the first broker, or with ours. librdkafka reports every
/// fault with the same text, so this makes a handshake of its own.
fn certificate_fault(kafka: &KafkaConfig) -> Option<HandshakeFault> {
    if !kafka.security.has_tls() {
        return None;
    }
    let client = match kafka.security.tls_client() {
        Ok(client) => client,
        Err(error) => return Some(HandshakeFault::Other(format!("{error:#}"))),
    };
    let broker = kafka.kafka_brokers.split(',').next()?.trim();
    let (host, port) = broker.rsplit_once(':')?;
    let port = port.parse().ok()?;
    let handshake = tls::handshake_fault(client, host.trim_matches(['[', ']']), port);
    tokio::runtime::Handle::current().block_on(handshake)
}

/// Ends the process with an error when a file with a certificate, a key or the password changes:
/// librdkafka reads them only when a client is created. The supervisor restarts the process.
pub(crate) async fn watch_files(kafka: KafkaConfig) -> anyhow::Result<()> {
    let named = kafka.security.files().map(|(setting, file)| (setting, file.to_path_buf()));
    let password = kafka.security.password_file().map(|file| ("KAFKA_PASSWORD_FILE", file));
    let files: BTreeMap<&str, PathBuf> = named.chain(password).collect();
    let at_start = contents(&files).await;
    loop {
        tokio::time::sleep(FILE_INTERVAL).await;
        let now = contents(&files).await;
        // A file that cannot be read is being replaced.
        let changed = now.iter().find(|(setting, now)| now.is_some() && at_start.get(*setting) != Some(now));
        if let Some((setting, _)) = changed {
            tracing::warn!(
                setting,
                "the file was changed; this process ends, so that its next start uses the new content"
            );
            tokio::time::sleep(RESTART_SPREAD.mul_f64(fastrand::f64())).await;
            bail!("the file that {setting} names was changed: restart the process, so that it uses the new content");
        }
    }
}

async fn contents<'a>(files: &BTreeMap<&'a str, PathBuf>) -> BTreeMap<&'a str, Option<Vec<u8>>> {
    let mut contents = BTreeMap::new();
    for (setting, file) in files {
        contents.insert(*setting, tokio::fs::read(file).await.ok());
    }
    contents
}

fn wait(stop: &CancellationToken, time: Duration) {
    let sleep = stop.run_until_cancelled(tokio::time::sleep(time));
    tokio::runtime::Handle::current().block_on(sleep);
}
