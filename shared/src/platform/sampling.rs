//! Which traces are exported. The decision is made once, by the service that starts the trace. It
//! travels with the trace context through the outbox and the records, and every later service
//! follows it: a trace is exported completely or not at all.

use clap::{Args, ValueEnum};
use opentelemetry_sdk::trace::Sampler;

/// Settings of sampling. The names and values are those of the OpenTelemetry specification. The
/// samplers that are not parent-based are missing, because each service would decide for itself and
/// most traces would have gaps.
#[derive(Args, Clone, Debug)]
pub struct SamplingConfig {
    /// Which of the traces that start here are exported. Traces that another service has started
    /// are exported if that service exports them.
    #[arg(long, env, value_enum, default_value_t)]
    otel_traces_sampler: TracesSampler,
    /// The share of traces that `parentbased_traceidratio` exports: 1 for all, 0.01 for one in a
    /// hundred.
    #[arg(long, env, default_value_t = 1.0, value_parser = share_of_traces)]
    otel_traces_sampler_arg: f64,
}

#[derive(ValueEnum, Clone, Copy, Debug, Default, PartialEq, Eq)]
enum TracesSampler {
    /// All of them.
    #[value(name = "parentbased_always_on")]
    AlwaysOn,
    /// None of them.
    #[value(name = "parentbased_always_off")]
    AlwaysOff,
    /// The share of OTEL_TRACES_SAMPLER_ARG.
    #[default]
    #[value(name = "parentbased_traceidratio")]
    Ratio,
}

impl SamplingConfig {
    pub(super) fn sampler(&self) -> Sampler {
        let of_new_traces = match self.otel_traces_sampler {
            TracesSampler::AlwaysOn => Sampler::AlwaysOn,
            TracesSampler::AlwaysOff => Sampler::AlwaysOff,
            TracesSampler::Ratio => Sampler::TraceIdRatioBased(self.otel_traces_sampler_arg),
        };
        Sampler::ParentBased(Box::new(of_new_traces))
    }
}

fn share_of_traces(text: &str) -> Result<f64, &'static str> {
    let share = text.parse().ok().filter(|share| (0.0..=1.0).contains(share));
    share.ok_or("it must be a number from 0 to 1, for example 0.01 for one trace in a hundred")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_share_is_a_number_from_zero_to_one() {
        for (text, share) in [("0", 0.0), ("0.25", 0.25), ("1", 1.0)] {
            assert_eq!(share_of_traces(text), Ok(share));
        }
        for text in ["", "-0.1", "1.1", "10%", "NaN", "inf"] {
            assert!(share_of_traces(text).is_err(), "{text}");
        }
    }
}
