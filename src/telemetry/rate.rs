//! A rate over the last half minute, from a total that only grows. Pure: the caller brings the time.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

const WINDOW: Duration = Duration::from_secs(30);
/// Observations closer together than this are folded into one.
const STEP: Duration = Duration::from_millis(500);
/// A rate over less than this is noise.
const LEAST: Duration = Duration::from_secs(2);

/// Observations of one total.
#[derive(Clone, Debug, Default)]
pub struct Rate {
    seen: VecDeque<(Instant, u64)>,
}

impl Rate {
    /// The total is `total` now. A total that shrank begins a new history.
    pub fn observe(&mut self, now: Instant, total: u64) {
        if self.seen.back().is_some_and(|(_, last)| *last > total) {
            self.seen.clear();
        }
        while self.seen.front().is_some_and(|(at, _)| now.saturating_duration_since(*at) > WINDOW) {
            self.seen.pop_front();
        }
        if self.seen.back().is_none_or(|(at, _)| now.saturating_duration_since(*at) >= STEP) {
            self.seen.push_back((now, total));
        }
    }

    /// Units a second over the window; `None` until it spans two seconds.
    #[must_use]
    pub fn per_second(&self) -> Option<f64> {
        let ((first_at, first), (last_at, last)) = (self.seen.front()?, self.seen.back()?);
        let span = last_at.saturating_duration_since(*first_at);
        (span >= LEAST).then(|| last.saturating_sub(*first) as f64 / span.as_secs_f64())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn observed(totals: &[(u64, u64)]) -> Rate {
        let start = Instant::now();
        let mut rate = Rate::default();
        for (second, total) in totals {
            rate.observe(start + Duration::from_secs(*second), *total);
        }
        rate
    }

    #[test]
    fn a_rate_needs_two_seconds_and_looks_back_thirty() {
        assert_eq!(observed(&[(0, 0), (1, 100)]).per_second(), None);
        assert_eq!(observed(&[(0, 0), (1, 100), (2, 200)]).per_second(), Some(100.0));
        assert_eq!(observed(&[(0, 0), (1, 10_000), (31, 10_000), (34, 10_000)]).per_second(), Some(0.0));
    }

    #[test]
    fn a_total_that_shrank_begins_again() {
        assert_eq!(observed(&[(0, 100), (5, 200), (6, 0), (9, 300)]).per_second(), Some(100.0));
    }
}
