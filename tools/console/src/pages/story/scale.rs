//! The axis of a waterfall. A registration takes milliseconds, and a retry waits for minutes. So
//! the time in which nothing happened is drawn shorter than it was.

/// The width of a waterfall, in the units of its drawing.
pub const WIDTH: f64 = 1_000.0;
/// The narrowest bar that can be seen.
const THIN: f64 = 4.0;
/// Idle time up to this share of the busy time is drawn to scale.
const SHORT: f64 = 0.3;
/// How wide longer idle time is drawn, as a share of the busy time.
const DRAWN: f64 = 0.3;

/// Maps times to x coordinates. Linear between its points.
pub struct Scale {
    /// Times and their x coordinates, both ascending.
    points: Vec<(u64, f64)>,
}

impl Scale {
    /// An axis for bars at these times. `busy` must not contain pauses.
    pub fn of(mut busy: Vec<(u64, u64)>) -> Self {
        busy.sort_unstable();
        let mut merged: Vec<(u64, u64)> = vec![];
        for (start, end) in busy {
            match merged.last_mut() {
                Some((_, last)) if start <= *last => *last = end.max(*last),
                _ => merged.push((start, end)),
            }
        }
        let total: u64 = merged.iter().map(|(start, end)| end - start).sum();
        // If nothing took any time, all idle time is drawn alike.
        let total = total.max(1) as f64;
        let mut points: Vec<(u64, f64)> = vec![];
        let mut place = 0.0;
        let mut last = None;
        for (start, end) in merged {
            if let Some(last) = last {
                let idle = (start - last) as f64;
                place += if idle <= total * SHORT { idle } else { total * DRAWN };
            }
            points.push((start, place));
            place += (end - start) as f64;
            points.push((end, place));
            last = Some(end);
        }
        // Leaves room for a bar of minimal width at the end.
        let scale = (WIDTH - THIN) / place.max(1.0);
        points.iter_mut().for_each(|(_, place)| *place *= scale);
        Self { points }
    }

    /// Start and width of a bar.
    pub fn bar(&self, start: u64, end: u64) -> (f64, f64) {
        let from = self.place(start);
        let to = self.place(end);
        (from, (to - from).max(THIN).min(WIDTH - from))
    }

    fn place(&self, time: u64) -> f64 {
        let after = self.points.partition_point(|(point, _)| *point <= time);
        match (after.checked_sub(1).map(|index| self.points[index]), self.points.get(after)) {
            (Some((from, at)), Some((to, then))) => {
                let share = (time - from) as f64 / (to - from) as f64;
                at + (then - at) * share
            }
            (Some((_, at)), None) => at,
            (None, _) => 0.0,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn busy_time_is_linear_and_long_idle_time_is_short() {
        let scale = Scale::of(vec![(1_000, 1_100), (1_050, 1_100), (9_999_900, 10_000_000)]);
        let (start, width) = scale.bar(1_000, 1_100);
        let (again, same) = scale.bar(9_999_900, 10_000_000);
        assert_eq!(start, 0.0);
        assert!((width - same).abs() < 0.01 && width > 300.0, "{width} and {same}");
        assert!(again > width && again < WIDTH / 1.5, "{again}");
        let (_, half) = scale.bar(1_000, 1_050);
        assert!((half - width / 2.0).abs() < 0.01);
        let (pause, pause_width) = scale.bar(1_100, 9_999_900);
        assert!((pause - width).abs() < 0.01 && (pause + pause_width - again).abs() < 0.01);
    }

    #[test]
    fn every_bar_is_seen_and_within_the_drawing() {
        let scale = Scale::of(vec![(5, 5), (7, 7), (1_000, 1_000)]);
        for (start, end) in [(0, 0), (5, 5), (6, 6), (1_000, 1_000), (2_000, 3_000), (0, u64::MAX)] {
            let (from, width) = scale.bar(start, end);
            assert!(from >= 0.0 && width >= THIN - 0.01 && from + width <= WIDTH + 0.01, "{start}: {from} {width}");
        }
        let (from, width) = Scale::of(vec![]).bar(1, 2);
        assert!(from == 0.0 && width == THIN);
    }
}
