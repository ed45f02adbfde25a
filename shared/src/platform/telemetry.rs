//! Logs and traces. A trace starts at the HTTP request. Its context is stored in the outbox row,
//! travels in the record's headers, and is continued by each consumer: see [`current`] and
//! [`continue_from`].

use std::collections::HashMap;
use std::panic::Location;

use anyhow::Context as _;
use clap::{Args, ValueEnum};
use opentelemetry::propagation::TextMapPropagator;
use opentelemetry::trace::{TraceContextExt, TraceFlags, TraceId, TracerProvider};
use opentelemetry::{Context, KeyValue};
use opentelemetry_sdk::Resource;
use opentelemetry_sdk::propagation::TraceContextPropagator;
use opentelemetry_sdk::trace::SdkTracerProvider;
use tracing::Span;
use tracing_opentelemetry::OpenTelemetrySpanExt;
use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::{EnvFilter, Layer};

use super::metrics::Metrics;
use super::sampling::SamplingConfig;
use super::span_fields::SpanFields;
use super::traces::CollectorConfig;
use crate::events::Envelope;

/// The modules that log each handled event at the level debug.
const EVENT_LOG: &str = "shared::messaging::consumer::batch=debug";

/// Settings of logs and traces.
#[derive(Args, Clone, Debug)]
pub struct TelemetryConfig {
    /// Which log lines are written, as a filter of tracing-subscriber's EnvFilter. Default: our own
    /// messages at info, libraries at warn.
    #[arg(long, env)]
    pub rust_log: Option<String>,
    /// Write a log line for every handled event, with its event id, type, user id and trace id.
    #[arg(long, env, default_value_t = false, action = clap::ArgAction::Set, num_args = 0..=1, default_missing_value = "true")]
    pub log_events: bool,
    /// Continue the trace of a caller, including its `tracestate`, which is then stored with the
    /// event. Only for callers that you trust: `tracestate` may contain any text. By default a
    /// request starts a new trace that links to the caller's.
    #[arg(long, env, default_value_t = false, action = clap::ArgAction::Set, num_args = 0..=1, default_missing_value = "true")]
    pub trust_trace_context: bool,
    /// The format of log lines.
    #[arg(long, env, value_enum, default_value_t)]
    pub log_format: LogFormat,
    #[command(flatten)]
    pub collector: CollectorConfig,
    #[command(flatten)]
    pub sampling: SamplingConfig,
}

impl TelemetryConfig {
    /// Whether spans are exported to a collector.
    pub(crate) fn exports_spans(&self) -> bool {
        self.collector.is_given()
    }

    fn filter(&self, service: &str) -> anyhow::Result<EnvFilter> {
        let default = || format!("warn,rdkafka=off,{service}=info,shared=info");
        let mut directives = self.rust_log.clone().unwrap_or_else(default);
        if self.log_events {
            directives = format!("{directives},{EVENT_LOG}");
        }
        EnvFilter::try_new(directives).context("RUST_LOG is not a valid filter, for example info,shared=debug")
    }
}

/// The format of log lines.
#[derive(ValueEnum, Clone, Copy, Debug, Default)]
pub enum LogFormat {
    /// One JSON object per line.
    #[default]
    Json,
    /// Text for people.
    Pretty,
}

/// A W3C trace context as text: `traceparent` and `tracestate`.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct TraceContext {
    pub traceparent: Option<String>,
    pub tracestate: Option<String>,
}

impl TraceContext {
    /// The context of the request that caused the event.
    pub fn of(envelope: &Envelope) -> Self {
        Self { traceparent: envelope.traceparent.clone(), tracestate: envelope.tracestate.clone() }
    }
}

