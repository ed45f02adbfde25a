//! Numbers and how much they vary.

use std::fmt::{self, Display, Formatter};

use serde::{Deserialize, Serialize};

/// How values are spread.
#[derive(Clone, Copy, Debug, Default, PartialEq, Deserialize, Serialize)]
pub struct Spread {
    pub median: f64,
    pub p99: f64,
    pub least: f64,
    pub most: f64,
}

impl Spread {
    /// Of at least one value.
    pub fn of(values: impl IntoIterator<Item = f64>) -> Self {
        let mut values: Vec<f64> = values.into_iter().collect();
        values.sort_by(f64::total_cmp);
        let at = |share: f64| {
            let rank = (share * values.len() as f64).ceil() as usize;
            values.get(rank.max(1) - 1).copied().unwrap_or(f64::NAN)
        };
        Self { median: at(0.5), p99: at(0.99), least: at(0.0), most: at(1.0) }
    }
}

/// A further number of a job.
#[derive(Clone, Debug, Serialize)]
pub struct Figure {
    pub what: String,
    pub unit: String,
    pub spread: Spread,
}

impl Figure {
    pub fn new(what: &str, unit: &str, values: impl IntoIterator<Item = f64>) -> Self {
        Self { what: what.to_owned(), unit: unit.to_owned(), spread: Spread::of(values) }
    }
}

impl Display for Figure {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        let Self { what, unit, spread: Spread { median, p99, least, most } } = self;
        if least == most {
            write!(f, "{what}: {median:.2} {unit}")
        } else {
            write!(f, "{what}: median {median:.2}, p99 {p99:.2}, from {least:.2} to {most:.2} {unit}")
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranks_are_counted_from_the_least_value() {
        let spread = Spread::of((1..=200).rev().map(f64::from));
        assert_eq!(spread, Spread { median: 100.0, p99: 198.0, least: 1.0, most: 200.0 });
        assert_eq!(Spread::of([7.0]), Spread { median: 7.0, p99: 7.0, least: 7.0, most: 7.0 });
    }
}
