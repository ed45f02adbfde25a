//! The export of spans to the collector. Spans are lost while the collector does not accept them:
//! each reason is logged once, and every lost batch is counted.

use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use anyhow::{Context as _, ensure};
use axum::http::{HeaderMap, HeaderName, HeaderValue};
use clap::Args;
use opentelemetry::Context;
use opentelemetry_otlp::tonic_types::metadata::MetadataMap;
use opentelemetry_otlp::tonic_types::transport::{Certificate, ClientTlsConfig, Identity};
use opentelemetry_otlp::{SpanExporter, WithExportConfig, WithTonicConfig};
use opentelemetry_sdk::Resource;
use opentelemetry_sdk::error::OTelSdkResult;
use opentelemetry_sdk::trace::{BatchSpanProcessor, Span, SpanData, SpanProcessor};
use percent_encoding::percent_decode_str;
use prometheus_client::metrics::counter::Counter;

use super::metrics::Metrics;
use super::secret::{OptionalSecret, SecretSetting};
use super::tls;

/// Time for a TLS handshake with the collector.
const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(5);

/// Number of reasons that are logged until the collector accepts traces again. A reason may contain
/// text that changes with every attempt.
const MAX_LOGGED_REASONS: usize = 8;

/// The collector for traces. The names are those of the OpenTelemetry specification.
#[derive(Args, Clone, Debug)]
pub struct CollectorConfig {
    /// The collector for traces, by OTLP over gRPC, for example https://collector.example.com:4317.
    /// With https:// its certificate must be valid for the host name. Without a collector traces
    /// are dropped.
    #[arg(long, env, hide_env_values = true)]
    otel_exporter_otlp_endpoint: Option<String>,
    #[command(flatten)]
    headers: OptionalSecret<Headers>,
    /// A file with the certificates of the authorities that may sign the collector's certificate,
    /// in PEM format. Without it, the well-known public authorities may.
    #[arg(long, env)]
    otel_exporter_otlp_certificate: Option<PathBuf>,
    /// A file with the certificate of this service, in PEM format, if the collector asks for one.
    #[arg(long, env)]
    otel_exporter_otlp_client_certificate: Option<PathBuf>,
    /// A file with the private key of this certificate, in PEM format.
    #[arg(long, env)]
    otel_exporter_otlp_client_key: Option<PathBuf>,
}

#[derive(Clone)]
struct Headers;

impl SecretSetting for Headers {
    const NAME: &'static str = "OTEL_EXPORTER_OTLP_HEADERS";
    const HELP: &'static str =
        "Headers for the collector, for example authorization=Bearer%20token,x-tenant=a. Values are percent-encoded.";
}

impl CollectorConfig {
    /// Exports spans in batches to the collector, if there is one.
    ///
    /// # Errors
    /// The endpoint is not a URL, a header is malformed, a file cannot be used, or two settings
    /// contradict each other.
    pub(super) fn processor(&self, metrics: &Metrics) -> anyhow::Result<Option<CountedSpans>> {
        // Without an endpoint nothing is exported, whatever else is set: an empty variable switches the
        // export off.
        let Some(endpoint) = &self.otel_exporter_otlp_endpoint else { return Ok(None) };
        let tls = self.tls()?;
        let mut exporter = SpanExporter::builder().with_tonic().with_endpoint(endpoint);
        if let Some(headers) = self.headers.get() {
            exporter = exporter.with_metadata(MetadataMap::from_headers(parsed(headers.expose())?));
        }
        if let Some(tls) = tls {
            exporter = exporter.with_tls_config(tls);
        }
        let exporter =
            exporter.build().context("OTEL_EXPORTER_OTLP_ENDPOINT is not a URL such as http://localhost:4317")?;
        Ok(Some(counted(exporter, metrics)))
    }

    /// Whether there is a collector.
    pub(super) fn is_given(&self) -> bool {
        self.otel_exporter_otlp_endpoint.is_some()
    }

