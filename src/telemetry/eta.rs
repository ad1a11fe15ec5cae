//! How long the rows still take. Pure: the caller brings the time.
//!
//! What is left is told in bytes as COPY prints them, for these are what passes by. The source knows the size of a table on its
//! disk, which is another number: bloat and compressed values make it larger or smaller. The finished tables tell by how much,
//! and so do those that have already printed more than was expected. Nothing is counted twice: a finished table has nothing
//! left, whatever its two sizes are; of one in flight at most all of it is left.
//!
//! The pace is that of the last minute, the newest seconds counting most. It only sees what this process moved: what an
//! earlier start copied says nothing about the speed of this one.

use std::time::{Duration, Instant};

/// How the rows of the first copy travel.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Way {
    /// From the source into the target.
    #[default]
    Direct,
    /// From the source into an archive, which is to be restored afterwards.
    Dump,
    /// From the archive into the target.
    Restore,
}

/// How far one table is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Table {
    /// Its rows are in the target.
    pub(super) copied: bool,
    /// Its rows are in the archive.
    pub(super) dumped: bool,
    /// Printed by COPY so far.
    pub(super) bytes: u64,
    /// The source's size of it; 0: not known, or nothing.
    pub(super) total: u64,
    /// All that COPY prints of it, where that is known.
    pub(super) printed: Option<u64>,
}

/// Bytes that COPY still prints.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Left {
    /// On this way.
    pub(super) now: u64,
    /// On this way and on those that follow it.
    pub(super) all: u64,
}

/// What is left of these tables.
pub(super) fn left(tables: impl Iterator<Item = Table> + Clone, way: Way) -> Left {
    let ratio = ratio(tables.clone(), way);
    let mut left = Left::default();
    for table in tables {
        let expected = expected(table, ratio);
        if !is_finished(table, way) {
            left.now = left.now.saturating_add(expected.saturating_sub(table.bytes));
        }
        if way == Way::Dump && !table.copied {
            left.all = left.all.saturating_add(expected.max(table.bytes));
        }
    }
    left.all = left.all.saturating_add(left.now);
    left
}

fn is_finished(table: Table, way: Way) -> bool {
    table.copied || (way == Way::Dump && table.dumped)
}

fn expected(table: Table, ratio: f64) -> u64 {
    // A float becomes the nearest number that there is; NaN, which a finite ratio does not make, would be 0.
    table.printed.unwrap_or((table.total as f64 * ratio) as u64)
}

/// Printed bytes for one byte on disk. One hundredth of everything is taken to print as large as it is, so that a few small
/// tables at the beginning do not decide for all.
fn ratio(tables: impl Iterator<Item = Table> + Clone, way: Way) -> f64 {
    let mut known = tables.clone().map(|table| table.total).fold(0, u64::saturating_add) as f64 / 100.0;
    let mut printed = known;
    let mut overdue = (0.0, 0.0);
    for table in tables.filter(|table| table.total > 0) {
        let all = table.printed.or(is_finished(table, way).then_some(table.bytes));
        if let Some(all) = all {
            printed += all as f64;
            known += table.total as f64;
        } else if table.bytes > table.total {
            overdue = (overdue.0 + table.bytes as f64, overdue.1 + table.total as f64);
        }
    }
    // One that is not finished tells only that it prints more, not less.
    let without = if known > 0.0 { printed / known } else { 1.0 };
    let with = if known + overdue.1 > 0.0 { (printed + overdue.0) / (known + overdue.1) } else { 1.0 };
    without.max(with)
}

/// So much weight has the past after this time: 1/e.
const MEMORY: Duration = Duration::from_secs(20);
/// Observations closer together than this are folded into one.
const STEP: Duration = Duration::from_millis(500);
/// A pace over less than this is noise.
const LEAST: Duration = Duration::from_secs(2);
/// Whoever is so slow has stopped: no figure is better than an absurd one.
const LONGEST: f64 = 365.0 * 86_400.0;

/// The speed of a total that only grows. It begins with the first growth: what came before was not copying.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Pace {
    last: Option<(Instant, u64)>,
    span: Duration,
    /// Units a second and the weight of what was seen, both fading alike.
    faded: (f64, f64),
}