/// Installs logging and tracing for the whole process. `service` is the service's name, which is
/// also the name of its crate. Without an OTLP endpoint spans are still created, so that log lines
/// and records carry a trace id, and then dropped. Only a consumer creates none for the records of
/// a batch, because nothing would carry their trace ids.
///
/// # Errors
/// A setting of the collector cannot be used, or RUST_LOG is not a valid filter.
pub fn init(service: &'static str, config: &TelemetryConfig, metrics: &Metrics) -> anyhow::Result<SdkTracerProvider> {
    let resource = Resource::builder().with_attribute(KeyValue::new("service.name", service)).build();
    let mut provider = SdkTracerProvider::builder().with_resource(resource).with_sampler(config.sampling.sampler());
    if let Some(processor) = config.collector.processor(metrics)? {
        provider = provider.with_span_processor(processor);
    }
    let provider = provider.build();
    let filter = config.filter(service)?;
    let lines = match config.log_format {
        LogFormat::Json => {
            tracing_subscriber::fmt::layer().json().flatten_event(true).fmt_fields(SpanFields::new()).boxed()
        }
        LogFormat::Pretty => tracing_subscriber::fmt::layer().with_ansi(false).boxed(),
    };
    // Without the work that each poll of a future would cause: measuring how long its span was
    // busy, and setting OpenTelemetry's own current context, which nothing here reads.
    let traces = tracing_opentelemetry::layer()
        .with_tracer(provider.tracer(service))
        .with_tracked_inactivity(false)
        .with_context_activation(false);
    // One filter for the whole subscriber, not one per layer. sqlx asks `enabled!`; with per-layer
    // filters the answer stays in thread-local state and is applied to the next span. Our spans use
    // level ERROR so that no filter drops them and traces have no gaps.
    let subscriber = tracing_subscriber::registry().with(filter).with(lines).with(traces);
    tracing::subscriber::set_global_default(subscriber).context("a tracing subscriber is already installed")?;
    hide_panic_messages();
    if config.collector.reveals_headers() {
        tracing::warn!("OTEL_EXPORTER_OTLP_HEADERS are sent without encryption: use an endpoint with https://");
    }
    Ok(provider)
}

/// Logs a panic by its location only: its message may quote the data that the code was working on.
pub(crate) fn hide_panic_messages() {
    std::panic::set_hook(Box::new(|panic| {
        let location = panic.location().map(ToString::to_string);
        tracing::error!(location, "panicked");
    }));
}

/// The trace context of the current span, to be stored with work that is done later.
pub fn current() -> TraceContext {
    let context = Span::current().context();
    let span = context.span();
    let span = span.span_context();
    if !span.is_valid() {
        return TraceContext::default();
    }
    let sampled = span.trace_flags() & TraceFlags::SAMPLED;
    let traceparent = format!("00-{}-{}-{sampled:02x}", span.trace_id(), span.span_id());
    TraceContext {
        traceparent: Some(traceparent),
        tracestate: Some(span.trace_state().header()).filter(|state| !state.is_empty()),
    }
}

/// Adds an event to the current span, with the place of the caller in the code. Unlike a log line
/// it is seen in the trace only. `what` is a fixed text, so it contains no data.
#[track_caller]
pub fn note(what: &'static str) {
    let place = Location::caller();
    let attributes =
        vec![KeyValue::new("code.file.path", place.file()), KeyValue::new("code.line.number", i64::from(place.line()))];
    Span::current().add_event(what, attributes);
}

/// Makes `span` a child of the span that `origin` names, which may be in another process. Records
/// the trace's id in the span's field `trace.id`, so that every log line within the span carries
/// it. An absent or invalid context starts a new trace.
pub fn continue_from(span: &Span, origin: &TraceContext) {
    let parent = remote(origin);
    if parent.span().span_context().is_valid() {
        // Fails only if the span is disabled or was entered before: then it starts its own trace.
        let _ = span.set_parent(parent);
    }
    span.record("trace.id", tracing::field::display(trace_id(span)));
}

/// The id of the span's trace.
pub(crate) fn trace_id(span: &Span) -> TraceId {
    span.context().span().span_context().trace_id()
}

/// Links `span` to the span that `origin` names. `span` does not become part of that trace.
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
    if origin.traceparent.is_none() {
        return Context::new();
    }
    let fields = [("traceparent", &origin.traceparent), ("tracestate", &origin.tracestate)];
    let carrier: HashMap<String, String> =
        fields.into_iter().filter_map(|(name, value)| Some((name.to_owned(), value.clone()?))).collect();
    TraceContextPropagator::new().extract_with_context(&Context::new(), &carrier)
}
