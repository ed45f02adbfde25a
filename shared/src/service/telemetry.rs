//! Logs and traces. A trace begins at the HTTP request, is stored in the outbox row, travels in the record's headers and
//! goes on in each consumer: see [`current`] and [`continue_from`].

use std::collections::HashMap;

use anyhow::Context as _;
use opentelemetry::propagation::TextMapPropagator;
use opentelemetry::trace::{TraceContextExt, TracerProvider};
use opentelemetry::{Context, KeyValue};
use opentelemetry_otlp::{SpanExporter, WithExportConfig};
use opentelemetry_sdk::Resource;
use opentelemetry_sdk::propagation::TraceContextPropagator;
use opentelemetry_sdk::trace::SdkTracerProvider;
use tracing::Span;
use tracing_opentelemetry::OpenTelemetrySpanExt;
use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::{EnvFilter, Layer};

use super::config::{LogFormat, ServiceConfig};
use crate::events::Envelope;

/// A W3C trace context as text: `traceparent` and `tracestate`.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct TraceContext {
    pub traceparent: Option<String>,
    pub tracestate: Option<String>,
}

impl TraceContext {
    /// Where an event came from.
    pub fn of(envelope: &Envelope) -> Self {
        Self { traceparent: envelope.traceparent.clone(), tracestate: envelope.tracestate.clone() }
    }
}

/// Installs logging and tracing for the whole process. Without an OTLP endpoint spans are made, so that log lines and
/// records carry a trace id, and then dropped.
///
/// # Errors
/// The OTLP endpoint is not a URL, or the filter in RUST_LOG cannot be read.
pub(crate) fn init(name: &'static str, config: &ServiceConfig) -> anyhow::Result<SdkTracerProvider> {
    let resource = Resource::builder().with_attribute(KeyValue::new("service.name", name)).build();
    let mut provider = SdkTracerProvider::builder().with_resource(resource);
    if let Some(endpoint) = &config.otel_exporter_otlp_endpoint {
        let exporter = SpanExporter::builder()
            .with_tonic()
            .with_endpoint(endpoint)
            .build()
            .context("OTEL_EXPORTER_OTLP_ENDPOINT is not an address to send traces to")?;
        provider = provider.with_batch_exporter(exporter);
    }
    let provider = provider.build();
    let filter = EnvFilter::try_new(&config.rust_log).context("RUST_LOG is not a filter")?;
    let lines = match config.log_format {
        LogFormat::Json => tracing_subscriber::fmt::layer().json().flatten_event(true).boxed(),
        LogFormat::Pretty => tracing_subscriber::fmt::layer().with_ansi(false).boxed(),
    };
    let traces = tracing_opentelemetry::layer().with_tracer(provider.tracer(name));
    // One filter for both layers, not one each: a library that only asks whether a line would be written (sqlx does) leaves the
    // answer of a layer's own filter behind on its thread, where it is taken for the answer about the next span. So that no
    // filter takes spans away, and a trace has no holes, our spans have the level of errors.
    let subscriber = tracing_subscriber::registry().with(filter).with(lines).with(traces);
    tracing::subscriber::set_global_default(subscriber).context("telemetry was installed twice")?;
    hide_panic_messages();
    Ok(provider)
}

/// A panic is logged by its place: its message may quote what the code was working on.
pub(crate) fn hide_panic_messages() {
    std::panic::set_hook(Box::new(|panic| {
        let location = panic.location().map(ToString::to_string);
        tracing::error!(location, "panicked");
    }));
}

/// The trace context of the current span, to be stored beside what will be done later.
pub fn current() -> TraceContext {
    let mut carrier = HashMap::new();
    TraceContextPropagator::new().inject_context(&Span::current().context(), &mut carrier);
    TraceContext {
        traceparent: carrier.remove("traceparent"),
        tracestate: carrier.remove("tracestate").filter(|state| !state.is_empty()),
    }
}

/// Makes `span` a child of the span that `origin` names, also in another process, and writes the trace's id into the span's
/// field `trace.id`, so that every log line within carries it. An absent or invalid context starts a new trace.
pub fn continue_from(span: &Span, origin: &TraceContext) {
    let parent = remote(origin);
    if parent.span().span_context().is_valid() {
        // Fails only where the span is disabled or already entered: then the span is in a trace of its own.
        let _ = span.set_parent(parent);
    }
    let context = span.context();
    let trace_id = context.span().span_context().trace_id();
    span.record("trace.id", tracing::field::display(trace_id));
}

/// Links `span` to the span that `origin` names, without belonging to its trace.
pub(crate) fn link(span: &Span, origin: &TraceContext) {
    let other = remote(origin);
    if other.span().span_context().is_valid() {
        span.add_link(other.span().span_context().clone());
    }
}

/// Links `span` to another span of this process.
pub(crate) fn link_to(span: &Span, other: &Span) {
    let context = other.context();
    span.add_link(context.span().span_context().clone());
}

fn remote(origin: &TraceContext) -> Context {
    let fields = [("traceparent", &origin.traceparent), ("tracestate", &origin.tracestate)];
    let carrier: HashMap<String, String> =
        fields.into_iter().filter_map(|(name, value)| Some((name.to_owned(), value.clone()?))).collect();
    TraceContextPropagator::new().extract_with_context(&Context::new(), &carrier)
}