    /// Whether headers are sent without encryption.
    pub(super) fn reveals_headers(&self) -> bool {
        self.headers.get().is_some() && self.otel_exporter_otlp_endpoint.is_some() && !self.has_tls()
    }

    fn has_tls(&self) -> bool {
        self.otel_exporter_otlp_endpoint.as_ref().is_some_and(|endpoint| endpoint.starts_with("https://"))
    }

    /// `None`: without TLS.
    fn tls(&self) -> anyhow::Result<Option<ClientTlsConfig>> {
        let authority = self.otel_exporter_otlp_certificate.as_deref();
        let certificate = self.otel_exporter_otlp_client_certificate.as_deref();
        let key = self.otel_exporter_otlp_client_key.as_deref();
        let [named_authority, named_certificate, named_key] = [
            "OTEL_EXPORTER_OTLP_CERTIFICATE",
            "OTEL_EXPORTER_OTLP_CLIENT_CERTIFICATE",
            "OTEL_EXPORTER_OTLP_CLIENT_KEY",
        ];
        if !self.has_tls() {
            ensure!(
                authority.or(certificate).or(key).is_none(),
                "{named_authority}, {named_certificate} and {named_key} need an OTEL_EXPORTER_OTLP_ENDPOINT with https://"
            );
            return Ok(None);
        }
        ensure!(
            certificate.is_some() == key.is_some(),
            "{named_certificate} and {named_key} need each other: set both or none"
        );
        let identity = certificate.zip(key).map(|(one, other)| ((named_certificate, one), (named_key, other)));
        tls::client_with(named_authority, authority, identity)?;
        let tls = ClientTlsConfig::new().timeout(HANDSHAKE_TIMEOUT);
        let tls = match authority {
            Some(file) => tls.ca_certificate(Certificate::from_pem(read(named_authority, file)?)),
            None => tls.with_webpki_roots(),
        };
        let Some(((_, certificate), (_, key))) = identity else { return Ok(Some(tls)) };
        let identity = Identity::from_pem(read(named_certificate, certificate)?, read(named_key, key)?);
        Ok(Some(tls.identity(identity)))
    }
}

fn read(setting: &str, file: &Path) -> anyhow::Result<Vec<u8>> {
    std::fs::read(file).with_context(|| format!("cannot read {setting} {}", file.display()))
}

/// Parses `name=value,name=value` with percent-encoded values, as the specification defines. The
/// exporter would silently drop a malformed header.
///
/// # Errors
/// A header is malformed. The message does not show it.
fn parsed(text: &str) -> anyhow::Result<HeaderMap> {
    let mut headers = HeaderMap::new();
    for (number, header) in (1..).zip(text.split(',')) {
        let parsed = header.split_once('=').and_then(|(name, value)| {
            let value = percent_decode_str(value.trim()).decode_utf8().ok()?;
            Some((name.trim().parse::<HeaderName>().ok()?, HeaderValue::from_str(&value).ok()?))
        });
        let (name, value) = parsed.with_context(|| {
            format!("OTEL_EXPORTER_OTLP_HEADERS: header {number} is not name=value with a percent-encoded value")
        })?;
        headers.append(name, value);
    }
    Ok(headers)
}

fn counted(exporter: SpanExporter, metrics: &Metrics) -> CountedSpans {
    let exporter = ReportedExporter {
        exporter,
        exported: metrics.trace_spans_exported.clone(),
        failed: metrics.trace_exports_failed.clone(),
        logged: Mutex::default(),
    };
    let batches = BatchSpanProcessor::builder(exporter).build();
    CountedSpans { batches, ended: metrics.trace_spans_ended.clone() }
}

/// Counts the spans that should be exported. When its queue is full, the batch processor drops
/// spans and does not report that to the exporter.
#[derive(Debug)]
pub(super) struct CountedSpans {
    batches: BatchSpanProcessor,
    ended: Counter,
}

impl SpanProcessor for CountedSpans {
    fn on_start(&self, span: &mut Span, context: &Context) {
        self.batches.on_start(span, context);
    }

    fn on_end(&self, span: SpanData) {
        self.ended.inc();
        self.batches.on_end(span);
    }

