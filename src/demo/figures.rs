//! Latencies and gaps out of what the clients saw. No I/O.

use std::time::{Duration, Instant};

/// One acknowledged transaction.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Sample {
    /// When the acknowledgement arrived.
    pub acknowledged: Instant,
    /// From BEGIN to the acknowledgement of COMMIT.
    pub latency: Duration,
}

/// What happened in a stretch of time.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Figures {
    /// Acknowledged transactions.
    pub transactions: usize,
    /// How long the stretch was.
    pub length: Duration,
    /// Half of the transactions took no longer.
    pub p50: Duration,
    /// One in a hundred took longer.
    pub p99: Duration,
    /// The slowest one.
    pub max: Duration,
    /// The longest time in which no client had a transaction acknowledged.
    pub longest_gap: Duration,
}

impl Figures {
    /// Acknowledged transactions in a second.
    #[must_use]
    #[allow(clippy::cast_precision_loss, reason = "for people, rounded anyway")]
    pub fn rate(&self) -> f64 {
        if self.length.is_zero() { 0.0 } else { self.transactions as f64 / self.length.as_secs_f64() }
    }
}

/// The figures of `from..to`. The samples need no order. A gap is counted to the stretch's bounds too.
#[must_use]
pub fn figures(samples: &[Sample], from: Instant, to: Instant) -> Figures {
    let mut inside: Vec<Sample> =
        samples.iter().copied().filter(|s| s.acknowledged >= from && s.acknowledged < to).collect();
    inside.sort_unstable_by_key(|sample| sample.acknowledged);
    let bounds = std::iter::once(from).chain(inside.iter().map(|s| s.acknowledged)).chain([to]);
    let moments: Vec<Instant> = bounds.collect();
    let longest_gap = moments.windows(2).map(|pair| pair[1] - pair[0]).max().unwrap_or_default();

    let mut latencies: Vec<Duration> = inside.iter().map(|sample| sample.latency).collect();
    latencies.sort_unstable();
    Figures {
        transactions: inside.len(),
        length: to.saturating_duration_since(from),
        p50: percentile(&latencies, 50),
        p99: percentile(&latencies, 99),
        max: latencies.last().copied().unwrap_or_default(),
        longest_gap,
    }
}

/// The nearest rank; zero of nothing.
fn percentile(sorted: &[Duration], percent: usize) -> Duration {
    let rank = (sorted.len() * percent).div_ceil(100);
    sorted.get(rank.saturating_sub(1)).copied().unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    const fn ms(milliseconds: u64) -> Duration {
        Duration::from_millis(milliseconds)
    }

    #[test]
    fn a_stretch_counts_what_was_acknowledged_in_it() {
        let start = Instant::now();
        let sample = |at, latency| Sample { acknowledged: start + ms(at), latency: ms(latency) };
        let samples = [sample(900, 9), sample(10, 1), sample(20, 3), sample(400, 2), sample(1000, 99)];

        let figures = figures(&samples, start, start + ms(1000));

        assert_eq!(figures.transactions, 4);
        assert_eq!((figures.p50, figures.p99, figures.max), (ms(2), ms(9), ms(9)));
        assert_eq!(figures.longest_gap, ms(500));
        assert!((figures.rate() - 4.0).abs() < f64::EPSILON);
    }

    #[test]
    fn silence_is_one_long_gap() {
        let start = Instant::now();
        let figures = figures(&[], start, start + ms(700));
        assert_eq!(figures, Figures { length: ms(700), longest_gap: ms(700), ..Figures::default() });
    }

    #[test]
    fn a_percentile_is_the_nearest_rank() {
        let hundred: Vec<Duration> = (1..=100).map(ms).collect();
        assert_eq!(percentile(&hundred, 50), ms(50));
        assert_eq!(percentile(&hundred, 99), ms(99));
        assert_eq!(percentile(&hundred[..1], 50), ms(1));
    }
}
