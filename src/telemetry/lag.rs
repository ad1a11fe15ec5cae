//! How far the target is behind the source, in bytes and in seconds.
//!
//! Owns the rule and a short history of where the source's log ended at which time of the source's clock. Pure: no
//! clock is read here. Seconds are a difference of two readings of the source's clock, so a daemon whose clock is
//! wrong shows the same number; they are never negative, and 0 on a source that has nothing new.

use std::collections::VecDeque;

use crate::postgres::Lsn;

/// At one sample a second: an hour and some minutes before old samples are thinned.
const CAPACITY: usize = 4096;

/// The end of the source's log at a moment of the source's clock.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Sample {
    head: Lsn,
    micros: i64,
}

/// Samples of the source's head, oldest first; heads and times both ascend.
#[derive(Clone, Debug, Default)]
pub struct LagHistory {
    samples: VecDeque<Sample>,
}

impl LagHistory {
    /// Adds what the source just said: its head and its clock in microseconds since 1970.
    ///
    /// A head or a clock that went back (a failover, an administrator) makes the samples after it worthless; they
    /// are forgotten.
    pub fn observe(&mut self, head: Lsn, micros: i64) {
        while self.samples.back().is_some_and(|last| last.head > head || last.micros > micros) {
            self.samples.pop_back();
        }
        match self.samples.back_mut() {
            // Nothing was written in between: one sample says it all.
            Some(last) if last.head == head => last.micros = micros,
            _ => self.samples.push_back(Sample { head, micros }),
        }
        if self.samples.len() > CAPACITY {
            self.thin();
        }
    }

    /// The end of the source's log as last seen.
    #[must_use]
    pub fn head(&self) -> Option<Lsn> {
        self.samples.back().map(|sample| sample.head)
    }

    /// Forgets the samples that no later question needs, because progress never goes back.
    pub fn reached(&mut self, progress: Lsn) {
        let passed = self.samples.partition_point(|sample| sample.head <= progress);
        self.samples.drain(..passed.saturating_sub(1));
    }

    /// Bytes of log between `position` and the newest head; `None` before the first sample.
    #[must_use]
    pub fn bytes(&self, position: Lsn) -> Option<u64> {
        self.head().map(|head| head.since(position))
    }

    /// Seconds that the target is behind, `None` while nothing tells.
    ///
    /// The target holds everything that the source had at the newest sample whose head progress has reached, and
    /// everything up to the commit of the last applied transaction: it is as old as the later of the two.
    /// `now_micros` and `commit_micros` are readings of the source's clock.
    #[must_use]
    pub fn seconds(&self, progress: Lsn, commit_micros: Option<i64>, now_micros: i64) -> Option<f64> {
        if progress >= self.head()? {
            return Some(0.0);
        }
        let reached = self.samples.partition_point(|sample| sample.head <= progress);
        let sampled = reached.checked_sub(1).and_then(|at| self.samples.get(at)).map(|sample| sample.micros);
        let as_of = sampled.max(commit_micros)?;
        Some(seconds(now_micros.saturating_sub(as_of)))
    }

    /// Drops every second sample of the older half: the answers for a target that is far behind get coarser and
    /// never smaller, because an older sample stands in for a dropped one.
    fn thin(&mut self) {
        let half = self.samples.len() / 2;
        let mut at = 0;
        self.samples.retain(|_| {
            at += 1;
            at > half || at % 2 == 1
        });
    }
}