    fn force_flush(&self) -> OTelSdkResult {
        self.batches.force_flush()
    }

    fn shutdown_with_timeout(&self, timeout: Duration) -> OTelSdkResult {
        self.batches.shutdown_with_timeout(timeout)
    }

    fn set_resource(&mut self, resource: &Resource) {
        self.batches.set_resource(resource);
    }
}

#[derive(Debug)]
struct ReportedExporter {
    exporter: SpanExporter,
    exported: Counter,
    failed: Counter,
    logged: Mutex<LoggedReasons>,
}

/// Why batches were lost since the collector last accepted one: what was logged. One fault can have
/// several reasons. A collector that refuses the client's certificate says so in an alert, but the
/// client may notice first that the connection was closed.
#[derive(Debug, Default)]
struct LoggedReasons(Vec<String>);

impl LoggedReasons {
    /// Whether this reason is to be logged: it has not been logged yet, and there are few.
    fn add(&mut self, reason: &str) -> bool {
        let is_new = self.0.len() < MAX_LOGGED_REASONS && !self.0.iter().any(|logged| logged == reason);
        if is_new {
            self.0.push(reason.to_owned());
        }
        is_new
    }

    /// Forgets all reasons, and returns whether there were any.
    fn clear(&mut self) -> bool {
        !std::mem::take(&mut self.0).is_empty()
    }
}

impl ReportedExporter {
    fn report_failure(&self, reason: &str) {
        if self.logged.lock().unwrap_or_else(PoisonError::into_inner).add(reason) {
            tracing::warn!(error = reason, "the collector does not accept traces; they are lost until it does");
        }
    }

    fn report_success(&self) {
        if self.logged.lock().unwrap_or_else(PoisonError::into_inner).clear() {
            tracing::info!("the collector accepts traces again");
        }
    }
}

impl opentelemetry_sdk::trace::SpanExporter for ReportedExporter {
    async fn export(&self, batch: Vec<SpanData>) -> OTelSdkResult {
        let spans = batch.len() as u64;
        let result = self.exporter.export(batch).await;
        if let Err(error) = &result {
            self.failed.inc();
            self.report_failure(&error.to_string());
        } else {
            self.exported.inc_by(spans);
            self.report_success();
        }
        result
    }

    fn shutdown_with_timeout(&self, timeout: Duration) -> OTelSdkResult {
        self.exporter.shutdown_with_timeout(timeout)
    }

    fn force_flush(&self) -> OTelSdkResult {
        self.exporter.force_flush()
    }

    fn set_resource(&mut self, resource: &Resource) {
        self.exporter.set_resource(resource);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_reason_is_logged_once_until_the_collector_accepts_a_batch() {
        let mut logged = LoggedReasons::default();
        assert_eq!(
            ["broken pipe", "CertificateRequired", "broken pipe"].map(|reason| logged.add(reason)),
            [true, true, false]
        );
        assert!(logged.clear());
        assert!(!logged.clear());
        assert!(logged.add("broken pipe"));
    }

    #[test]
    fn reasons_that_change_with_every_attempt_do_not_fill_the_log() {
        let mut logged = LoggedReasons::default();
        let count = (0..1000).filter(|attempt| logged.add(&format!("attempt {attempt}"))).count();
        assert_eq!(count, MAX_LOGGED_REASONS);
    }

    #[test]
    fn headers_are_parsed_and_an_error_does_not_show_them() {
        let headers = parsed("authorization=Bearer%20a=b%2Cc, x-tenant=one").unwrap();
        assert_eq!(headers["authorization"], "Bearer a=b,c");
        assert_eq!(headers["x-tenant"], "one");
        for malformed in ["hunter2", "a=1,hunter2", "a=hunter2,", "a b=hunter2", "a=hunter2%0A", "a=hunter2%FF"] {
            let error = parsed(malformed).unwrap_err().to_string();
            assert!(error.contains("name=value") && !error.contains("hunter2"), "{malformed}: {error}");
        }
    }
}
