//! The total that the analytics service counts, compared with the topic. Single registrations
//! cannot be found in a total, so its growth is compared with the number of users whose first fact
//! the topic got in the same time, from any client.

use std::collections::BTreeMap;

use tokio::time::Instant;
use topology::USER;
use uuid::Uuid;

use super::fates::Place;
use crate::kafka::Seen;

/// How many users are remembered, in about 400 KB. When the map is full, it is cleared and the
/// comparison starts again.
const USERS: usize = 10_000;
/// How many comparisons in a row must differ before the difference is reported. The console may
/// receive the newest records a little later than the analytics service.
const CHECKS: u32 = 4;
const REGISTERED: &str = "user.registered";

/// First and next offset of each partition of the topic.
pub type Ends = BTreeMap<i32, (i64, i64)>;

/// What was known in one round.
#[derive(Clone)]
pub struct Round {
    pub ends: Ends,
    /// When Kafka was asked for the ends.
    pub asked: Instant,
    /// Total of the funnel, read after the ends while the group had no lag.
    pub counted: i64,
    /// When the analytics service had answered.
    pub answered: Instant,
}

#[derive(Default)]
pub struct Totals {
    /// The first fact about each user: a copy of it has a later offset and counts nothing.
    facts: BTreeMap<Uuid, Place>,
    /// Where the comparison began.
    baseline: Option<Round>,
    before: Option<Round>,
    /// Users that the topic got since the baseline, at the last comparison.
    users: usize,
    /// How many comparisons in a row differed.
    differing: u32,
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
        let (Some(user), true) = (seen.key, seen.topic == USER.writes[0] && seen.kind == REGISTERED) else { return };
        if self.facts.len() == USERS {
            self.restart();
            self.facts.clear();
        }
        self.facts.entry(user).or_insert((seen.partition, seen.offset));
    }

    /// Some records were not seen: the comparison begins again.
    pub fn restart(&mut self) {
        *self = Self { facts: std::mem::take(&mut self.facts), ..Self::default() };
    }

    /// Compares. `round` is `None` while the group lags, or without an answer. `known` are the
    /// first facts about users that are remembered elsewhere.
    pub fn compare(&mut self, round: Option<Round>, known: impl Iterator<Item = (Uuid, Place)>) -> Compared {
        let before = std::mem::replace(&mut self.before, round.clone());
        let settled = before.zip(round).filter(|(before, now)| is_settled(before, now)).map(|(before, _)| before);
        let Some(settled) = settled else { return self.last() };
        let Some(baseline) = &self.baseline else {
            for (user, place) in known {
                self.facts.entry(user).or_insert(place);
            }
            self.baseline = Some(settled);
            return Compared::NotYet;
        };
        let is_between = |(partition, offset): &&Place| {
            let next = |ends: &Ends| ends.get(partition).map_or(0, |(_, next)| *next);
            (next(&baseline.ends)..next(&settled.ends)).contains(offset)
        };
        self.users = self.facts.values().filter(is_between).count();
        let counted = settled.counted - baseline.counted;
        let is_same = usize::try_from(counted) == Ok(self.users);
        self.differing = if is_same { 0 } else { self.differing.saturating_add(1) };
        if self.differing < CHECKS {
            return self.last();
        }
        Compared::Differs { in_topic: self.users, counted }
    }

    /// The result while no comparison is possible, or while a difference is not confirmed.
    fn last(&self) -> Compared {
        if self.baseline.is_some() { Compared::Same(self.users) } else { Compared::NotYet }
    }
}

/// Whether the total of a round belongs to its ends: the topic ended there before the analytics
/// service was asked and after it had answered.
fn is_settled(before: &Round, now: &Round) -> bool {
    before.ends == now.ends && before.answered <= now.asked
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

    fn round(next: i64, counted: i64) -> Round {
        Round { ends: [(0, (0, next))].into(), asked: Instant::now(), counted, answered: Instant::now() }
    }

    fn compare(totals: &mut Totals, next: i64, counted: i64) -> Compared {
        totals.compare(Some(round(next, counted)), [(Uuid::from_u128(1), (0, 3))].into_iter())
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
        compare(&mut totals, 14, 9);
        for _ in 0..10 {
            assert_eq!(compare(&mut totals, 14, 9), Compared::Same(2), "a copy and a known user count once");
        }
    }

    /// The burst of registrations begins while the first comparison does.
    #[test]
    fn a_fact_after_the_first_ends_is_counted_although_it_was_seen_before_the_comparison() {
        let mut totals = Totals::default();
        compare(&mut totals, 10, 7);
        totals.saw(&seen(10, 2));
        totals.saw(&seen(11, 3));
        assert_eq!(compare(&mut totals, 10, 7), Compared::NotYet, "the baseline");
        compare(&mut totals, 12, 9);
        for _ in 0..2 * CHECKS {
            assert_eq!(compare(&mut totals, 12, 9), Compared::Same(2));
        }
    }

    /// The analytics service may count a record that has arrived after Kafka was asked.
    #[test]
    fn a_total_belongs_to_ends_that_were_asked_for_before_and_after_it() {
        let mut totals = Totals::default();
        let asked = Instant::now();
        for _ in 0..3 {
            let late = Round { asked, ..round(10, 8) };
            assert_eq!(totals.compare(Some(late), [].into_iter()), Compared::NotYet);
        }
        totals.saw(&seen(10, 2));
        compare(&mut totals, 11, 8);
        compare(&mut totals, 11, 8);
        assert_eq!(compare(&mut totals, 11, 8), Compared::Same(0));
    }

    #[test]
    fn a_total_that_stays_different_is_reported() {
        for counted in [7, 9] {
            let mut totals = Totals::default();
            compare(&mut totals, 10, 7);
            compare(&mut totals, 10, 7);
            totals.saw(&seen(10, 2));
            compare(&mut totals, 12, counted);
            for _ in 1..CHECKS {
                assert_eq!(compare(&mut totals, 12, counted), Compared::Same(1));
            }
            let differs = Compared::Differs { in_topic: 1, counted: counted - 7 };
            assert_eq!(compare(&mut totals, 12, counted), differs);
            assert_eq!(totals.compare(None, [].into_iter()), Compared::Same(1), "a lag is no violation");
        }
    }
}
