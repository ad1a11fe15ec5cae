//! Applies one transaction while it is in progress on the source, in a target transaction of its own, so that its commit finds
//! it applied.
//!
//! # Why that is the same
//!
//! The stream brings a part of a transaction in progress once everything that the part itself could see is behind it: what
//! committed before one of its changes was sent before. So a part is begun only when all that came before it is committed on
//! the target, and each of its statements sees what it would see if it came last.
//!
//! What comes between a part and the commit belongs to others. On the source they ran beside it and did not wait for it, so they
//! touch no row that it touched, no key that it put in or took away, and no table that it emptied or whose shape it changed; where they meet here, the order does not count.
//!
//! With its commit, progress is written in the same target transaction, after all that committed before: it is the next batch, of
//! which everything is on the target already. Exactly once holds for it as for any other. Until then nobody sees it.
//!
//! # Where it is given up
//!
//! The transaction is also kept ([`super::streamed`]), while there is room; where there is not, the source is asked for it again. Whenever something is not as it should be, what was applied early is rolled
//! back, and the transaction is applied from there, once it has committed, as if nothing had been. So nothing here has to mend
//! anything. It is given up
//!
//! - at an error, a row that is not found, or another number of rows than there should be;
//! - when a part of it is rolled back: the locks that this gave up on the source must go here, too;
//! - for a TRUNCATE or a schema change of its own, and for another one's schema change: they want locks of whole tables;
//! - for a table whose triggers or rules fire for us: they would notice the order;
//! - for updates and deletes without a key: rows that look alike are not the same row on both sides, so others may wait for it;
//! - for a table whose cut is not passed yet: whether a row is in the copy depends on the commit;
//! - when it waits for a lock for three seconds, or others may be waiting for it so long ([`PATIENCE`]): the target may have locks that the
//!   source has not, such as those of an index or of a user of its own;
//! - when the gate closes.

use std::future::pending;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use tokio::sync::oneshot;

use super::announced::{Announced, Row};
use super::apply::{Applier, Batch};
use super::change::{Change, Operation, Position};
use super::executor::{End, Work};
use super::executors::Executors;
use super::lane::Lane;
use super::lanes::Lanes;
use super::relation::Finder;
use crate::error::{Class, Error, Result};
use crate::postgres::Lsn;
use crate::postgres::pgoutput::Message;
use crate::telemetry::BatchApplied;

/// So much goes to the target at once, in bytes; less where nothing more waits.
const PIECE: u64 = 4 << 20;

/// So much is collected at most while the target is busy, in bytes.
const MOST: u64 = 8 << 20;

/// A batch that takes so long may be waiting for what was applied early.
const PATIENCE: Duration = Duration::from_secs(3);

/// After so many errors, or waits of others, nothing more is tried until the stream is opened again.
const TRIES: u32 = 3;

/// What the stream says of the transaction that is applied early.
#[derive(Debug)]
pub(super) enum Part {
    /// A block of its changes begins at this position, and perhaps all of it.
    Block { at: Lsn, begins: Option<Begins> },
    /// What a block holds.
    Message(Message),
    /// It was rolled back, or a part of it was.
    RolledBack,
    /// It commits at this position. The answer says whether all of it is on the target, and open there.
    Commits { commit_lsn: Lsn, applied: oneshot::Sender<bool> },
}

/// The next transaction that is to be applied early.
#[derive(Debug)]
pub(super) struct Begins {
    pub xid: u32,
    /// Is set once it is given up: nothing more of it needs to come.
    pub given_up: Arc<AtomicBool>,
}

/// See the module's first lines.
pub(super) struct Early {
    executors: Executors,
    /// Its connection, once it was needed.
    lane: Option<Lane>,
    open: Option<Open>,
    errors: u32,
}

/// The transaction in progress.
struct Open {
    at: Position,
    given_up: Arc<AtomicBool>,
    /// What it announced: outside of it, that counts only once it has committed.
    announced: Announced,
    changes: Vec<Change>,
    bytes: u64,
    applied: BatchApplied,
}

impl Early {
    pub(super) fn new(executors: Executors) -> Self {
        Self { executors, lane: None, open: None, errors: 0 }
    }

    pub(super) fn is_open(&self) -> bool {
        self.open.is_some()
    }

    /// Whether more of it can be collected.
    pub(super) fn has_room(&self) -> bool {
        self.open.as_ref().is_none_or(|open| open.bytes < MOST)
    }

