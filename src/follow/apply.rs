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
use std::sync::Arc;
use std::time::{Duration, Instant};

use foldhash::fast::RandomState;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use super::change::{Change, Position, Row};
use super::ddl::{Moved, SchemaChanges};
use super::executor::{End, Work};
use super::lanes::Lanes;
use super::pipeline::Pipeline;
use super::queue::Receiver;
use super::reader::Delivery;
use super::relation::{Plan, mending, type_names_query};
use super::shares::Ahead;
use super::target_table::{TargetTable, target_table, target_table_query};
use super::{Durable, Gate, IDLE_PROGRESS_EVERY, MarkerWatch, Settings};
use crate::error::{Class, Doing, Error, Result};
use crate::postgres::pgoutput::{Message, Relation, Value};
use crate::postgres::{Lsn, QualifiedName, quote_literal};
use crate::state::Store;
use crate::telemetry::{BatchApplied, Telemetry};

/// While more is on its way, a commit does not wait for the target's disk, but one in this time does, and everything before it
/// is durable with it.
const DURABLE_EVERY: Duration = Duration::from_millis(500);

/// See the module's first lines.
pub(super) struct Applier {
    pub settings: Settings,
    pub lane: Lanes,
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
    /// By the oid that the stream gives them.
    pub relations: HashMap<u32, Announced, RandomState>,
    pub types: HashMap<u32, QualifiedName>,
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

/// What the stream announced of a relation.
pub(super) struct Announced {
    pub relation: Relation,
    /// What committed before is in the table's copy.
    cut: Option<Lsn>,
    /// Made when the first change needs it.
    pub plan: Option<Arc<Plan>>,
}

impl Announced {
    fn is_copied(&self, at: Position) -> bool {
        self.cut.is_some_and(|cut| at.commit_lsn < cut)
    }
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
            let idle_due = self.idle.filter(|_| self.is_between()).map(|_| self.idle_written + IDLE_PROGRESS_EVERY);
            let has_room = self.batch.as_ref().is_none_or(|batch| batch.bytes < self.settings.batch_max_bytes);
            let whole = self.batch.as_ref().filter(|batch| batch.whole.is_some() && self.lane.is_free());
            let old = whole.filter(|_| self.may_begin()).map(|batch| batch.since + self.settings.batch_max_delay);
            let begun = self.batch.as_ref().is_some_and(|batch| batch.begun);
            let volatile = self.volatile.filter(|_| self.lane.is_free() && self.gate.is_open() && !begun);
            let volatile = volatile.map(|_| self.durable_at + DURABLE_EVERY);
            tokio::select! {
                biased;
                () = self.stop.cancelled() => return self.finish().await,
                finished = self.lane.finished() => self.finished(finished?)?,
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
            Delivery::Message(_) => false,
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
        self.free().await?;
        if self.batch.as_ref().is_some_and(|batch| batch.whole.is_some()) && self.may_begin() {
            self.hand_over()?;
            self.free().await?;
        }
        self.make_durable()?;
        self.free().await
    }

    /// Waits until the target has done what it was given.
    async fn free(&mut self) -> Result<()> {
        while !self.lane.is_free() {
            let finished = self.lane.finished().await?;
            self.finished(finished)?;
        }
        Ok(())
    }

    /// The target is done with what it was given.
    fn finished(&mut self, end: Option<End>) -> Result<()> {
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
        let work = Work { changes: batch.changes, end: Some(end), division: None };
        if begun || !self.may_divide() { self.lane.start(work) } else { self.lane.start_divided(work) }
    }

    /// Whether workers may share a batch that begins at progress. Where one went wrong before, the first worker goes on alone; and
    /// while some are ahead of progress, no others may come to be so, further ahead.
    fn may_divide(&mut self) -> bool {
        if self.ahead.as_ref().is_some_and(|ahead| ahead.until <= self.written()) {
            self.ahead = None;
        }
        self.ahead.is_none() && self.settings.one_by_one == Lsn::ZERO
    }

