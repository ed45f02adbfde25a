//! The total that the analytics service counts, compared with the topic. Single registrations cannot be
//! found in a total, so its growth is compared with the number of users whose first fact the topic got
//! in the same time, from any client.

use std::collections::{BTreeMap, BTreeSet};

use topology::USER;
use uuid::Uuid;

use crate::kafka::Seen;

/// Users that are remembered. With more, the comparison begins again: 160 KB.
const USERS: usize = 10_000;
/// So many comparisons in a row must differ. The console may see the newest records a little later
/// than the analytics service.
const LOOKS: u32 = 4;
const REGISTERED: &str = "user.registered";

/// First and next offset of each partition of the topic.
pub type Ends = BTreeMap<i32, (i64, i64)>;

/// What was known in one round.
#[derive(Clone, PartialEq)]
pub struct Round {
    pub ends: Ends,
    /// Asked after the ends, while the group had no lag.
    pub counted: i64,
}

#[derive(Default)]
pub struct Totals {
    baseline: Option<Baseline>,
    before: Option<Round>,
    differing: u32,
}

struct Baseline {
    round: Round,
    /// Users of the Laboratory that were counted before. A copy of their fact counts nothing.
    known: BTreeSet<Uuid>,
    /// Users with a fact after the ends.
    users: BTreeSet<Uuid>,
}

/// The outcome of a comparison.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Compared {
    NotYet,
    Same(usize),
    Differs { in_topic: usize, counted: i64 },
}

impl Totals {
    /// A record has arrived.
    pub fn saw(&mut self, seen: &Seen) {
        let Some(baseline) = &mut self.baseline else { return };
        let (Some(user), true) = (seen.key, seen.topic == USER.writes[0] && seen.kind == REGISTERED) else { return };
        let is_after = baseline.round.ends.get(&seen.partition).is_none_or(|(_, next)| seen.offset >= *next);
        if is_after && !baseline.known.contains(&user) {
            baseline.users.insert(user);
        }
    }

    /// Some records were not seen: the comparison begins again.
    pub fn restart(&mut self) {
        *self = Self::default();
    }

    /// Compares. `round` is `None` while the group lags, or without an answer. A total belongs to
    /// the ends of a topic only if they were the same before and after it was asked.
    pub fn compare(&mut self, round: Option<Round>, known: impl Iterator<Item = Uuid>) -> Compared {
        let before = std::mem::replace(&mut self.before, round.clone());
        let Some(settled) = before.zip(round).filter(|(before, now)| before.ends == now.ends).map(|(before, _)| before)
        else {
            return self.last();
        };
        if self.baseline.as_ref().is_some_and(|baseline| baseline.users.len() > USERS) {
            self.baseline = None;
        }
        let Some(baseline) = &self.baseline else {
            self.baseline = Some(Baseline { round: settled, known: known.collect(), users: BTreeSet::new() });
            return Compared::NotYet;
        };
        let counted = settled.counted - baseline.round.counted;
        let is_same = usize::try_from(counted) == Ok(baseline.users.len());
        self.differing = if is_same { 0 } else { self.differing.saturating_add(1) };
        if self.differing < LOOKS {
            return self.last();
        }
        Compared::Differs { in_topic: baseline.users.len(), counted }
    }

    /// Between two comparisons nothing is known to differ.
    fn last(&self) -> Compared {
        match &self.baseline {
            Some(baseline) => Compared::Same(baseline.users.len()),
            None => Compared::NotYet,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn seen(offset: i64, user: u128) -> Seen {
        Seen {
            number: 0,
            topic: USER.writes[0],
            partition: 0,
            offset,
            time: None,
            key: Some(Uuid::from_u128(user)),
            kind: REGISTERED.to_owned(),
            version: "1".to_owned(),
            size: 0,
            event: None,
            trace: None,
            is_tombstone: false,
        }
    }

    fn compare(totals: &mut Totals, next: i64, counted: i64) -> Compared {
        totals.compare(Some(Round { ends: [(0, (0, next))].into(), counted }), [Uuid::from_u128(1)].into_iter())
    }

    #[test]
    fn the_growth_is_compared_with_the_topic() {
        let mut totals = Totals::default();
        assert_eq!(compare(&mut totals, 10, 7), Compared::NotYet);
        assert_eq!(compare(&mut totals, 10, 7), Compared::NotYet, "the baseline");
        totals.saw(&seen(9, 90));
        totals.saw(&seen(10, 2));
        totals.saw(&seen(11, 2));
        totals.saw(&seen(12, 1));
        totals.saw(&seen(13, 3));
        assert_eq!(compare(&mut totals, 14, 9), Compared::Same(2));
        for _ in 0..10 {
            assert_eq!(compare(&mut totals, 14, 9), Compared::Same(2), "a copy and a known user count once");
        }
    }

    #[test]
    fn a_total_that_stays_different_is_reported() {
        for counted in [7, 9] {
            let mut totals = Totals::default();
            compare(&mut totals, 10, 7);
            compare(&mut totals, 10, 7);
            totals.saw(&seen(10, 2));
            compare(&mut totals, 12, counted);
            for _ in 1..LOOKS {
                assert_eq!(compare(&mut totals, 12, counted), Compared::Same(1));
            }
            let differs = Compared::Differs { in_topic: 1, counted: counted - 7 };
            assert_eq!(compare(&mut totals, 12, counted), differs);
            assert_eq!(totals.compare(None, [].into_iter()), Compared::Same(1), "a lag is no violation");
        }
    }
}
