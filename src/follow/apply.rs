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
//! # Before the newest cut
//!
//! A table that was copied under a cut has every transaction that committed before the cut; the applier skips
//! exactly those. Until progress has passed the newest cut of all tables, the target is no state that the
//! source ever had; afterwards it always is.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Instant;

use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use super::ddl::{Moved, SchemaChanges};
use super::pipeline::{Operation, Pipeline, Position, Purpose, StatementKey};
use super::queue::Receiver;
use super::reader::Delivery;
use super::relation::{Finder, Plan, TargetTable, mending, target_table, target_table_query, type_names_query};
use super::{Durable, Gate, IDLE_PROGRESS_EVERY, MarkerWatch, Settings};
use crate::config::MissingRow;
use crate::error::{Class, Doing, Error, Result};
use crate::postgres::pgoutput::{Message, OldTuple, Relation, Tuple, Value};
use crate::postgres::{Lsn, QualifiedName, quote_literal};
use crate::state::Store;
use crate::telemetry::{BatchApplied, Telemetry};

/// See the module's first lines.
pub(super) struct Applier {
    pub settings: Settings,
    pub pipeline: Pipeline,
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
    /// What the stream announced; the plan is made when the first change needs it.
    pub relations: HashMap<u32, (Relation, Option<Arc<Plan>>)>,
    pub types: HashMap<u32, QualifiedName>,
    pub generations: u64,
    pub transaction: Option<Position>,
    pub batch: Option<Batch>,
    /// The newest position known to hold nothing to apply, not yet written down.
    pub idle: Option<Lsn>,
    pub idle_written: Instant,
}

/// The open target transaction.
pub(super) struct Batch {
    started: Instant,
    bytes: u64,
    applied: BatchApplied,
    /// Where progress will be, and the commit time that goes with it.
    end: Lsn,
    commit_micros: Option<i64>,
    /// The marker that is part of it.
    marker: Option<u64>,
}

