//! The applying end: source transactions in, target transactions out, progress in each of them.
//!
//! # Exactly once
//!
//! A batch is one target transaction: `BEGIN`, the changes of one or more whole source transactions in their order,
//! `UPDATE pgtandem.progress`, `COMMIT`. A death at any point leaves either all of it or nothing: with nothing, the next
//! start asks the source for everything after the old progress; with all of it, for everything after the new one. The
//! server sends a transaction if its commit record begins at or after the asked position, and progress is the position
//! *after* the commit record of the last applied one, so none is sent twice and none is left out.
//!
//! If the answer to COMMIT is lost, the next start reads progress from the target and so learns which of the two it was.
//!
//! Progress is advanced only `WHERE epoch = ours` (see [`crate::state::Leadership`]): a daemon that lost the move without
//! knowing finds no row, and rolls back.
//!
//! # What a crash of the target takes back
//!
//! While a backlog is worked off, most commits do not wait until the target's log is on its disk (`synchronous_commit = off`). A
//! crash of the target then takes back the last of them, in the reverse order of their commits, and each takes its progress
//! back with it: the next start goes on from there. The source still has what comes after, because only a commit that waited
//! is told to it: such a one comes at least twice a second, and whenever nothing more waits. With it everything before it is
//! durable, on a synchronous standby too, where the target has one.
//!
//! # Before the newest cut
//!
//! A table that was copied under a cut has every transaction that committed before the cut; the applier skips
//! exactly those. Until progress has passed the newest cut of all tables, the target is no state that the
//! source ever had; afterwards it always is.

use std::collections::HashMap;
use std::time::{Duration, Instant};

use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use super::announced::Announced;
use super::change::{Change, Position};
use super::ddl::{Moved, SchemaChanges};
use super::early::{Early, Part};
use super::executor::{End, Work};
use super::lanes::Lanes;
use super::pipeline::Pipeline;
use super::queue::Receiver;
use super::reader::Delivery;
use super::shares::Ahead;
use super::{Durable, Gate, IDLE_PROGRESS_EVERY, MarkerWatch, Settings};
use crate::error::{Class, Doing, Error, Result};
use crate::postgres::pgoutput::Message;
use crate::postgres::{Lsn, QualifiedName};
use crate::state::Store;
use crate::telemetry::{BatchApplied, Telemetry};

/// While more is on its way, a commit does not wait for the target's disk, but one in this time does, and everything before it
/// is durable with it.
const DURABLE_EVERY: Duration = Duration::from_millis(500);

/// See the module's first lines.
pub(super) struct Applier {
    pub settings: Settings,
    pub lane: Lanes,
    /// Applies one transaction that has not committed on the source yet.
    pub early: Early,
    /// What is on the target already beyond progress, until progress has passed it.
    pub ahead: Option<Ahead>,
    /// To say what became of a schema change whose batch is given up.
    pub store: Store,
    pub schema: SchemaChanges,
    pub moved: Moved,
    pub queue: Receiver<Vec<Delivery>>,
    pub durable: watch::Sender<Durable>,
    pub marker: MarkerWatch,
    pub gate: Gate,
    pub telemetry: Telemetry,
    /// The commit of the newest transaction that was begun.
    pub reached: watch::Sender<Lsn>,
    /// What the stream said of relations and types.
    pub announced: Announced,
    pub generations: u64,
    pub transaction: Option<Position>,
    pub batch: Option<Batch>,
    /// The newest position known to hold nothing to apply, not yet written down.
    pub idle: Option<Lsn>,
    pub idle_written: Instant,
    /// What is on the target and may be lost yet, if the target crashes.
    pub volatile: Option<Lsn>,
    /// When something was last known to be durable.
    pub durable_at: Instant,
    pub stop: CancellationToken,
}

/// What is collected for the target, in the order of the stream: whole source transactions, then a part of the one that is open.
pub(super) struct Batch {
    since: Instant,
    changes: Vec<Change>,
    bytes: u64,
    /// The target transaction is open, with what came before.
    begun: bool,
    whole: Option<Whole>,
    /// Of the open source transaction.
    applied: BatchApplied,
}

/// The whole source transactions of a batch.
struct Whole {
    end: End,
    /// How many of the changes are theirs, and of the bytes.
    changes: usize,
    bytes: u64,
}

