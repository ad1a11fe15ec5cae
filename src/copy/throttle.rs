//! No more than so many bytes a second, over all workers.

use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

/// What was not used is kept for so long: a pause of one worker is made up for by the others, and not by a burst afterwards.
const KEPT: Duration = Duration::from_millis(200);

/// A bound for the bytes of a second; none where that is 0.
#[derive(Debug)]
pub(super) struct Throttle {
    bytes_per_second: u64,
    /// Everything that was let through is paid for at this time.
    paid: Mutex<Instant>,
}

impl Throttle {
    pub(super) fn new(bytes_per_second: u64) -> Self {
        Self { bytes_per_second, paid: Mutex::new(Instant::now()) }
    }

    /// Waits until these bytes, which went through already, are paid for.
    pub(super) async fn pay(&self, bytes: u64) {
        if self.bytes_per_second > 0 && bytes > 0 {
            let due = self.due(bytes, Instant::now());
            tokio::time::sleep_until(due.into()).await;
        }
    }

    /// When they are paid for. Whoever comes next pays after that.
    fn due(&self, bytes: u64, now: Instant) -> Instant {
        let cost = Duration::from_secs_f64(bytes as f64 / self.bytes_per_second as f64);
        let mut paid = self.paid.lock().unwrap_or_else(PoisonError::into_inner);
        *paid = (*paid).max(now.checked_sub(KEPT).unwrap_or(now)) + cost;
        *paid
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_went_through_is_paid_for_at_the_rate() {
        let throttle = Throttle::new(1000);
        let begin = Instant::now() + KEPT;
        assert_eq!(throttle.due(500, begin) - begin, Duration::from_millis(300), "a little was kept");
        assert_eq!(throttle.due(500, begin) - begin, Duration::from_millis(800), "the next one pays after it");
        let later = begin + Duration::from_secs(60);
        assert_eq!(throttle.due(1000, later) - later, Duration::from_millis(800), "an hour's pause is no hour's burst");
    }
}
