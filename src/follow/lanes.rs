//! The connections to the target: one for each worker.
//!
//! What is to be done goes to the first worker, or is divided among all of them ([`super::shares`]). Either way one piece runs at a
//! time, and the next one is begun only when all of it is committed.
//!
//! # Exactly once, with several workers
//!
//! Each worker applies its share in a target transaction of its own. Once all of them have, each worker beside the first commits,
//! with its own progress; then the first commits, with the progress of the move.
//!
//! - A death before the first of these commits, or a change that cannot be applied: nothing of the batch is there.
//! - A death after some: the workers' progress tells whose shares are there, and how they were dealt. The next run gets the batch
//!   again and leaves out those shares ([`Ahead`](super::shares::Ahead)).
//! - After the last: progress is at the end of the batch, and no worker is ahead of it.
//!
//! The commits of the others never wait for the target's disk: the first worker's comes after them in the target's log, so
//! where it is durable, they are; and a crash of the target that takes back one of them takes back the first worker's too.
//!
//! Between the first of these commits and the last a reader of the target may see a part of a transaction, and after a death there
//! until the next run has got the batch again. Whenever nothing runs, it sees a state that the source once had: a
//! cutover's marker, a schema change, and whatever else needs it, waits for that.
//!
//! No worker can wait for a lock of another one: they share no row, and no value of a unique index. Were one to wait all the
//! same, it gives up after a while, and the batch is applied again by the first worker alone.

use std::future::poll_fn;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Instant;

use super::executor::{End, Executor, Work};
use super::lane::Lane;
use super::shares::Division;
use crate::error::Result;

/// See the module's first lines.
pub(super) struct Lanes {
    first: Lane,
    beside: Vec<Lane>,
    divided: Option<Divided>,
    /// When work was last started.
    since: Instant,
}

/// A batch that was divided.
struct Divided {
    end: End,
    division: Arc<Division>,
    stage: Stage,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Stage {
    /// All workers apply their shares.
    Apply,
    /// The workers beside the first commit.
    Commit,
}

impl Lanes {
    pub(super) fn new(first: Executor, beside: Vec<Executor>) -> Self {
        let beside = beside.into_iter().map(Lane::new).collect();
        Self { first: Lane::new(first), beside, divided: None, since: Instant::now() }
    }

    /// Whether work can be started, and the first worker's executor be had.
    pub(super) fn is_free(&self) -> bool {
        self.divided.is_none() && self.first.is_free()
    }

    /// Since when something runs.
    pub(super) fn busy_since(&self) -> Option<Instant> {
        (!self.is_free()).then_some(self.since)
    }

    /// Puts another worker in the place of the first one, which must be free, and gives that back.
    pub(super) fn replace_first(&mut self, worker: Lane) -> Lane {
        std::mem::replace(&mut self.first, worker)
    }

    /// Starts the work on the first worker. It goes on only while [`Lanes::finished`] is awaited.
    ///
    /// # Errors
    /// Class bug: something runs, or something failed.
    pub(super) fn start(&mut self, work: Work) -> Result<()> {
        self.since = Instant::now();
        self.first.start(work)
    }

    /// Starts a whole batch, divided among all workers where that is worth it.
    ///
    /// # Errors
    /// Class bug: something runs, or something failed.
    pub(super) fn start_divided(&mut self, work: Work) -> Result<()> {
        let workers = u16::try_from(self.beside.len() + 1).unwrap_or(u16::MAX);
        let (Some(end), Some(division)) = (work.end, Division::of(&work.changes, workers)) else {
            return self.start(work);
        };
        let mut shares = division.deal(work.changes);
        let mut busy = shares.iter_mut().filter(|share| !share.is_empty());
        if let (Some(only), None) = (busy.next(), busy.next()) {
            return self.start(Work { changes: std::mem::take(only), end: Some(end), ..Work::default() });
        }
        self.since = Instant::now();
        let division = Arc::new(division);
        let mut shares = shares.into_iter();
        let share = |changes| Work { changes, division: Some(Arc::clone(&division)), ..Work::default() };
        self.first.start(share(shares.next().unwrap_or_default()))?;
        for (lane, changes) in self.beside.iter_mut().zip(shares).filter(|(_, changes)| !changes.is_empty()) {
            lane.start(share(changes))?;
        }
        self.divided = Some(Divided { end, division, stage: Stage::Apply });
        Ok(())
    }

    /// Waits for what runs; the end that was committed, if it had one. Never, if nothing runs. Cancellation safe: what runs goes
    /// on with the next call.
    ///
    /// # Errors
    /// Those of the work. The connections then are good for nothing any more.
    pub(super) async fn finished(&mut self) -> Result<Option<End>> {
        while let Some(Divided { end, division, stage }) = &self.divided {
            let (end, division, stage) = (*end, Arc::clone(division), *stage);
            poll_fn(|context| self.poll_all(context)).await?;
            self.next_stage(end, division, stage)?;
        }
        self.first.finished().await
    }

    /// Every worker is done with its part.
    fn next_stage(&mut self, end: End, division: Arc<Division>, stage: Stage) -> Result<()> {
        if stage == Stage::Commit {
            self.divided = None;
            return self.first.start(Work { end: Some(end), ..Work::default() });
        }
        for lane in &mut self.beside {
            if lane.executor()?.open.is_some() {
                let end = Some(End { durable: false, ..end });
                lane.start(Work { end, division: Some(Arc::clone(&division)), ..Work::default() })?;
            }
        }
        self.divided = Some(Divided { end, division, stage: Stage::Commit });
        Ok(())
    }

    /// Once nothing runs any more.
    fn poll_all(&mut self, context: &mut Context<'_>) -> Poll<Result<()>> {
        let mut waits = false;
        for lane in self.beside.iter_mut().chain([&mut self.first]).filter(|lane| !lane.is_free()) {
            match lane.poll_finished(context) {
                Poll::Ready(outcome) => drop(outcome?),
                Poll::Pending => waits = true,
            }
        }
        if waits { Poll::Pending } else { Poll::Ready(Ok(())) }
    }

    /// The first worker's executor, which must be free.
    ///
    /// # Errors
    /// Class bug: something runs, or something failed.
    pub(super) fn executor(&mut self) -> Result<&mut Executor> {
        self.first.executor()
    }
}
