//! Exemplars: an observation of a histogram carries the id of its trace, so that a spike in a
//! dashboard leads to a trace. Prometheus reads them from the OpenMetrics text format only, and
//! keeps them only with `--enable-feature=exemplar-storage`.

use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::exemplar::HistogramWithExemplars;
use prometheus_client::metrics::family::Family;

use opentelemetry::trace::TraceContextExt;
use tracing::Span;
use tracing_opentelemetry::OpenTelemetrySpanExt;

use crate::events;

/// Upper bounds in seconds, from a live event to one that waited a night for a dependency.
const AGE_BUCKETS: [f64; 10] = [0.01, 0.05, 0.1, 0.25, 0.5, 1.0, 5.0, 60.0, 3600.0, 86400.0];

/// A histogram whose buckets each show the last exemplar that fell into them.
pub type TracedHistogram = HistogramWithExemplars<Exemplar>;
pub type TracedHistograms<L> = Family<L, TracedHistogram, fn() -> TracedHistogram>;

/// The label of an exemplar: 40 characters with its name. OpenMetrics allows 128.
#[derive(Clone, Debug, PartialEq, Eq, EncodeLabelSet)]
pub struct Exemplar {
    trace_id: String,
}

/// Makes exemplars, if spans are exported. The trace of any other exemplar would not exist.
#[derive(Clone, Copy, Debug, Default)]
pub struct Exemplars {
    exports_spans: bool,
}

impl Exemplars {
    pub(crate) fn new(exports_spans: bool) -> Self {
        Self { exports_spans }
    }

    /// The exemplar that leads to the trace of this span. `None` if the collector does not get the
    /// span, because there is no collector or because the trace is not sampled.
    pub fn of(self, span: &Span) -> Option<Exemplar> {
        if !self.exports_spans {
            return None;
        }
        let context = span.context();
        let context = context.span().span_context().clone();
        context.is_sampled().then(|| Exemplar { trace_id: context.trace_id().to_string() })
    }
}

/// The ages of something: each is the difference between the clocks of two machines. They are for
/// display only; nothing is decided by them.
#[derive(Clone, Debug)]
pub struct Ages {
    pub(super) histogram: TracedHistogram,
    pub(super) negative: Counter,
}

impl Default for Ages {
    fn default() -> Self {
        Self { histogram: age_histogram(), negative: Counter::default() }
    }
}

impl Ages {
    /// Observes an age in seconds. If it is negative, the clocks differ by at least that much: it
    /// counts as 0, and as negative.
    pub fn observe(&self, seconds: f64, exemplar: Option<Exemplar>) {
        if seconds < 0.0 {
            self.negative.inc();
        }
        observe(&self.histogram, seconds.max(0.0), exemplar);
    }
}

pub(super) fn age_histogram() -> TracedHistogram {
    TracedHistogram::new(AGE_BUCKETS.into_iter())
}

/// Observes a value with its exemplar. An exemplar has a time of its own, because the next scrape
/// may come much later.
pub(crate) fn observe(histogram: &TracedHistogram, value: f64, exemplar: Option<Exemplar>) {
    let time = exemplar.as_ref().map(|_| events::now().into());
    histogram.observe(value, exemplar, time);
}