/// Microseconds as seconds, 0 if they are negative.
#[must_use]
pub fn seconds(micros: i64) -> f64 {
    // A span of more than 2^53 microseconds (285 years) would lose its last digit.
    micros.max(0) as f64 / 1_000_000.0
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const SECOND: i64 = 1_000_000;

    fn history(samples: &[(u64, i64)]) -> LagHistory {
        let mut history = LagHistory::default();
        for (head, second) in samples {
            history.observe(Lsn::new(*head), second * SECOND);
        }
        history
    }

    #[test]
    fn nothing_is_known_before_the_first_sample() {
        let history = LagHistory::default();
        assert_eq!(history.seconds(Lsn::new(7), Some(1), 2), None);
        assert_eq!(history.bytes(Lsn::new(7)), None);
    }

    #[test]
    fn a_target_at_the_head_has_no_lag_however_old_the_last_commit_is() {
        let history = history(&[(100, 1), (100, 5000)]);
        assert_eq!(history.seconds(Lsn::new(100), Some(SECOND), 5000 * SECOND), Some(0.0));
    }

    #[test]
    fn an_idle_time_before_new_changes_is_not_lag() {
        // Given a source that was idle for an hour and then wrote, when the target has not applied that yet,
        let history = history(&[(100, 1), (100, 3600), (200, 3602)]);
        // then it is as old as the last moment at which it had everything, not as the last commit.
        assert_eq!(history.seconds(Lsn::new(150), Some(SECOND), 3602 * SECOND), Some(2.0));
    }

    #[test]
    fn a_commit_later_than_the_reached_sample_counts() {
        let history = history(&[(100, 1), (200, 10)]);
        assert_eq!(history.seconds(Lsn::new(150), Some(7 * SECOND), 10 * SECOND), Some(3.0));
    }

    #[test]
    fn without_a_commit_and_a_reached_sample_nothing_is_claimed() {
        assert_eq!(history(&[(100, 1), (200, 10)]).seconds(Lsn::new(50), None, 10 * SECOND), None);
    }

    #[test]
    fn a_head_that_went_back_forgets_what_came_after_it() {
        let history = history(&[(100, 1), (300, 2), (200, 3)]);
        assert_eq!(history.head(), Some(Lsn::new(200)));
        assert_eq!(history.bytes(Lsn::new(150)), Some(50));
    }

    proptest! {
        #[test]
        fn seconds_are_never_negative_and_memory_is_bounded(
            samples in prop::collection::vec((0u64..1000, any::<i64>()), 1..200),
            progress in 0u64..1100,
            commit: Option<i64>,
            now: i64,
        ) {
            let mut history = LagHistory::default();
            for (head, micros) in samples {
                history.observe(Lsn::new(head), micros);
            }
            prop_assert!(history.seconds(Lsn::new(progress), commit, now).is_none_or(|s| s >= 0.0));
        }

        #[test]
        fn forgetting_what_was_reached_changes_no_answer(
            steps in prop::collection::vec((0u64..50, 1i64..50), 1..100),
            reached in 0u64..3000,
            beyond in 0u64..3000,
            commit: Option<i64>,
        ) {
            let (mut head, mut micros) = (0, 0);
            let mut full = LagHistory::default();
            for (bytes, time) in steps {
                head += bytes;
                micros += time;
                full.observe(Lsn::new(head), micros);
            }
            let mut pruned = full.clone();
            pruned.reached(Lsn::new(reached));
            let later = Lsn::new(reached + beyond);
            prop_assert_eq!(pruned.seconds(later, commit, micros), full.seconds(later, commit, micros));
        }

        #[test]
        fn a_target_further_on_never_has_more_lag(
            steps in prop::collection::vec((1u64..50, 1i64..50), 1..100),
            progress in 0u64..3000,
            more in 0u64..3000,
        ) {
            let (mut head, mut micros) = (0, 0);
            let mut history = LagHistory::default();
            for (bytes, time) in steps {
                head += bytes;
                micros += time;
                history.observe(Lsn::new(head), micros);
            }
            let here = history.seconds(Lsn::new(progress), Some(0), micros);
            let there = history.seconds(Lsn::new(progress + more), Some(0), micros);
            prop_assert!(there <= here, "{there:?} after {here:?}");
        }

        #[test]
        fn thinning_never_understates(count in CAPACITY as i64..3 * CAPACITY as i64, progress in 0u64..20_000) {
            let mut history = LagHistory::default();
            for second in 0..count {
                history.observe(Lsn::new(second as u64), second * SECOND);
            }
            prop_assert!(history.samples.len() <= CAPACITY);
            let newest = count - 1;
            let exact = seconds((newest - (progress as i64).min(newest)) * SECOND);
            prop_assert!(history.seconds(Lsn::new(progress), None, newest * SECOND).is_some_and(|s| s >= exact));
        }
    }
}
