//! When the WAL that the source keeps for the slot becomes a risk, and how long that takes. Pure: the caller brings the time.
//!
//! Two dangers, by what the source is told. With `max_slot_wal_keep_size` it gives the slot up at that limit, and the move
//! is lost; how far that is it says itself (`safe_wal_size`). Without it the disk is the limit. How much room that has cannot be
//! asked by SQL, so what is kept is held against what is known: the size of the tables that move. Each step towards trouble
//! is news once, however often it is looked at; a step that is left far behind may become news again.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

use super::SourceSample;
use super::status::Problem;
use super::text::{bytes, duration};

/// Growth is that of this time.
const WINDOW: Duration = Duration::from_secs(120);
/// Growth over less than this is noise.
const LEAST: Duration = Duration::from_secs(3);
/// Below this, WAL is no trouble for any disk that holds a database.
const LITTLE: u64 = 1 << 30;

/// What was seen of the slot's WAL.
#[derive(Clone, Debug, Default)]
pub(super) struct Watch {
    kept: VecDeque<(Instant, u64)>,
    limit: Option<u64>,
    risk: Option<Problem>,
    step: u32,
    /// The highest step that was said.
    said: u32,
}

impl Watch {
    /// The slot is like this now; `data` is the size of the tables that move.
    pub(super) fn observe(&mut self, now: Instant, sample: &SourceSample, data: u64) {
        let Some(kept) = sample.retained_wal_bytes else {
            *self = Self::default();
            return;
        };
        self.remember(now, kept);
        let risk = match (sample.wal_limit_bytes, sample.safe_wal_bytes) {
            (Some(limit), safe) => self.limited(sample, kept, limit, safe),
            (None, _) => self.unlimited(sample, kept, data.max(LITTLE)),
        };
        if std::mem::replace(&mut self.limit, sample.wal_limit_bytes) != sample.wal_limit_bytes {
            self.said = self.said.min(risk.step);
        }
        if risk.is_far {
            self.said = 0;
        }
        self.step = risk.step;
        self.risk = risk.problem;
    }

    /// What is a risk now.
    pub(super) fn risk(&self) -> Option<&Problem> {
        self.risk.as_ref()
    }

    /// The risk, if it reached a step that was not said yet.
    pub(super) fn news(&mut self) -> Option<Problem> {
        let risk = self.risk.clone().filter(|_| self.step > self.said)?;
        self.said = self.step;
        Some(risk)
    }

    fn remember(&mut self, now: Instant, kept: u64) {
        while self.kept.front().is_some_and(|(at, _)| now.saturating_duration_since(*at) > WINDOW) {
            self.kept.pop_front();
        }
        self.kept.push_back((now, kept));
    }

    /// Bytes a second by which more is kept; `None` unless it grows.
    fn growth(&self) -> Option<f64> {
        let ((first_at, first), (last_at, last)) = (self.kept.front()?, self.kept.back()?);
        let span = last_at.saturating_duration_since(*first_at);
        let grown = last.checked_sub(*first).filter(|grown| *grown > 0)?;
        (span >= LEAST).then(|| grown as f64 / span.as_secs_f64())
    }

    fn limited(&self, sample: &SourceSample, kept: u64, limit: u64, safe: Option<i64>) -> Risk {
        let lost = sample.wal_status.as_deref() == Some("lost");
        // A slot that is lost is a blocker; nothing is left to warn of.
        let Some(safe) = safe.filter(|_| !lost).map(|safe| u64::try_from(safe).unwrap_or(0)) else {
            return Risk::default();
        };
        let unreserved = sample.wal_status.as_deref() == Some("unreserved");
        let step = match safe {
            _ if unreserved => 4,
            safe if safe < limit / 10 => 3,
            safe if safe < limit / 4 => 2,
            safe if safe < limit / 2 => 1,
            _ => return Risk { is_far: safe > limit / 4 * 3, ..Risk::default() },
        };
        let when = match self.growth() {
            _ if unreserved => "; the next checkpoint may take it".to_owned(),
            Some(speed) => format!("; at the present rate in about {}", duration(safe as f64 / speed)),
            None => String::new(),
        };
        Risk::of(
            step,
            Problem {
                code: "wal_running_out".to_owned(),
                message: format!(
                    "the source gives up the slot {} after {} more of WAL, and with it this move{when}: \
                     max_slot_wal_keep_size is {}, and {} are kept",
                    sample.slot,
                    bytes(safe),
                    bytes(limit),
                    bytes(kept)
                ),
                hint: Some(
                    "raise max_slot_wal_keep_size on the source if its disk has room (ALTER SYSTEM SET \
                     max_slot_wal_keep_size = '…'; SELECT pg_reload_conf();), receive the changes into a folder meanwhile \
                     (follow.spool), or have less written there until the move follows"
                        .to_owned(),
                ),
            },
        )
    }