impl Batch {
    /// Of a transaction that is on the target already, in the target transaction that is open.
    pub(super) fn applied_early(applied: BatchApplied) -> Self {
        Self { begun: true, applied, ..Self::new() }
    }

    fn new() -> Self {
        Self {
            since: Instant::now(),
            changes: Vec::new(),
            bytes: 0,
            begun: false,
            whole: None,
            applied: BatchApplied::default(),
        }
    }
}

impl Applier {
    /// Applies until the reader ends or `stop`; complete transactions are committed, a half one is left to the next
    /// start.
    ///
    /// While the target works on one batch, the next one is collected. It is handed over once the target is free, and
    /// nothing more waits or the batch is old or large enough. So with little to do each transaction goes at once, and the
    /// more there is to do, the more goes together.
    pub(super) async fn run(mut self) -> Result<()> {
        loop {
            if self.lane.is_free() && self.is_due() && self.may_begin() {
                self.hand_over()?;
            }
            self.early.go_on(self.queue.is_empty())?;
            let idle_due = self.idle.filter(|_| self.is_between()).map(|_| self.idle_written + IDLE_PROGRESS_EVERY);
            let has_room = self.batch.as_ref().is_none_or(|batch| batch.bytes < self.settings.batch_max_bytes)
                && self.early.has_room();
            let whole = self.batch.as_ref().filter(|batch| batch.whole.is_some() && self.lane.is_free());
            let old = whole.filter(|_| self.may_begin()).map(|batch| batch.since + self.settings.batch_max_delay);
            let begun = self.batch.as_ref().is_some_and(|batch| batch.begun);
            let volatile = self.volatile.filter(|_| self.lane.is_free() && self.gate.is_open() && !begun);
            let volatile = volatile.map(|_| self.durable_at + DURABLE_EVERY);
            let in_the_way = self.early.in_the_way(&self.lane);
            tokio::select! {
                biased;
                () = self.stop.cancelled() => return self.finish().await,
                finished = self.lane.finished() => self.finished(finished?)?,
                outcome = self.early.finished() => self.early_finished(outcome).await,
                () = wait_until(in_the_way) => self.early_in_the_way().await,
                () = self.gate.closed(), if self.early.is_open() => self.give_up_early("nothing may be begun").await,
                received = self.queue.receive(), if has_room => match received {
                    Some((chunk, weight)) => {
                        for delivery in chunk {
                            if self.is_the_end(&delivery) {
                                return self.finish().await;
                            }
                            self.deliver(delivery).await?;
                        }
                        drop(weight);
                    }
                    None => return self.finish().await,
                },
                () = self.gate.pass(), if !self.gate.is_open() => {}
                () = wait_until(old) => {}
                () = wait_until(idle_due) => self.write_idle()?,
                () = wait_until(volatile) => self.make_durable()?,
            }
        }
    }

    /// Everything that committed before [`Settings::until`] was delivered.
    fn is_the_end(&self, delivery: &Delivery) -> bool {
        self.settings.until.is_some_and(|until| match delivery {
            Delivery::Message(Message::Begin { commit_lsn, .. }) => *commit_lsn >= until,
            Delivery::Idle(lsn) => self.transaction.is_none() && *lsn >= until,
            Delivery::Early(Part::Commits { commit_lsn, .. }) => *commit_lsn >= until,
            Delivery::Message(_) | Delivery::Early(_) => false,
        })
    }

    /// Nothing is open on the target, and nothing has begun that would open it.
    fn is_between(&self) -> bool {
        self.transaction.is_none() && self.batch.is_none() && self.lane.is_free()
    }

    /// While the gate is closed nothing is begun on the target; what was begun is finished.
    fn may_begin(&self) -> bool {
        self.gate.is_open() || self.batch.as_ref().is_some_and(|batch| batch.begun)
    }

    /// Whether what was collected shall go to the target now.
    fn is_due(&self) -> bool {
        self.batch.as_ref().is_some_and(|batch| {
            batch.bytes >= self.settings.batch_max_bytes
                || batch.whole.is_some()
                    && (self.queue.is_empty() || batch.since.elapsed() >= self.settings.batch_max_delay)
        })
    }

    /// Whole transactions are committed. Half a transaction is rolled back by the end of the connection.
    async fn finish(mut self) -> Result<()> {
        // It would be in nobody's way for longer than a stop may take.
        self.early.end().await;
        self.free().await?;
        if self.batch.as_ref().is_some_and(|batch| batch.whole.is_some()) && self.may_begin() {
            self.hand_over()?;
            self.free().await?;
        }
        self.make_durable()?;
        self.free().await
    }

