//! What keeps the target's processors busy: an index is built with as many of them as are left.
//!
//! More processes than processors do not build an index sooner: each sorts its part into files, where one that is alone sorts in memory, and
//! all wait for each other.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// Counts what is in work. Clones count together.
#[derive(Clone, Debug, Default)]
pub(super) struct Processors(Arc<Mutex<Counts>>);

#[derive(Debug, Default)]
struct Counts {
    /// How many the target seems to have.
    all: Option<usize>,
    busy: usize,
}

/// Some processors have work until this is dropped.
#[derive(Debug)]
pub(super) struct Busy {
    of: Processors,
    count: usize,
}

/// No index is built by more processes than this one and its own.
const MOST_WORKERS: usize = 4;

/// Shared buffers of a server that nobody told how large it is, in bytes.
const UNTOLD: u64 = 128 << 20;

/// Where shared buffers are a quarter of the memory, and a processor has 4 GiB of it, in bytes.
const SHARED_BUFFERS_A_PROCESSOR: u64 = 1 << 30;

impl Processors {
    /// Tells how large the server's shared buffers are, in bytes. It does not say how many processors it has.
    pub(super) fn guess(&self, shared_buffers: u64) {
        let guessed = usize::try_from(shared_buffers / SHARED_BUFFERS_A_PROCESSOR).unwrap_or(usize::MAX).max(2);
        self.counts().all = (shared_buffers > UNTOLD).then_some(guessed);
    }

    /// One process works.
    pub(super) fn one(&self) -> Busy {
        self.counts().busy += 1;
        Busy { of: self.clone(), count: 1 }
    }

    /// One process works with so many parallel workers; `None` if nothing is known of the server.
    pub(super) fn one_with_workers(&self) -> (Busy, Option<usize>) {
        let mut counts = self.counts();
        let busy = counts.busy + 1;
        let workers = counts.all.map(|all| all.saturating_sub(busy).min(MOST_WORKERS));
        let count = 1 + workers.unwrap_or(0);
        counts.busy += count;
        (Busy { of: self.clone(), count }, workers)
    }

    fn counts(&self) -> MutexGuard<'_, Counts> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Busy {
    fn drop(&mut self) {
        self.of.counts().busy -= self.count;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_index_takes_the_processors_that_are_left() {
        let small = Processors::default();
        small.guess(512 << 20);
        let copying = [small.one(), small.one()];
        assert_eq!(small.one_with_workers().1, Some(0));
        drop(copying);
        // Nobody else works any more: the first one takes the second processor, too.
        let (last, workers) = small.one_with_workers();
        assert_eq!(workers, Some(1));
        assert_eq!(small.one_with_workers().1, Some(0));
        drop(last);
        assert_eq!(small.counts().busy, 0);

        let large = Processors::default();
        large.guess(8 << 30);
        let _copying = [large.one(), large.one(), large.one(), large.one()];
        assert_eq!(large.one_with_workers().1, Some(3));
        large.guess(64 << 30);
        assert_eq!(large.one_with_workers().1, Some(4));
    }

    #[test]
    fn of_a_server_with_the_defaults_nothing_is_known() {
        let untold = Processors::default();
        assert_eq!(untold.one_with_workers().1, None);
        untold.guess(128 << 20);
        assert_eq!(untold.one_with_workers().1, None);
    }
}
