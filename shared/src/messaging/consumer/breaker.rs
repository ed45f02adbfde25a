//! The breaker: when too large a share of what came last was rejected, the fault is ours and not the records', most often a bad
//! deploy. Then the consumer stops instead of turning its topic into dead letters. Only what cannot ever work counts: an
//! outage is retried and never comes here.

use std::collections::VecDeque;

use anyhow::ensure;

use crate::service::BreakerConfig;

/// What became of the last records of one consumer. It begins empty at each start, so a process that is restarted again and
/// again adds, each time, fewer letters than the minimum.
pub(super) struct Breaker {
    rules: BreakerConfig,
    /// The oldest first; whether it was rejected.
    window: VecDeque<bool>,
    rejected: usize,
}

impl Breaker {
    /// # Errors
    /// It could never open: the settings contradict each other.
    pub fn new(rules: &BreakerConfig) -> anyhow::Result<Self> {
        ensure!(
            rules.breaker_minimum <= rules.breaker_window,
            "BREAKER_MINIMUM is {} and BREAKER_WINDOW only {}, so the breaker would never open; lower the minimum, or switch \
             it off with BREAKER_SHARE=1",
            rules.breaker_minimum,
            rules.breaker_window
        );
        Ok(Self { rules: rules.clone(), window: VecDeque::new(), rejected: 0 })
    }

    /// A record has had its effect; a dead letter counts as one.
    pub fn record(&mut self, rejected: bool) {
        if self.window.len() == usize::from(self.rules.breaker_window) {
            self.rejected -= usize::from(self.window.pop_front() == Some(true));
        }
        self.window.push_back(rejected);
        self.rejected += usize::from(rejected);
    }

    /// Whether one rejection more would be one too many. Asked before its dead letter is written. Answers how many that would be,
    /// of how many records.
    pub fn too_many(&self) -> Option<(usize, usize)> {
        let full = self.window.len() == usize::from(self.rules.breaker_window);
        let leaves = usize::from(full && self.window.front() == Some(&true));
        let (rejected, of) = (self.rejected + 1 - leaves, self.window.len() + usize::from(!full));
        let share = rejected as f64 / of as f64;
        let tripped = rejected >= usize::from(self.rules.breaker_minimum) && share > self.rules.breaker_share;
        tripped.then_some((rejected, of))
    }

    /// Begins anew.
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
        Breaker::new(&rules).unwrap()
    }

    fn after(mut breaker: Breaker, records: impl IntoIterator<Item = bool>) -> Breaker {
        records.into_iter().for_each(|rejected| breaker.record(rejected));
        breaker
    }

    #[test]
    fn a_bad_record_in_a_quiet_topic_never_trips_it() {
        let breaker = after(breaker(0.5, 200, 10), [true; 8]);
        assert_eq!(breaker.too_many(), None);
        assert_eq!(after(breaker, [true]).too_many(), Some((10, 10)));
    }

    #[test]
    fn the_share_decides_once_the_minimum_is_reached() {
        let half = after(breaker(0.5, 200, 4), [false, true, false, true, false, true, false]);
        assert_eq!(half.too_many(), None, "4 of 8 is no more than half");
        assert_eq!(after(half, [true]).too_many(), Some((5, 9)));
    }

    #[test]
    fn what_fell_out_of_the_window_is_forgotten() {
        let good = after(breaker(0.5, 10, 3), [true, true].into_iter().chain([false; 8]));
        assert_eq!(good.too_many(), None, "2 of 10, of which one leaves");
        let bad = after(good, [true; 4]);
        assert_eq!((bad.rejected, bad.window.len()), (4, 10));
        assert_eq!(bad.too_many(), None, "5 of 10 is no more than half");
        assert_eq!(after(bad, [true]).too_many(), Some((6, 10)));
    }

    /// A full window of rejections: one leaves for each that comes.
    #[test]
    fn a_share_of_one_switches_it_off() {
        let all = after(breaker(1.0, 10, 3), [true; 25]);
        assert_eq!((all.rejected, all.too_many()), (10, None));
    }

    #[test]
    fn closed_again_it_begins_anew() {
        let mut breaker = after(breaker(0.5, 10, 3), [true; 5]);
        assert!(breaker.too_many().is_some());
        breaker.close();
        assert_eq!(breaker.too_many(), None);
    }

    #[test]
    fn a_breaker_that_could_never_open_is_refused() {
        let rules = BreakerConfig { breaker_share: 0.5, breaker_window: 5, breaker_minimum: 6 };
        let error = Breaker::new(&rules).err().unwrap().to_string();
        assert!(error.contains("BREAKER_MINIMUM") && error.contains("BREAKER_SHARE=1"), "{error}");
    }
}