impl Pace {
    /// The total is `total` now. One that shrank begins a new history.
    pub(super) fn observe(&mut self, now: Instant, total: u64) {
        let Some((at, before)) = self.last.filter(|(_, before)| *before <= total) else {
            *self = Self { last: Some((now, total)), ..Self::default() };
            return;
        };
        let passed = now.saturating_duration_since(at);
        let idle = self.span.is_zero() && total == before;
        if idle {
            self.last = Some((now.max(at), total));
            return;
        }
        if passed < STEP {
            return;
        }
        let seconds = passed.as_secs_f64();
        let keeps = (-seconds / MEMORY.as_secs_f64()).exp();
        let speed = total.saturating_sub(before) as f64 / seconds;
        self.faded = (self.faded.0 * keeps + speed * (1.0 - keeps), self.faded.1 * keeps + (1.0 - keeps));
        self.span = self.span.saturating_add(passed);
        self.last = Some((now, total));
    }

    /// Units a second; `None` until two seconds of them were seen.
    pub(super) fn per_second(&self) -> Option<f64> {
        (self.span >= LEAST && self.faded.1 > 0.0).then(|| self.faded.0 / self.faded.1)
    }

    /// Seconds until `left` more units have come; `None` while that is not known, or nearly nothing comes.
    pub(super) fn seconds_for(&self, left: u64) -> Option<f64> {
        let pace = self.per_second()?;
        if left == 0 {
            return Some(0.0);
        }
        Some(left as f64 / pace).filter(|seconds| (0.0..LONGEST).contains(seconds))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn table(bytes: u64, total: u64) -> Table {
        Table { bytes, total, ..Table::default() }
    }

    fn copied(bytes: u64, total: u64) -> Table {
        Table { copied: true, ..table(bytes, total) }
    }

    fn left_of(tables: &[Table], way: Way) -> Left {
        left(tables.iter().copied(), way)
    }

    fn paced(totals: &[(u64, u64)]) -> Pace {
        let start = Instant::now();
        let mut pace = Pace::default();
        for (second, total) in totals {
            pace.observe(start + Duration::from_secs(*second), *total);
        }
        pace
    }

    #[test]
    fn finished_tables_tell_how_much_the_others_print() {
        // Half as much as their size on disk.
        let left = left_of(&[copied(50_000, 100_000), table(0, 100_000)], Way::Direct);
        assert!((50_000..53_000).contains(&left.now) && left.all == left.now, "{left:?}");
        assert_eq!(left_of(&[copied(50_000, 100_000)], Way::Direct).now, 0);
    }

    #[test]
    fn small_tables_at_the_beginning_do_not_decide_for_all() {
        let left = left_of(&[copied(10, 8192), table(0, 1 << 30)], Way::Direct).now;
        assert!(left > 1 << 29, "{left}");
    }

    #[test]
    fn a_table_that_prints_more_than_expected_says_so_for_the_others() {
        let left = left_of(&[table(4000, 1000), table(0, 1000)], Way::Direct).now;
        assert!((3000..=4000).contains(&left), "{left}");
    }

    #[test]
    fn tables_of_unknown_size_do_no_harm() {
        let left = left_of(&[copied(500, 0), table(7, 0), table(0, 1000)], Way::Direct);
        assert_eq!(left.now, 1000);
        assert_eq!(left_of(&[], Way::Direct), Left::default());
    }

    #[test]
    fn an_archive_is_written_and_then_read() {
        let dumped = Table { dumped: true, printed: Some(400), ..table(400, 1000) };
        let left = left_of(&[dumped, Table { printed: Some(600), ..table(200, 1000) }], Way::Dump);
        assert_eq!(left, Left { now: 400, all: 400 + 400 + 600 });
        let restoring = left_of(&[Table { printed: Some(400), ..copied(400, 1000) }, dumped], Way::Restore);
        assert_eq!(restoring, Left { now: 0, all: 0 });
    }

    #[test]
    fn the_pace_is_that_of_the_last_seconds() {
        assert_eq!(paced(&[(0, 0), (1, 100)]).per_second(), None);
        let even = paced(&[(0, 0), (1, 100), (2, 200), (3, 300)]).per_second().unwrap();
        assert!((even - 100.0).abs() < 1e-6, "{even}");
        let history: Vec<_> = (0..=100).map(|s| (s, s * 1000)).chain((101..=200).map(|s| (s, 100_000 + s))).collect();
        assert!(paced(&history).per_second().unwrap() < 20.0);
    }

    #[test]
    fn the_wait_before_the_first_byte_and_what_was_there_before_do_not_count() {
        let pace = paced(&[(0, 0), (500, 0), (501, 1000), (503, 3000)]);
        assert!((pace.seconds_for(2000).unwrap() - 2.0).abs() < 1e-6, "{pace:?}");
        assert_eq!(paced(&[(0, 5000), (10, 5000)]).seconds_for(1), None);
    }

    #[test]
    fn who_has_stopped_gets_no_figure() {
        let history: Vec<_> = [(0, 0), (2, 10)].into_iter().chain((3..2000).map(|s| (s, 10))).collect();
        assert_eq!(paced(&history).seconds_for(1 << 40), None);
        assert_eq!(paced(&history).seconds_for(0), Some(0.0));
    }

    #[test]
    fn a_total_that_shrank_begins_again() {
        let pace = paced(&[(0, 100), (5, 200), (6, 0), (9, 300)]);
        assert!((pace.per_second().unwrap() - 100.0).abs() < 1e-6, "{pace:?}");
    }

    /// A whole copy, second by second, whose rows print `percent` of their size on disk.
    fn estimates(sizes: &[u64], percent: u64, speed: u64) -> Vec<Option<f64>> {
        let printed: Vec<u64> = sizes.iter().map(|size| size * percent / 100).collect();
        let (start, whole) = (Instant::now(), printed.iter().sum::<u64>());
        let mut pace = Pace::default();
        (0..=whole.div_ceil(speed))
            .map(|second| {
                let moved = (second * speed).min(whole);
                let mut rest = moved;
                let tables: Vec<_> = sizes
                    .iter()
                    .zip(&printed)
                    .map(|(total, all)| {
                        let bytes = rest.min(*all);
                        rest -= bytes;
                        Table { copied: bytes == *all, ..table(bytes, *total) }
                    })
                    .collect();
                pace.observe(start + Duration::from_secs(second), moved);
                pace.seconds_for(left_of(&tables, Way::Direct).all)
            })
            .collect()
    }

    proptest! {
        #[test]
        fn an_estimate_is_a_number_of_seconds(
            tables in proptest::collection::vec((any::<bool>(), any::<bool>(), any::<u64>(), any::<u64>(), any::<Option<u64>>()), 0..20),
            totals in proptest::collection::vec((0..100_000u64, any::<u64>()), 0..20),
            way in prop_oneof![Just(Way::Direct), Just(Way::Dump), Just(Way::Restore)],
        ) {
            let tables: Vec<_> = tables
                .into_iter()
                .map(|(copied, dumped, bytes, total, printed)| Table { copied, dumped, bytes, total, printed })
                .collect();
            let left = left_of(&tables, way);
            prop_assert!(left.now <= left.all);
            if let Some(seconds) = paced(&totals).seconds_for(left.all) {
                prop_assert!(seconds.is_finite() && seconds >= 0.0);
            }
        }

        #[test]
        fn it_ends_near_zero_and_is_of_use_on_the_way(
            sizes in proptest::collection::vec(1_000_000..100_000_000u64, 1..12),
            percent in 30..300u64,
        ) {
            let whole: u64 = sizes.iter().map(|size| size * percent / 100).sum();
            let speed = whole / 300;
            let estimates = estimates(&sizes, percent, speed);
            let end = estimates.last().copied().flatten().unwrap();
            prop_assert!(end < 1.0, "{end}");
            // Once the first table told how much it prints, the rest is told within a quarter.
            let first = sizes[0] * percent / 100 / speed + 3;
            for (second, estimate) in estimates.iter().enumerate().skip(usize::try_from(first).unwrap()) {
                let true_rest = (estimates.len() - 1 - second) as f64;
                let estimate = estimate.unwrap();
                let share = sizes[0] as f64 / sizes.iter().sum::<u64>() as f64;
                if share > 0.1 {
                    prop_assert!((estimate - true_rest).abs() <= 0.25 * true_rest + 3.0 + 0.25 * 300.0 * share, "{estimate} at {second} of {}", estimates.len());
                }
            }
        }
    }
}
