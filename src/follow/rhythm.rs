//! When to read the stream.
//!
//! A walsender hands over every change with a system call of its own. A reader that wakes for each of them costs the source
//! more than the decoding does. So while much is on its way we let it pile up in the socket's buffer and take it in gulps;
//! as soon as little comes, every byte is read at once.

use std::time::{Duration, Instant};

/// So many reads in a row that had not to wait mean that more is on its way, …
const STREAK: u32 = 16;
/// … where this long is a wait.
const AT_ONCE: Duration = Duration::from_millis(1);

/// Timers are no finer.
const SHORTEST: Duration = Duration::from_millis(1);
/// At the rate of a backlog a gulp then is some megabytes, about what a socket's buffer holds.
const LONGEST: Duration = Duration::from_millis(16);
/// Changes wait no longer than this for what is not yet a backlog.
const LONGEST_IN_STEP: Duration = Duration::from_millis(4);

/// A gulp below this was not worth the pause, in bytes.
const SMALL: usize = 4 << 10;
/// A gulp beyond this may have kept the source waiting for room, in bytes.
const LARGE: usize = 2 << 20;
/// From this rate on it is a backlog, in bytes a second.
const BACKLOG: f64 = 16e6;

/// The pause before the next read. Pure.
#[derive(Debug, Default)]
pub(super) struct Rhythm {
    pause: Duration,
    streak: u32,
    last: Option<Instant>,
}

impl Rhythm {
    /// So many bytes were read just now; the pause before the next read.
    pub(super) fn read(&mut self, bytes: usize, now: Instant) -> Duration {
        let since = self.last.replace(now).map(|last| now.saturating_duration_since(last));
        let Some(since) = since else { return self.pause };
        if self.pause.is_zero() {
            self.streak = if since < AT_ONCE { self.streak + 1 } else { 0 };
            if self.streak >= STREAK {
                self.pause = SHORTEST;
            }
            return self.pause;
        }
        let rate = bytes as f64 / since.as_secs_f64().max(1e-6);
        let longest = if rate >= BACKLOG { LONGEST } else { LONGEST_IN_STEP };
        self.pause = match bytes {
            ..SMALL => Duration::ZERO,
            LARGE.. => (self.pause / 2).max(SHORTEST),
            _ => (self.pause * 2).min(longest),
        };
        self.streak = 0;
        self.pause
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Reads so many bytes a second, as they come, for a while; the last pause.
    fn follow(rhythm: &mut Rhythm, now: &mut Instant, bytes_a_second: f64, between: Duration) -> Duration {
        let mut pause = Duration::ZERO;
        for _ in 0..200 {
            let passed = pause.max(between);
            *now += passed;
            pause = rhythm.read((bytes_a_second * passed.as_secs_f64()) as usize, *now);
        }
        pause
    }

    #[test]
    fn a_backlog_is_taken_in_gulps_and_a_quiet_stream_is_read_at_once() {
        let (mut rhythm, mut now) = (Rhythm::default(), Instant::now());
        assert_eq!(follow(&mut rhythm, &mut now, 1e4, Duration::from_millis(10)), Duration::ZERO);
        let pause = follow(&mut rhythm, &mut now, 1e8, Duration::from_micros(10));
        assert!(pause >= Duration::from_millis(8), "{pause:?}");
        assert_eq!(follow(&mut rhythm, &mut now, 1e4, Duration::from_millis(10)), Duration::ZERO);
    }

    #[test]
    fn a_busy_stream_that_is_no_backlog_waits_little() {
        let (mut rhythm, mut now) = (Rhythm::default(), Instant::now());
        let pause = follow(&mut rhythm, &mut now, 4e6, Duration::from_micros(100));
        assert!(pause <= LONGEST_IN_STEP, "{pause:?}");
    }
}
