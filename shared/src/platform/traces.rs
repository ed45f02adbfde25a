//! The export of spans to the collector. Spans are lost while the collector does not accept them:
//! that is logged once, and counted.

use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::time::Duration;

use anyhow::Context as _;
use opentelemetry::Context;
use opentelemetry_otlp::{SpanExporter, WithExportConfig};
use opentelemetry_sdk::Resource;
use opentelemetry_sdk::error::OTelSdkResult;
use opentelemetry_sdk::trace::{BatchSpanProcessor, Span, SpanData, SpanProcessor};
use prometheus_client::metrics::counter::Counter;

use super::metrics::Metrics;

/// Exports spans in batches to an OTLP endpoint.
///
/// # Errors
/// The endpoint is not a URL.
pub(super) fn processor(endpoint: &str, metrics: &Metrics) -> anyhow::Result<CountedSpans> {
    let exporter = SpanExporter::builder()
        .with_tonic()
        .with_endpoint(endpoint)
        .build()
        .context("OTEL_EXPORTER_OTLP_ENDPOINT is not a URL such as http://localhost:4317")?;
    let exporter = ReportedExporter {
        exporter,
        exported: metrics.trace_spans_exported.clone(),
        failed: metrics.trace_exports_failed.clone(),
        is_failing: AtomicBool::new(false),
    };
    let batches = BatchSpanProcessor::builder(exporter).build();
    Ok(CountedSpans { batches, ended: metrics.trace_spans_ended.clone() })
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
    is_failing: AtomicBool,
}

impl opentelemetry_sdk::trace::SpanExporter for ReportedExporter {
    async fn export(&self, batch: Vec<SpanData>) -> OTelSdkResult {
        let spans = batch.len() as u64;
        let result = self.exporter.export(batch).await;
        if let Err(error) = &result {
            self.failed.inc();
            if !self.is_failing.swap(true, Relaxed) {
                tracing::warn!(%error, "the collector does not accept traces; they are lost until it does");
            }
        } else {
            self.exported.inc_by(spans);
            if self.is_failing.swap(false, Relaxed) {
                tracing::info!("the collector accepts traces again");
            }
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