    /// Gives to the target what was collected, if it is free and that is enough, or nothing more waits.
    pub(super) fn go_on(&mut self, nothing_waits: bool) -> Result<()> {
        let (Some(open), Some(lane)) = (&mut self.open, &mut self.lane) else { return Ok(()) };
        if open.changes.is_empty() || !lane.is_free() || !nothing_waits && open.bytes < PIECE {
            return Ok(());
        }
        open.bytes = 0;
        lane.start(Work { changes: std::mem::take(&mut open.changes), early: true, ..Work::default() })
    }

    pub(super) fn is_free(&self) -> bool {
        self.lane.as_ref().is_none_or(Lane::is_free)
    }

    /// Waits for what runs. Never, if nothing runs. Cancellation safe.
    pub(super) async fn finished(&mut self) -> Result<Option<End>> {
        match &mut self.lane {
            Some(lane) => lane.finished().await,
            None => pending().await,
        }
    }

    /// When a batch will have taken so long that it may be waiting for us.
    pub(super) fn in_the_way(&self, lanes: &Lanes) -> Option<Instant> {
        lanes.busy_since().filter(|_| self.is_open()).map(|since| since + PATIENCE)
    }

    /// The connection, opened if there is none.
    async fn lane(&mut self) -> Result<&mut Lane> {
        let lane = match self.lane.take() {
            Some(lane) => lane,
            None => Lane::new(self.executors.open(0).await?),
        };
        Ok(self.lane.insert(lane))
    }

    /// Following ends. A session that waits for something would not notice, and keep its locks.
    pub(super) async fn end(&mut self) {
        self.open = None;
        if let Some(lane) = self.lane.take().filter(|lane| !lane.is_free()) {
            self.executors.end(&[lane.process_id()]).await;
        }
    }

    /// Makes the plan of one of its relations, over its connection, which is free.
    async fn plan(&mut self, relation: u32, generation: u64) -> Result<()> {
        let (Some(open), Some(lane)) = (&mut self.open, &mut self.lane) else { return Ok(()) };
        open.announced.plan(relation, &mut lane.executor()?.pipeline, generation).await.map(drop)
    }

    async fn give_up(&mut self, why: &str) {
        let Some(open) = self.open.take() else { return };
        open.given_up.store(true, Ordering::Relaxed);
        tracing::debug!(xid = open.at.xid, why, "a transaction in progress is applied once it has committed");
        let Some(lane) = &mut self.lane else { return };
        let rolled_back = tokio::time::timeout(PATIENCE, async {
            if !lane.is_free() {
                lane.finished().await?;
            }
            lane.executor()?.roll_back().await
        });
        if !matches!(rolled_back.await, Ok(Ok(()))) {
            let process_id = lane.process_id();
            self.lane = None;
            self.executors.end(&[process_id]).await;
        }
    }
}

impl Applier {
    /// Takes what the stream says of the transaction that is applied early.
    pub(super) async fn early(&mut self, part: Part) -> Result<()> {
        match part {
            Part::Block { at, begins } => {
                if let Some(Begins { xid, given_up }) = begins {
                    self.begin_early(xid, given_up).await;
                }
                self.block_early(at).await?;
            }
            Part::Message(message) => self.message_early(message).await?,
            Part::RolledBack => self.give_up_early("a part of it was rolled back").await,
            Part::Commits { applied, .. } => {
                let is_applied = self.adopt_early().await?;
                // The reader may be gone; then following ends, and all of it comes again.
                let _sent = applied.send(is_applied);
            }
        }
        Ok(())
    }

    /// Rolls back what was applied early. Where nothing was, nothing happens.
    pub(super) async fn give_up_early(&mut self, why: &str) {
        self.early.give_up(why).await;
    }

    /// The connection finished what it was given.
    pub(super) async fn early_finished(&mut self, outcome: Result<Option<End>>) {
        if let Err(error) = outcome {
            self.early_failed(&error).await;
        }
    }

    /// A batch takes so long that it may be waiting for it.
    pub(super) async fn early_in_the_way(&mut self) {
        self.early.errors += 1;
        self.give_up_early("others may be waiting for it").await;
    }

    async fn early_failed(&mut self, error: &Error) {
        self.early.errors += 1;
        self.give_up_early(&error.to_string()).await;
    }

    async fn begin_early(&mut self, xid: u32, given_up: Arc<AtomicBool>) {
        self.give_up_early("the next one begins").await;
        if self.ahead.is_some() || !self.gate.is_open() || self.early.errors >= TRIES {
            return given_up.store(true, Ordering::Relaxed);
        }
        self.early.open = Some(Open {
            at: Position { commit_lsn: Lsn::ZERO, xid },
            given_up,
            announced: Announced::default(),
            changes: Vec::new(),
            bytes: 0,
            applied: BatchApplied::default(),
        });
        if let Err(error) = self.early.lane().await {
            self.early_failed(&error).await;
        }
    }