    /// Waits until the target has done what it was given.
    pub(super) async fn free(&mut self) -> Result<()> {
        while !self.lane.is_free() {
            let in_the_way = self.early.in_the_way(&self.lane);
            tokio::select! {
                biased;
                finished = self.lane.finished() => self.finished(finished?)?,
                outcome = self.early.finished() => self.early_finished(outcome).await,
                () = wait_until(in_the_way) => self.early_in_the_way().await,
            }
        }
        Ok(())
    }

    /// The target is done with what it was given.
    pub(super) fn finished(&mut self, end: Option<End>) -> Result<()> {
        let Some(End { lsn, commit_micros, marker, applied, durable }) = end else { return Ok(()) };
        if applied.transactions > 0 {
            self.telemetry.batch(applied);
        }
        // Whatever was committed before a durable commit is durable with it.
        self.volatile = (!durable).then_some(lsn);
        if durable {
            self.durable.send_modify(|durable| {
                durable.lsn = lsn;
                durable.commit_micros = commit_micros.or(durable.commit_micros);
                durable.marker = marker.or(durable.marker);
            });
            self.durable_at = Instant::now();
        }
        self.telemetry.applied(lsn, commit_micros);
        if let Some(micros) = commit_micros {
            self.telemetry.arrived(micros);
        }
        // Whoever follows up to a point copies them there.
        if self.schema.committed() && self.settings.until.is_none() { Err(tables_to_copy()) } else { Ok(()) }
    }

    /// Gives what was collected to the target, which must be free: the whole transactions, to be committed; or, if there is none, a
    /// part of the open one, which is too large to be collected whole.
    fn hand_over(&mut self) -> Result<()> {
        let Some(mut batch) = self.batch.take() else { return Ok(()) };
        let Some(whole) = batch.whole.take() else {
            let changes = std::mem::take(&mut batch.changes);
            self.batch = Some(Batch { begun: true, bytes: 0, ..batch });
            return self.lane.start(Work { changes, ..Work::default() });
        };
        let rest = batch.changes.split_off(whole.changes);
        if self.transaction.is_some() {
            let bytes = batch.bytes - whole.bytes;
            self.batch = Some(Batch { changes: rest, bytes, applied: batch.applied, ..Batch::new() });
        }
        let mut end = whole.end;
        end.durable = end.marker.is_some()
            || self.queue.is_empty()
            || self.schema.end_the_batch()
            || self.durable_at.elapsed() >= DURABLE_EVERY;
        let begun = batch.begun;
        let work = Work { changes: batch.changes, end: Some(end), ..Work::default() };
        if begun || !self.may_divide() { self.lane.start(work) } else { self.lane.start_divided(work) }
    }

    /// Whether workers may share a batch that begins at progress. Up to where one went wrong before, the first worker goes on alone; and
    /// while some are ahead of progress, no others may come to be so, further ahead.
    fn may_divide(&mut self) -> bool {
        if self.ahead.as_ref().is_some_and(|ahead| ahead.until <= self.written()) {
            self.ahead = None;
        }
        self.ahead.is_none() && self.settings.one_by_one < self.written()
    }

    /// Brings the target to where the stream stands, inside the open source transaction.
    pub(super) async fn settle(&mut self) -> Result<()> {
        while self.batch.as_ref().is_some_and(|batch| batch.whole.is_some() || !batch.changes.is_empty()) {
            self.free().await?;
            self.pass_the_gate().await;
            self.hand_over()?;
        }
        self.free().await
    }

    /// Commits the whole transactions that were collected, outside of any; whether nothing of them is left.
    pub(super) async fn commit_collected(&mut self) -> Result<bool> {
        self.free().await?;
        if self.batch.is_some() {
            if !self.may_begin() {
                return Ok(false);
            }
            self.hand_over()?;
            self.free().await?;
        }
        Ok(true)
    }

    /// Before a target transaction is opened. A stop ends the wait with all else.
    async fn pass_the_gate(&self) {
        if !self.may_begin() {
            self.gate.pass().await;
        }
    }

    /// Opens a target transaction for the open source transaction, with all that came before.
    pub(super) async fn open_batch(&mut self) -> Result<()> {
        self.settle().await?;
        self.pass_the_gate().await;
        self.lane.executor()?.begin().await?;
        self.batch.get_or_insert_with(Batch::new).begun = true;
        Ok(())
    }