    fn unlimited(&self, sample: &SourceSample, kept: u64, bound: u64) -> Risk {
        if kept < bound {
            return Risk { is_far: kept < bound / 2, ..Risk::default() };
        }
        // 1 from the bound on, and one more with each doubling.
        let step = (kept / bound).ilog2() + 1;
        let speed = self.growth().map(|speed| format!(", {} more a minute", bytes((speed * 60.0) as u64)));
        Risk::of(
            step,
            Problem {
                code: "wal_piling_up".to_owned(),
                message: format!(
                    "the source keeps {} of WAL for the slot {}{}; the tables that move are no larger than {}, and nothing \
                     limits it but the disk",
                    bytes(kept),
                    sample.slot,
                    speed.unwrap_or_default(),
                    bytes(bound)
                ),
                hint: Some(
                    "look at the free space of the source's disk; make it larger, receive the changes into a folder meanwhile \
                     (follow.spool), copy fewer tables (move.exclude), or set max_slot_wal_keep_size to what the disk can take, \
                     so that the move is lost and not the server"
                        .to_owned(),
                ),
            },
        )
    }
}

#[derive(Default)]
struct Risk {
    step: u32,
    problem: Option<Problem>,
    /// So far from the first step that the next time there is news again.
    is_far: bool,
}

impl Risk {
    fn of(step: u32, problem: Problem) -> Self {
        Self { step, problem: Some(problem), is_far: false }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const GIB: u64 = 1 << 30;

    fn slot(kept: u64, limit: Option<u64>, status: &str) -> SourceSample {
        SourceSample {
            slot: "pgtandem_app".into(),
            retained_wal_bytes: Some(kept),
            safe_wal_bytes: limit.map(|limit| limit as i64 - kept as i64),
            wal_limit_bytes: limit,
            wal_status: Some(status.into()),
            ..SourceSample::default()
        }
    }

    /// What is news when so much is kept, sample after sample, one a second.
    fn news(samples: impl IntoIterator<Item = SourceSample>, data: u64) -> Vec<String> {
        let (start, mut watch) = (Instant::now(), Watch::default());
        let mut all = Vec::new();
        for (second, sample) in samples.into_iter().enumerate() {
            watch.observe(start + Duration::from_secs(second as u64), &sample, data);
            all.extend(watch.news().map(|problem| problem.message));
            assert_eq!(watch.news(), None);
        }
        all
    }

    fn limited(kept: impl IntoIterator<Item = u64>) -> Vec<String> {
        news(kept.into_iter().map(|kept| slot(kept * GIB, Some(100 * GIB), "extended")), 0)
    }

    #[test]
    fn each_step_towards_the_limit_is_said_once_with_the_time_that_is_left() {
        let said = limited((0..100).chain([99, 98, 99]));
        assert_eq!(said.len(), 3, "{said:#?}");
        assert!(said[0].contains("after 49.0 GiB more of WAL") && said[0].contains("in about 49.0 s"), "{}", said[0]);
        assert!(said[1].contains("after 24.0 GiB more") && said[2].contains("after 9.0 GiB more"), "{said:#?}");
    }

    #[test]
    fn what_was_overcome_may_come_again_and_a_step_that_shakes_may_not() {
        assert_eq!(limited([60, 45, 60, 45, 60]).len(), 1);
        assert_eq!(limited([60, 10, 60]).len(), 2);
    }

    #[test]
    fn a_limit_that_was_raised_is_a_new_beginning() {
        let said = news(
            [
                slot(80 * GIB, Some(100 * GIB), "extended"),
                slot(80 * GIB, Some(120 * GIB), "extended"),
                slot(95 * GIB, Some(120 * GIB), "extended"),
            ],
            0,
        );
        assert_eq!(said.len(), 2, "{said:#?}");
    }

    #[test]
    fn what_the_next_checkpoint_may_take_is_said_and_what_is_lost_is_not() {
        let said = news([slot(99 * GIB, Some(100 * GIB), "unreserved"), slot(100 * GIB, Some(100 * GIB), "lost")], 0);
        assert!(said.len() == 1 && said[0].contains("the next checkpoint may take it"), "{said:#?}");
    }

    #[test]
    fn without_a_limit_the_size_of_the_tables_and_its_doublings_count() {
        let said = news((0..=100).map(|kept| slot(kept * GIB, None, "extended")), 10 * GIB);
        let at: Vec<_> = said.iter().map(|message| message.split(" of WAL").next().unwrap_or_default()).collect();
        assert_eq!(at, ["10.0", "20.0", "40.0", "80.0"].map(|size| format!("the source keeps {size} GiB")));
        assert!(said[0].contains("60.0 GiB more a minute"), "{}", said[0]);
        assert_eq!(news([slot(GIB - 1, None, "extended")], 0), [""; 0]);
    }

    #[test]
    fn a_slot_that_catches_up_has_no_time_left_to_tell() {
        let said = limited([99, 80, 70, 60]);
        assert!(said.len() == 1 && !said[0].contains("present rate"), "{said:#?}");
    }

    proptest! {
        #[test]
        fn no_sample_is_too_strange(samples in proptest::collection::vec((any::<Option<u64>>(), any::<Option<i64>>(), any::<Option<u64>>(), any::<u64>()), 0..30)) {
            let (start, mut watch) = (Instant::now(), Watch::default());
            for (second, (kept, safe, limit, data)) in samples.into_iter().enumerate() {
                let sample = SourceSample { retained_wal_bytes: kept, safe_wal_bytes: safe, wal_limit_bytes: limit, ..SourceSample::default() };
                watch.observe(start + Duration::from_secs(second as u64), &sample, data);
                watch.news();
            }
        }
    }
}