    /// What came before is committed before anything of the block is applied.
    async fn block_early(&mut self, at: Lsn) -> Result<()> {
        if self.early.is_open() && !self.commit_collected().await? {
            self.give_up_early("nothing may be begun").await;
        }
        if let Some(open) = &mut self.early.open {
            // Of its commit it is known only that it lies beyond.
            open.at.commit_lsn = at;
        }
        Ok(())
    }

    async fn message_early(&mut self, message: Message) -> Result<()> {
        let Some(open) = &mut self.early.open else { return Ok(()) };
        let why = match message {
            Message::Relation(relation) if relation.name == self.settings.capture => "it changes the schema",
            Message::Relation(relation) => match self.settings.cuts.get(&relation.name).copied() {
                // The message itself has no position.
                Some(cut) if open.at.commit_lsn < cut => "the cut of one of its tables is not passed yet",
                // Whatever it does with the table, it commits behind its cut.
                _ => {
                    open.announced.announce(relation, None);
                    return Ok(());
                }
            },
            Message::Type { oid, name } => {
                open.announced.name_type(oid, name);
                return Ok(());
            }
            Message::Insert { relation, .. } | Message::Update { relation, .. } | Message::Delete { relation, .. } => {
                return self.row_early(relation, message).await;
            }
            Message::Origin { .. } | Message::Logical { .. } => return Ok(()),
            Message::Truncate { .. } => "it empties a table",
            _ => "it holds what no block holds",
        };
        self.give_up_early(why).await;
        Ok(())
    }

    /// # Errors
    /// Those of batches that end meanwhile. With an error of its own it is given up.
    async fn row_early(&mut self, relation: u32, mut message: Message) -> Result<()> {
        loop {
            let Some(open) = &mut self.early.open else { return Ok(()) };
            match open.announced.row(relation, open.at, message) {
                Ok(Row::Change(change)) => {
                    self.collect_early(change).await;
                    return Ok(());
                }
                Ok(Row::Unplanned(unplanned)) => message = unplanned,
                Ok(Row::Copied) => {
                    self.early_failed(&Error::bug("a row is in a copy though its table has no cut")).await;
                    return Ok(());
                }
                Err(error) => {
                    self.early_failed(&error).await;
                    return Ok(());
                }
            }
            self.free_early().await?;
            let generation = self.next_generation();
            if let Err(error) = self.early.plan(relation, generation).await {
                self.early_failed(&error).await;
            }
        }
    }

    async fn collect_early(&mut self, change: Change) {
        if change.plan.observed {
            self.give_up_early("something on the target reacts to its rows").await;
        } else if matches!(change.plan.finder, Finder::WholeRow) && change.operation() != Operation::Insert {
            self.give_up_early("it changes rows that have no key").await;
        }
        let Some(open) = &mut self.early.open else { return };
        change.operation().count(&mut open.applied);
        open.bytes += change.bytes() as u64;
        open.changes.push(change);
    }

    /// Waits until the target has done what it was given of it. Batches go on meanwhile: it may be waiting for one.
    async fn free_early(&mut self) -> Result<()> {
        while !self.early.is_free() {
            tokio::select! {
                biased;
                finished = self.lane.finished() => self.finished(finished?)?,
                outcome = self.early.finished() => self.early_finished(outcome).await,
            }
        }
        Ok(())
    }

    /// Makes what was applied early the batch that is open on the target; whether all of it is there.
    async fn adopt_early(&mut self) -> Result<bool> {
        if self.early.is_open() && !self.commit_collected().await? {
            self.give_up_early("nothing may be begun").await;
        }
        // What was running, then what is left of it. Nothing else runs now, so it is in nobody's way.
        for _ in 0..2 {
            self.free_early().await?;
            self.early.go_on(true)?;
        }
        self.free_early().await?;
        let Some(lane) = self.early.lane.as_mut().filter(|_| self.early.open.is_some()) else { return Ok(false) };
        let progress = match lane.executor()?.adopt().await {
            Ok(progress) => progress,
            Err(error) => {
                self.early_failed(&error).await;
                return Ok(false);
            }
        };
        // Its session may have begun after a crash of the target that took back what the other one committed.
        if progress != self.written() {
            return Err(Error::new(
                Class::Retry,
                "progress_went_back",
                format!("progress on the target is {progress}, and {} was committed", self.written()),
            ));
        }
        self.lane.executor()?;
        let (Some(open), Some(lane)) = (self.early.open.take(), self.early.lane.take()) else { return Ok(false) };
        self.early.lane = Some(self.lane.replace_first(lane));
        self.batch = Some(Batch::applied_early(open.applied));
        Ok(true)
    }
}