impl Applier {
    /// Applies until the reader ends or `stop`; complete transactions are committed, a half one is left to the next
    /// start.
    pub(super) async fn run(mut self, stop: CancellationToken) -> Result<()> {
        loop {
            if self.transaction.is_none() && self.queue.is_empty() {
                self.commit().await?;
            } else if self.queue.is_empty() {
                // The rest of the transaction is on its way; let the target work meanwhile.
                self.pipeline.send().await?;
            }
            let idle_due = self.idle.map(|_| self.idle_written + IDLE_PROGRESS_EVERY);
            tokio::select! {
                biased;
                () = stop.cancelled() => return self.finish().await,
                received = self.queue.receive() => match received {
                    Some((chunk, weight)) => {
                        for delivery in chunk {
                            if self.is_the_end(&delivery) {
                                return self.finish().await;
                            }
                            if self.is_between() && !self.gate.is_open() {
                                tokio::select! {
                                    biased;
                                    () = stop.cancelled() => return Ok(()),
                                    () = self.gate.pass() => {}
                                }
                            }
                            self.deliver(delivery).await?;
                        }
                        drop(weight);
                    }
                    None => return self.finish().await,
                },
                () = wait_until(idle_due) => self.write_idle().await?,
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
        self.transaction.is_none() && self.batch.is_none()
    }

    async fn finish(mut self) -> Result<()> {
        // A batch with a half transaction at its end is rolled back whole by the end of the connection.
        if self.transaction.is_none() { self.commit().await } else { Ok(()) }
    }

    async fn deliver(&mut self, delivery: Delivery) -> Result<()> {
        match delivery {
            Delivery::Idle(lsn) => {
                if lsn > self.durable.borrow().lsn {
                    self.idle = Some(lsn);
                }
                Ok(())
            }
            Delivery::Message(message) => self.message(message).await,
        }
    }

    async fn message(&mut self, message: Message) -> Result<()> {
        match message {
            Message::Begin { commit_lsn, xid, .. } => {
                self.transaction = Some(Position { commit_lsn, xid });
                self.reached.send_replace(commit_lsn);
                self.idle = None;
                self.schema.begin();
            }
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
                return self.schema_change(text).await;
            }
            Message::Insert { relation, new } => return self.insert(relation, &new).await,
            Message::Update { relation, old, new } => return self.update(relation, old.as_ref(), &new).await,
            Message::Delete { relation, old } => return self.delete(relation, &old).await,
            Message::Truncate { relations, restart_identity, .. } => {
                return self.truncate(&relations, restart_identity).await;
            }
            // Where a change came from before it reached the source does not matter to the target, and other
            // programs' messages are theirs. The marker is recognised by its transaction.
            Message::Origin { .. } | Message::Logical { .. } => {}
            // Only whole transactions were asked for, once they committed.
            Message::StreamStart { .. }
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

    async fn end_transaction(&mut self, end: Lsn, commit_micros: i64) -> Result<()> {
        let ended = self.transaction.take().ok_or_else(|| out_of_place("COMMIT"))?;
        let marker = self.marker.is_expected(ended.xid);
        // Also a transaction without changes moves progress: it may be the marker.
        self.open_batch().await?;
        let Some(batch) = &mut self.batch else { return Err(Error::bug("a batch was opened and is not there")) };
        batch.applied.transactions += 1;
        batch.end = end;
        batch.commit_micros = Some(commit_micros);
        batch.marker = marker.or(batch.marker);
        let full = ended.commit_lsn <= self.settings.one_by_one
            || batch.bytes >= self.settings.batch_max_bytes
            || batch.started.elapsed() >= self.settings.batch_max_delay
            || batch.marker.is_some()
            || self.schema.end_the_batch();
        if full { self.commit().await } else { Ok(()) }
    }

    /// The source announces a shape. Whether the target has it is asked when a row needs it: a table whose changes are all
    /// in its copy already, or that is gone on both sides, needs no place on the target.
    fn relation(&mut self, relation: Relation) {
        if relation.name == self.settings.capture {
            return self.schema.announce(relation.oid);
        }
        match self.relations.get(&relation.oid) {
            Some((known, _)) if *known == relation => {}
            _ => drop(self.relations.insert(relation.oid, (relation, None))),
        }
    }

    /// The plan of a relation, and where we are; `None` if the change is in the table's copy already.
    async fn change(&mut self, oid: u32) -> Result<Option<(Arc<Plan>, Position)>> {
        let at = self.transaction.ok_or_else(|| out_of_place("a change"))?;
        let Some((relation, plan)) = self.relations.get(&oid) else {
            return Err(Error::bug(format!("a change of relation {oid}, which the stream did not describe")));
        };
        if self.settings.cuts.get(&relation.name).is_some_and(|&cut| at.commit_lsn < cut) {
            return Ok(None);
        }
        if let Some(plan) = plan {
            return Ok(Some((Arc::clone(plan), at)));
        }
        let query = target_table_query(&relation.name);
        let rows = self.pipeline.query(&query).await;
        let rows = rows.doing(|| format!("reading the shape of table {} on the target", relation.name.plain()))?;
        let target = target_table(&rows)?;
        self.generations += 1;
        let plan = match Plan::new(relation, target.as_ref(), &self.types, self.generations) {
            Ok(plan) => Arc::new(plan),
            Err(error) => return Err(self.with_what_mends(error, oid, target.as_ref()).await),
        };
        if let Some((_, planned)) = self.relations.get_mut(&oid) {
            *planned = Some(Arc::clone(&plan));
        }
        Ok(Some((plan, at)))
    }

    /// The error with the statement that would give the target the shape of the source.
    async fn with_what_mends(&mut self, error: Error, oid: u32, target: Option<&TargetTable>) -> Error {
        let (Some((relation, _)), Some(target)) = (self.relations.get(&oid), target) else { return error };
        let query = type_names_query(relation, &self.types);
        let Ok(rows) = self.pipeline.query(&query).await else { return error };
        let names: Vec<String> = rows.into_iter().flatten().flatten().collect();
        let statement = mending(relation, target, &self.types, &names);
        error.hint(format!(
            "run on the target: {statement} (a renamed column is RENAME COLUMN instead; if old rows got other values: \
             `pgtandem resync {}`). Nothing of the change was applied",
            relation.name.plain()
        ))
    }

    async fn insert(&mut self, relation: u32, new: &Tuple) -> Result<()> {
        let Some((plan, at)) = self.change(relation).await? else { return Ok(()) };
        check_width(&plan, new)?;
        let mut values = Vec::with_capacity(new.len());
        for (column, value) in new.values().enumerate() {
            if plan.is_written(column) {
                values.push(text(value, &plan)?);
            }
        }
        self.open_batch().await?;
        self.count(new.bytes(), |applied| applied.inserts += 1);
        let key = StatementKey::Row { generation: plan.generation, operation: Operation::Insert, mask: Vec::new() };
        let sql = Arc::clone(&plan);
        let purpose = Purpose::Row { operation: Operation::Insert, plan, at };
        self.pipeline.execute(key, move || sql.insert(), values.into_iter(), purpose).await
    }

    async fn update(&mut self, relation: u32, old: Option<&OldTuple>, new: &Tuple) -> Result<()> {
        let Some((plan, at)) = self.change(relation).await? else { return Ok(()) };
        check_width(&plan, new)?;
        let mut values = Vec::with_capacity(new.len() + 2);
        let mut set = Vec::with_capacity(new.len());
        // True where the statement differs from the plain one: a column that it leaves alone.
        let mut mask = Vec::new();
        for (column, value) in new.values().enumerate() {
            if value == Value::Unchanged {
                mask.resize(new.len(), false);
                mark(&mut mask, column);
            } else if plan.is_written(column) {
                set.push(column);
                values.push(text(value, &plan)?);
            }
        }
        let before = old.map_or(new, OldTuple::tuple);
        let nulls = find(&plan, before, &mut values)?;
        self.open_batch().await?;
        self.count(new.bytes(), |applied| applied.updates += 1);
        mask.extend_from_slice(&nulls);
        let key = StatementKey::Row { generation: plan.generation, operation: Operation::Update, mask };
        let sql = Arc::clone(&plan);
        let purpose = Purpose::Row { operation: Operation::Update, plan, at };
        self.pipeline.execute(key, move || sql.update(&set, &nulls), values.into_iter(), purpose).await
    }

    async fn delete(&mut self, relation: u32, old: &OldTuple) -> Result<()> {
        let Some((plan, at)) = self.change(relation).await? else { return Ok(()) };
        let old = old.tuple();
        check_width(&plan, old)?;
        let mut values = Vec::with_capacity(old.len());
        let nulls = find(&plan, old, &mut values)?;
        self.open_batch().await?;
        self.count(old.bytes(), |applied| applied.deletes += 1);
        let key = StatementKey::Row { generation: plan.generation, operation: Operation::Delete, mask: nulls.clone() };
        let sql = Arc::clone(&plan);
        let purpose = Purpose::Row { operation: Operation::Delete, plan, at };
        self.pipeline.execute(key, move || sql.delete(&nulls), values.into_iter(), purpose).await
    }

    /// The source lists every table that the statement emptied, also those that CASCADE reached, so the target must
    /// not cascade further than they say.
    async fn truncate(&mut self, relations: &[u32], restart_identity: bool) -> Result<()> {
        let mut plans = Vec::with_capacity(relations.len());
        let mut at = None;
        for &relation in relations {
            if let Some((plan, position)) = self.change(relation).await? {
                at = Some(position);
                plans.push(plan);
            }
        }
        let (Some(at), Some(first)) = (at, plans.first().map(Arc::clone)) else { return Ok(()) };
        let names: Vec<String> = plans.iter().map(|plan| plan.truncated()).collect();
        let restart = if restart_identity { " RESTART IDENTITY" } else { "" };
        let sql = format!("TRUNCATE {}{restart}", names.join(", "));
        self.open_batch().await?;
        self.count(0, |applied| applied.truncates += 1);
        // Prepared under a generation of its own: the list of tables differs each time.
        self.generations += 1;
        let key = StatementKey::Row { generation: self.generations, operation: Operation::Truncate, mask: Vec::new() };
        let purpose = Purpose::Row { operation: Operation::Truncate, plan: first, at };
        self.pipeline.execute(key, move || sql, std::iter::empty(), purpose).await
    }

    pub(super) async fn open_batch(&mut self) -> Result<()> {
        if self.batch.is_some() {
            return Ok(());
        }
        self.batch = Some(Batch {
            started: Instant::now(),
            bytes: 0,
            applied: BatchApplied::default(),
            end: Lsn::ZERO,
            commit_micros: None,
            marker: None,
        });
        let begin = StatementKey::Own("BEGIN");
        self.pipeline.execute(begin, || "BEGIN".to_owned(), std::iter::empty(), Purpose::Own("BEGIN")).await?;
        // Within a transaction of the source a deferrable constraint may have been broken for a while.
        let defer = "SET CONSTRAINTS ALL DEFERRED";
        self.pipeline
            .execute(StatementKey::Own(defer), || defer.to_owned(), std::iter::empty(), Purpose::Own(defer))
            .await
    }

    fn count(&mut self, bytes: usize, what: impl FnOnce(&mut BatchApplied)) {
        if let Some(batch) = &mut self.batch {
            batch.bytes += bytes as u64;
            what(&mut batch.applied);
        }
    }

    /// Commits what is complete, together with progress.
    async fn commit(&mut self) -> Result<()> {
        let Some(mut batch) = self.batch.take() else { return Ok(()) };
        self.advance(batch.end, batch.commit_micros, batch.applied).await?;
        self.pipeline.commit().await?;
        batch.applied.duration = batch.started.elapsed();
        self.telemetry.batch(batch.applied);
        self.publish(batch.end, batch.commit_micros, batch.marker);
        // Whoever follows up to a point copies them there.
        if self.schema.committed() && self.settings.until.is_none() { Err(tables_to_copy()) } else { Ok(()) }
    }

    /// Nothing happened on the source that concerns us, but its log went on: say so durably, then confirm.
    async fn write_idle(&mut self) -> Result<()> {
        self.idle_written = Instant::now();
        let Some(lsn) = self.idle.take() else { return Ok(()) };
        if !self.is_between() || !self.gate.is_open() || lsn <= self.durable.borrow().lsn {
            return Ok(());
        }
        let begin = StatementKey::Own("BEGIN");
        self.pipeline.execute(begin, || "BEGIN".to_owned(), std::iter::empty(), Purpose::Own("BEGIN")).await?;
        self.advance(lsn, None, BatchApplied::default()).await?;
        self.pipeline.commit().await?;
        self.publish(lsn, None, None);
        Ok(())
    }

    /// Writes progress as the last statement of the batch, after all others were answered.
    async fn advance(&mut self, lsn: Lsn, commit_micros: Option<i64>, applied: BatchApplied) -> Result<()> {
        self.pipeline.settle().await?;
        if self.pipeline.has_missing() {
            self.missing_rows().await?;
        }
        let changes = applied.inserts + applied.updates + applied.deletes + applied.truncates;
        let values = [
            self.settings.move_name.as_str().to_owned(),
            self.settings.epoch.to_string(),
            lsn.to_string(),
            commit_micros.map(|micros| micros.to_string()).unwrap_or_default(),
            applied.transactions.to_string(),
            changes.to_string(),
        ];
        let values = values.iter().map(|v| (!v.is_empty()).then_some(v.as_bytes()));
        self.pipeline
            .execute(StatementKey::Own("progress"), || PROGRESS.to_owned(), values, Purpose::Own("progress"))
            .await?;
        self.pipeline.settle().await?;
        if self.pipeline.own_count() == 1 {
            return Ok(());
        }
        Err(Error::new(
            Class::Retry,
            "leadership_lost",
            format!("progress could not be advanced to {lsn}: another daemon took this move, or progress is beyond"),
        ))
    }

    async fn missing_rows(&mut self) -> Result<()> {
        let missing = self.pipeline.take_missing();
        if self.settings.missing_row == MissingRow::Stop
            && let Some(first) = missing.first()
        {
            return Err(Error::new(
                Class::Operator,
                "row_missing",
                format!(
                    "{} of transaction {} (committed at {}) found no row in table {} on the target",
                    first.operation.as_str(),
                    first.at.xid,
                    first.at.commit_lsn,
                    first.table.plain()
                ),
            )
            .hint(
                format!(
                    "someone else changed the target, or the sides differed before; nothing of the batch was applied. \
                     Find the cause, then `pgtandem resync {}` and start again; or set follow.missing_row = \"record\" to go on",
                    first.table.plain()
                ),
            ));
        }
        for row in missing {
            let sql = format!(
                "INSERT INTO pgtandem.missing_row (move, table_name, operation, lsn, xid) VALUES ({}, {}, '{}', '{}', {})",
                quote_literal(self.settings.move_name.as_str()),
                quote_literal(&row.table.plain()),
                row.operation.as_str(),
                row.at.commit_lsn,
                row.at.xid
            );
            self.generations += 1;
            let key =
                StatementKey::Row { generation: self.generations, operation: Operation::Insert, mask: Vec::new() };
            self.pipeline.execute(key, move || sql, std::iter::empty(), Purpose::Own("missing row")).await?;
            self.telemetry.missing_row(&row.table);
        }
        Ok(())
    }

    fn publish(&self, lsn: Lsn, commit_micros: Option<i64>, marker: Option<u64>) {
        self.durable.send_modify(|durable| {
            durable.lsn = lsn;
            durable.commit_micros = commit_micros.or(durable.commit_micros);
            durable.marker = marker.or(durable.marker);
        });
        self.telemetry.applied(lsn, commit_micros);
        if let Some(micros) = commit_micros {
            self.telemetry.arrived(micros);
        }
    }
}

/// `$1` move, `$2` epoch, `$3` LSN, `$4` commit time in microseconds since 1970 or NULL, `$5` transactions, `$6` changes.
const PROGRESS: &str = "\
    UPDATE pgtandem.progress
    SET lsn = $3,
        commit_time = COALESCE(timestamptz 'epoch' + $4::int8 * interval '1 microsecond', commit_time),
        transactions = transactions + $5::int8,
        changes = changes + $6::int8
    WHERE move = $1 AND epoch = $2::int8 AND lsn <= $3::pg_lsn";

/// Appends the values that find the row; tells which columns are NULL, for [`Finder::WholeRow`].
fn find<'t>(plan: &Plan, before: &'t Tuple, values: &mut Vec<Option<&'t [u8]>>) -> Result<Vec<bool>> {
    match &plan.finder {
        Finder::Key(key) => {
            let row: Vec<Value<'t>> = before.values().collect();
            for &at in key {
                let value = row.get(at).copied().unwrap_or(Value::Null);
                let value = text(value, plan)?.ok_or_else(|| {
                    Error::bug(format!("the key of a row of table {} is NULL in the stream", plan.name.plain()))
                })?;
                values.push(Some(value));
            }
            Ok(Vec::new())
        }
        Finder::WholeRow => {
            let mut nulls = Vec::with_capacity(before.len());
            for value in before.values() {
                let value = text(value, plan)?;
                nulls.push(value.is_none());
                if value.is_some() {
                    values.push(value);
                }
            }
            Ok(nulls)
        }
        Finder::Nothing => Err(Error::new(
            Class::Operator,
            "no_replica_identity",
            format!(
                "the source sent an update or delete of table {}, which has no replica identity",
                plan.name.plain()
            ),
        )
        .hint("set REPLICA IDENTITY FULL on the table and copy it again")),
    }
}

fn text<'t>(value: Value<'t>, plan: &Plan) -> Result<Option<&'t [u8]>> {
    match value {
        Value::Null => Ok(None),
        Value::Text(bytes) => Ok(Some(bytes)),
        Value::Unchanged | Value::Binary(_) => Err(Error::bug(format!(
            "the stream leaves out a value of table {} that is needed, or sends it in binary",
            plan.name.plain()
        ))),
    }
}

fn mark(mask: &mut [bool], at: usize) {
    if let Some(flag) = mask.get_mut(at) {
        *flag = true;
    }
}

fn check_width(plan: &Plan, tuple: &Tuple) -> Result<()> {
    if tuple.len() == plan.width() {
        return Ok(());
    }
    Err(Error::bug(format!(
        "a row of table {} has {} values where the stream announced {}",
        plan.name.plain(),
        tuple.len(),
        plan.width()
    )))
}

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
