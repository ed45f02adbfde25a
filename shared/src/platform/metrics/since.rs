//! A gauge that grows by itself: the time since a moment.

use std::sync::Arc;
use std::sync::atomic::{AtomicI64, Ordering::Relaxed};

use prometheus_client::encoding::{EncodeMetric, MetricEncoder};
use prometheus_client::metrics::{MetricType, TypedMetric};

use crate::events;

/// Instead of a moment: 0 seconds.
const NEVER: i64 = i64::MAX;

/// The seconds since a moment, computed at each scrape. So the value also grows while the thread
/// that sets it is busy.
#[derive(Clone, Debug)]
pub struct SecondsSince(Arc<AtomicI64>);

impl Default for SecondsSince {
    fn default() -> Self {
        Self(Arc::new(AtomicI64::new(NEVER)))
    }
}

impl SecondsSince {
    /// Sets the moment, in milliseconds since 1970.
    pub fn set(&self, moment_ms: i64) {
        self.0.store(moment_ms, Relaxed);
    }

    /// From now on the value is 0.
    pub fn set_zero(&self) {
        self.set(NEVER);
    }

    fn seconds(&self, now_ms: i64) -> f64 {
        now_ms.saturating_sub(self.0.load(Relaxed)).max(0) as f64 / 1000.0
    }
}

/// The current time in milliseconds since 1970, as the timestamps of records.
pub fn now_ms() -> i64 {
    (events::now().unix_timestamp_nanos() / 1_000_000) as i64
}

impl TypedMetric for SecondsSince {
    const TYPE: MetricType = MetricType::Gauge;
}

impl EncodeMetric for SecondsSince {
    fn encode(&self, mut encoder: MetricEncoder) -> std::fmt::Result {
        encoder.encode_gauge(&self.seconds(now_ms()))
    }

    fn metric_type(&self) -> MetricType {
        Self::TYPE
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_seconds_since_a_moment_are_never_negative() {
        let since = SecondsSince::default();
        assert_eq!(since.seconds(5_000), 0.0);
        since.set(3_500);
        assert_eq!(since.seconds(5_000), 1.5);
        assert_eq!(since.seconds(3_000), 0.0, "the clock that set the moment is fast");
        since.set_zero();
        assert_eq!(since.seconds(5_000), 0.0);
    }
}
