//! The breaker. If too many of the last records were rejected, the cause is usually a bad release
//! and not the records. Then the consumer pauses instead of turning its topic into dead letters.
//! Only rejections count: failures of a dependency are retried and do not count.

use std::collections::VecDeque;

use anyhow::ensure;
use clap::Args;

use crate::platform::settings::number;

/// When a consumer pauses because it rejects too many records; see `docs/operations.md`.
#[derive(Args, Clone, Debug)]
pub struct BreakerConfig {
    /// A consumer pauses when more than this share of its last records was rejected. 1 switches the
    /// breaker off.
    #[arg(long, env, default_value_t = 0.5, value_parser = share)]
    pub breaker_share: f64,
    /// How many of the last records are considered.
    #[arg(long, env, default_value_t = 200, value_parser = number::<u16>(1..=10_000))]
    pub breaker_window: u16,
    /// Rejections required before it pauses, so that a few bad records on a quiet topic do not trip
    /// it. At most BREAKER_WINDOW.
    #[arg(long, env, default_value_t = 50, value_parser = number::<u16>(1..=10_000))]
    pub breaker_minimum: u16,
}

fn share(text: &str) -> Result<f64, &'static str> {
    let share = text.parse().ok().filter(|share| *share > 0.0 && *share <= 1.0);
    share.ok_or("it must be a number above 0 and at most 1, for example 0.5")
}

impl BreakerConfig {
    /// # Errors
    /// The settings contradict each other: the breaker could never open.
    pub(crate) fn check(&self) -> anyhow::Result<()> {
        ensure!(
            self.breaker_minimum <= self.breaker_window,
            "BREAKER_MINIMUM is {} but BREAKER_WINDOW is only {}, so the breaker would never open: lower BREAKER_MINIMUM, or \
             switch the breaker off with BREAKER_SHARE=1",
            self.breaker_minimum,
            self.breaker_window
        );
        Ok(())
    }
}

/// Which of the last records of one consumer were rejected. It starts empty, so a process that is
/// restarted repeatedly writes fewer dead letters than the minimum each time.
pub(super) struct Breaker {
    rules: BreakerConfig,
    /// Whether each record was rejected, oldest first.
    window: VecDeque<bool>,
    rejected: usize,
}

impl Breaker {
    pub fn new(rules: &BreakerConfig) -> Self {
        Self { rules: rules.clone(), window: VecDeque::new(), rejected: 0 }
    }

    /// A record was handled or skipped.
    pub fn record_accepted(&mut self) {
        self.record(false);
    }

    /// A record was dead-lettered.
    pub fn record_rejected(&mut self) {
        self.record(true);
    }

    fn record(&mut self, rejected: bool) {
        if self.window.len() == usize::from(self.rules.breaker_window) {
            self.rejected -= usize::from(self.window.pop_front() == Some(true));
        }
        self.window.push_back(rejected);
        self.rejected += usize::from(rejected);
    }

    /// Whether one more rejection would be too many. Checked before its dead letter is written.
    /// Returns how many rejections that would be, and of how many records.
    pub fn too_many(&self) -> Option<(usize, usize)> {
        let full = self.window.len() == usize::from(self.rules.breaker_window);
        // In a full window the new record takes the place of the oldest one.
        let dropped = usize::from(full && self.window.front() == Some(&true));
        let rejected = self.rejected + 1 - dropped;
        let of = self.window.len() + usize::from(!full);
        let share = rejected as f64 / of as f64;
        let tripped = rejected >= usize::from(self.rules.breaker_minimum) && share > self.rules.breaker_share;
        tripped.then_some((rejected, of))
    }

    /// Forgets all records.
    pub fn close(&mut self) {
        self.window.clear();
        self.rejected = 0;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn breaker(share: f64, window: u16, minimum: u16) -> Breaker {
        let rules = BreakerConfig { breaker_share: share, breaker_window: window, breaker_minimum: minimum };
        Breaker::new(&rules)
    }

    fn after(mut breaker: Breaker, records: impl IntoIterator<Item = bool>) -> Breaker {
        records.into_iter().for_each(|rejected| breaker.record(rejected));
        breaker
    }

    #[test]
    fn a_few_rejections_on_a_quiet_topic_do_not_open_the_breaker() {
        let breaker = after(breaker(0.5, 200, 10), [true; 8]);
        assert_eq!(breaker.too_many(), None);
        assert_eq!(after(breaker, [true]).too_many(), Some((10, 10)));
    }

    #[test]
    fn the_share_decides_once_the_minimum_is_reached() {
        let half = after(breaker(0.5, 200, 4), [false, true, false, true, false, true, false]);
        assert_eq!(half.too_many(), None, "4 of 8 is not more than half");
        assert_eq!(after(half, [true]).too_many(), Some((5, 9)));
    }

    #[test]
    fn records_outside_the_window_do_not_count() {
        let good = after(breaker(0.5, 10, 3), [true, true].into_iter().chain([false; 8]));
        assert_eq!(good.too_many(), None, "2 of 10, because the oldest of 3 rejections is dropped");
        let bad = after(good, [true; 4]);
        assert_eq!((bad.rejected, bad.window.len()), (4, 10));
        assert_eq!(bad.too_many(), None, "5 of 10 is not more than half");
        assert_eq!(after(bad, [true]).too_many(), Some((6, 10)));
    }

    /// In a full window of rejections each new one replaces the oldest.
    #[test]
    fn a_share_of_one_switches_the_breaker_off() {
        let all = after(breaker(1.0, 10, 3), [true; 25]);
        assert_eq!((all.rejected, all.too_many()), (10, None));
    }

    #[test]
    fn a_closed_breaker_starts_with_an_empty_window() {
        let mut breaker = after(breaker(0.5, 10, 3), [true; 5]);
        assert!(breaker.too_many().is_some());
        breaker.close();
        assert_eq!(breaker.too_many(), None);
    }

    #[test]
    fn settings_with_which_the_breaker_could_never_open_are_an_error() {
        let rules = BreakerConfig { breaker_share: 0.5, breaker_window: 5, breaker_minimum: 6 };
        let error = rules.check().unwrap_err().to_string();
        assert!(error.contains("BREAKER_MINIMUM") && error.contains("BREAKER_SHARE=1"), "{error}");
    }

    #[test]
    fn a_share_is_above_0_and_at_most_1() {
        assert_eq!((share("0.5"), share("1")), (Ok(0.5), Ok(1.0)));
        for wrong in ["0", "-0.1", "1.1", "NaN", "half", ""] {
            assert!(share(wrong).is_err(), "{wrong}");
        }
    }
}