    /// The connection to the target, for whoever settled before.
    pub(super) fn pipeline(&mut self) -> Result<&mut Pipeline> {
        Ok(&mut self.lane.executor()?.pipeline)
    }

    pub(super) async fn end_transaction(&mut self, lsn: Lsn, commit_micros: i64) -> Result<()> {
        let ended = self.transaction.take().ok_or_else(|| out_of_place("COMMIT"))?;
        let marker = self.marker.is_expected(ended.xid);
        // Also a transaction without changes moves progress: it may be the marker.
        let batch = self.batch.get_or_insert_with(Batch::new);
        let mut applied = std::mem::take(&mut batch.applied);
        applied.transactions = 1;
        let earlier = batch.whole.take().map(|whole| whole.end);
        if let Some(earlier) = earlier {
            applied.add(&earlier.applied);
        }
        let marker = marker.or(earlier.and_then(|earlier| earlier.marker));
        let end = End { lsn, commit_micros: Some(commit_micros), marker, applied, durable: true };
        batch.whole = Some(Whole { end, changes: batch.changes.len(), bytes: batch.bytes });
        let schema_changed = self.schema.end_the_batch();
        if marker.is_some() || schema_changed || ended.commit_lsn <= self.settings.one_by_one {
            self.free().await?;
            self.pass_the_gate().await;
            self.hand_over()?;
        }
        // What comes next may need the tables that it says are to be copied.
        if schema_changed { self.free().await } else { Ok(()) }
    }

    pub(super) fn collect(&mut self, change: Change) {
        let is_there = self.ahead.as_ref().is_some_and(|ahead| ahead.has(&change));
        let batch = self.batch.get_or_insert_with(Batch::new);
        change.operation().count(&mut batch.applied);
        if !is_there {
            batch.bytes += change.bytes() as u64;
            batch.changes.push(change);
        }
    }

    /// Nothing happened on the source that concerns us, but its log went on: say so durably, then confirm.
    fn write_idle(&mut self) -> Result<()> {
        self.idle_written = Instant::now();
        let Some(lsn) = self.idle.take() else { return Ok(()) };
        if !self.is_between() || !self.gate.is_open() || lsn <= self.written() {
            return Ok(());
        }
        self.write_progress(lsn)
    }

    /// Progress on the target, durable or not.
    pub(super) fn written(&self) -> Lsn {
        self.durable.borrow().lsn.max(self.volatile.unwrap_or_default())
    }

    /// Nothing follows that would make durable what was committed: a commit without changes does.
    fn make_durable(&mut self) -> Result<()> {
        match self.volatile.filter(|_| self.lane.is_free() && self.batch.as_ref().is_none_or(|batch| !batch.begun)) {
            Some(lsn) => self.write_progress(lsn),
            None => Ok(()),
        }
    }

    fn write_progress(&mut self, lsn: Lsn) -> Result<()> {
        let end = End { lsn, commit_micros: None, marker: None, applied: BatchApplied::default(), durable: true };
        self.lane.start(Work { end: Some(end), ..Work::default() })
    }
}

/// Following ends for a while: tables are to be copied, as the state says.
fn tables_to_copy() -> Error {
    Error::new(Class::Retry, "tables_to_copy", "tables are to be copied again after a schema change")
}

pub(super) fn out_of_place(what: &str) -> Error {
    Error::bug(format!("the stream holds {what} outside a transaction"))
}

/// Never, if there is no deadline.
pub(super) async fn wait_until(deadline: Option<Instant>) {
    match deadline {
        Some(deadline) => tokio::time::sleep_until(deadline.into()).await,
        None => std::future::pending().await,
    }
}

/// Reads what the applier needs to know about the move's tables.
///
/// `until`: what is not copied is copied at that point, and nothing of it is applied before.
pub(super) fn cuts(tables: &[crate::state::TableRecord], until: Option<Lsn>) -> Result<HashMap<QualifiedName, Lsn>> {
    tables
        .iter()
        .map(|table| match table.cut_lsn.or(until) {
            Some(cut) => Ok((table.name.clone(), cut)),
            None => Err(Error::bug(format!("table {} is followed before it was copied", table.name.plain()))),
        })
        .collect::<Result<_>>()
        .doing(|| "preparing to follow")
}