    /// Brings the target to where the stream stands, inside the open source transaction.
    async fn settle(&mut self) -> Result<()> {
        while self.batch.as_ref().is_some_and(|batch| batch.whole.is_some() || !batch.changes.is_empty()) {
            self.free().await?;
            self.pass_the_gate().await;
            self.hand_over()?;
        }
        self.free().await
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

    async fn deliver(&mut self, delivery: Delivery) -> Result<()> {
        match delivery {
            Delivery::Idle(lsn) => {
                if lsn > self.written() {
                    self.idle = Some(lsn);
                }
                Ok(())
            }
            // Nearly everything ends here. A future for each message would cost more than all else that is done with it.
            Delivery::Message(message) => match self.at_once(message)? {
                None => Ok(()),
                Some(message) => self.message(message).await,
            },
        }
    }

    /// Does what needs nothing of the target; gives back what does.
    fn at_once(&mut self, message: Message) -> Result<Option<Message>> {
        let relation = match &message {
            Message::Begin { commit_lsn, xid, .. } => {
                self.transaction = Some(Position { commit_lsn: *commit_lsn, xid: *xid });
                self.reached.send_replace(*commit_lsn);
                self.idle = None;
                self.schema.begin();
                return Ok(None);
            }
            Message::Insert { relation, .. } | Message::Update { relation, .. } | Message::Delete { relation, .. } => {
                *relation
            }
            _ => return Ok(Some(message)),
        };
        if self.schema.is_capture(relation) {
            return Ok(Some(message));
        }
        let (at, known) = self.announced(relation)?;
        if known.is_copied(at) {
            return Ok(None);
        }
        let Some(plan) = known.plan.clone() else { return Ok(Some(message)) };
        match message {
            Message::Insert { new, .. } => {
                let change = Change::insert(plan, at, new)?;
                self.collect(change, |applied| applied.inserts += 1);
            }
            Message::Update { old, new, .. } => {
                let change = Change::update(plan, at, old, new)?;
                self.collect(change, |applied| applied.updates += 1);
            }
            Message::Delete { old, .. } => {
                let change = Change::delete(plan, at, old)?;
                self.collect(change, |applied| applied.deletes += 1);
            }
            other => return Ok(Some(other)),
        }
        Ok(None)
    }

    /// What the stream said of a relation, and where we are.
    fn announced(&self, oid: u32) -> Result<(Position, &Announced)> {
        let at = self.transaction.ok_or_else(|| out_of_place("a change"))?;
        match self.relations.get(&oid) {
            Some(known) => Ok((at, known)),
            None => Err(Error::bug(format!("a change of relation {oid}, which the stream did not describe"))),
        }
    }

    async fn message(&mut self, message: Message) -> Result<()> {
        match message {
            Message::Commit { end_lsn, commit_micros, .. } => {
                return self.end_transaction(end_lsn, commit_micros).await;
            }
            Message::Relation(relation) => self.relation(relation),
            Message::Type { oid, name } => {
                self.types.insert(oid, name);
            }
            Message::Insert { relation, new } if self.schema.is_capture(relation) => {
                let Some(Value::Text(text)) = new.values().next() else {
                    return Err(Error::bug("a captured schema change holds no text"));
                };
                // The rows before it are on the target before it runs.
                self.settle().await?;
                self.schema_change(text).await?;
                // It may have moved the cuts.
                for known in self.relations.values_mut() {
                    known.cut = self.settings.cuts.get(&known.relation.name).copied();
                }
            }
            Message::Insert { relation, .. } | Message::Update { relation, .. } | Message::Delete { relation, .. } => {
                self.plan(relation).await?;
                if let Some(left) = self.at_once(message)? {
                    return Err(Error::bug(format!("{} found no plan", left.kind())));
                }
            }
            Message::Truncate { relations, restart_identity, .. } => {
                return self.truncate(&relations, restart_identity).await;
            }
            // Where a change came from before it reached the source does not matter to the target, and other
            // programs' messages are theirs. The marker is recognised by its transaction.
            Message::Origin { .. } | Message::Logical { .. } => {}
            // Only whole transactions were asked for, once they committed; and a beginning was taken at once.
            Message::Begin { .. }
            | Message::StreamStart { .. }
            | Message::StreamStop
            | Message::StreamCommit { .. }
            | Message::StreamAbort { .. }
            | Message::BeginPrepare(_)
            | Message::Prepare(_)
            | Message::CommitPrepared { .. }
            | Message::RollbackPrepared { .. }
            | Message::StreamPrepare(_) => {
                return Err(Error::bug(format!("the stream holds {}, which was not asked for", message.kind())));
            }
        }
        Ok(())
    }

    async fn end_transaction(&mut self, lsn: Lsn, commit_micros: i64) -> Result<()> {
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

    /// The source announces a shape. Whether the target has it is asked when a row needs it: a table whose changes are all
    /// in its copy already, or that is gone on both sides, needs no place on the target.
    fn relation(&mut self, relation: Relation) {
        if relation.name == self.settings.capture {
            return self.schema.announce(relation.oid);
        }
        match self.relations.get(&relation.oid) {
            Some(known) if known.relation == relation => {}
            _ => {
                let cut = self.settings.cuts.get(&relation.name).copied();
                drop(self.relations.insert(relation.oid, Announced { relation, cut, plan: None }));
            }
        }
    }

    /// The plan of a relation, and where we are; `None` if the change is in the table's copy already.
    async fn plan(&mut self, oid: u32) -> Result<Option<(Arc<Plan>, Position)>> {
        let (at, known) = self.announced(oid)?;
        if known.is_copied(at) {
            return Ok(None);
        }
        if let Some(plan) = &known.plan {
            return Ok(Some((Arc::clone(plan), at)));
        }
        let (name, query) = (known.relation.name.clone(), target_table_query(&known.relation.name));
        self.free().await?;
        let rows = self.pipeline()?.query(&query).await;
        let rows = rows.doing(|| format!("reading the shape of table {} on the target", name.plain()))?;
        let target = target_table(&rows)?;
        self.generations += 1;
        let Some(known) = self.relations.get_mut(&oid) else {
            return Err(Error::bug(format!("relation {oid} was forgotten")));
        };
        match Plan::new(&known.relation, target.as_ref(), &self.types, self.generations) {
            Ok(plan) => Ok(Some((Arc::clone(known.plan.insert(Arc::new(plan))), at))),
            Err(error) => Err(self.with_what_mends(error, oid, target.as_ref()).await),
        }
    }

    /// The error with the statement that would give the target the shape of the source.
    async fn with_what_mends(&mut self, error: Error, oid: u32, target: Option<&TargetTable>) -> Error {
        let (Some(known), Some(target)) = (self.relations.get(&oid), target) else { return error };
        let (relation, query) = (known.relation.clone(), type_names_query(&known.relation, &self.types));
        let Ok(pipeline) = self.pipeline() else { return error };
        let Ok(rows) = pipeline.query(&query).await else { return error };
        let names: Vec<String> = rows.into_iter().flatten().flatten().collect();
        let statement = mending(&relation, target, &self.types, &names);
        error.hint(format!(
            "run on the target: {statement} (a renamed column is RENAME COLUMN instead; if old rows got other values: \
             `pgtandem resync {}`). Nothing of the change was applied",
            relation.name.plain()
        ))
    }

    /// The source lists every table that the statement emptied, also those that CASCADE reached, so the target must
    /// not cascade further than they say.
    async fn truncate(&mut self, relations: &[u32], restart_identity: bool) -> Result<()> {
        let mut plans = Vec::with_capacity(relations.len());
        let mut at = None;
        for &relation in relations {
            if let Some((plan, position)) = self.plan(relation).await? {
                at = Some(position);
                plans.push(plan);
            }
        }
        let (Some(at), Some(first)) = (at, plans.first().map(Arc::clone)) else { return Ok(()) };
        let mut names: Vec<String> = plans.iter().map(|plan| plan.truncated()).collect();
        names.extend(self.emptied_whole(&plans).await?);
        let restart = if restart_identity { " RESTART IDENTITY" } else { "" };
        let sql = format!("TRUNCATE {}{restart}", names.join(", "));
        self.collect(Change { plan: first, at, row: Row::Truncate(sql.into()) }, |applied| applied.truncates += 1);
        Ok(())
    }

    /// The partitioned tables on the target of which every partition is emptied. The stream names the partitions alone; a foreign
    /// key that refers to one of them belongs to a whole table, which the server wants to see emptied at the same time.
    async fn emptied_whole(&mut self, plans: &[Arc<Plan>]) -> Result<Vec<String>> {
        let listed: Vec<String> = plans.iter().map(|plan| quote_literal(&plan.name.to_string())).collect();
        let question = EMPTIED_WHOLE.replace("$1", &format!("ARRAY[{}]", listed.join(", ")));
        self.free().await?;
        let rows =
            self.pipeline()?.query(&question).await.doing(|| "looking for tables whose partitions are emptied")?;
        Ok(rows.into_iter().flatten().flatten().collect())
    }

    fn collect(&mut self, change: Change, count: impl FnOnce(&mut BatchApplied)) {
        let is_there = self.ahead.as_ref().is_some_and(|ahead| ahead.has(&change));
        let batch = self.batch.get_or_insert_with(Batch::new);
        count(&mut batch.applied);
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
    fn written(&self) -> Lsn {
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

/// `$1`: tables that are emptied, quoted.
const EMPTIED_WHOLE: &str = "
    WITH listed AS (
        SELECT pg_catalog.to_regclass(name)::pg_catalog.oid AS oid FROM unnest($1::text[]) AS names (name))
    SELECT DISTINCT pg_catalog.format('%I.%I', n.nspname, c.relname)
    FROM listed
    CROSS JOIN LATERAL pg_catalog.pg_partition_ancestors(listed.oid) AS above (oid)
    JOIN pg_catalog.pg_class c ON c.oid = above.oid AND c.relkind = 'p'
    JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace
    WHERE NOT EXISTS (
        SELECT FROM pg_catalog.pg_partition_tree(c.oid) AS below
        WHERE below.isleaf AND below.relid NOT IN (SELECT oid FROM listed WHERE oid IS NOT NULL))";

/// Following ends for a while: tables are to be copied, as the state says.
fn tables_to_copy() -> Error {
    Error::new(Class::Retry, "tables_to_copy", "tables are to be copied again after a schema change")
}

fn out_of_place(what: &str) -> Error {
    Error::bug(format!("the stream holds {what} outside a transaction"))
}

/// Never, if there is no deadline.
async fn wait_until(deadline: Option<Instant>) {
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
