//! One worker: a connection to each side, unit after unit from the shared queue.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use postgres_protocol::message::frontend;

use super::division::{Division, Range};
use super::plan::{self, Content, Manner};
use super::pump::{self, Advance, Moved, Pass};
use super::resume::Rest;
use super::statements::{self, Emptying};
use super::{Context, InFlight, Job, SESSIONS, blockers};
use crate::error::{Class, Doing, Error, Result};
use crate::postgres::catalog::Table;
use crate::postgres::replication::Cut;
use crate::postgres::wire::{Mode, Wire};
use crate::postgres::{QualifiedName, Server};
use crate::state::{
    FinishedUnit, TableState, copied_sql, fence_sql, forget_units_sql, only_the_leader, opened_sql, unit_sql,
    units_at_sql,
};
use crate::telemetry::Telemetry;

/// Telemetry hears of a table's progress after so many bytes or so much time, whichever is first.
const TELL_BYTES: u64 = 1024 * 1024;
const TELL_EVERY: Duration = Duration::from_millis(100);

/// A smaller table is not worth what FREEZE asks for, in bytes.
const WORTH_FREEZING: u64 = 4 << 20;

/// So many rows that changed are looked up at once.
const KEYS_AT_ONCE: usize = 1000;

/// After standing in the queue for a lock in vain, others get their turn for so long.
const STEP_ASIDE: Duration = Duration::from_secs(1);

/// A source connection that keeps the snapshot for all its units, and a target connection.
pub(super) struct Worker {
    source: Wire,
    target: Wire,
}

impl Worker {
    /// Connects to both sides and imports the snapshot.
    pub(super) async fn connect(context: &Context, cut: &Cut) -> Result<Self> {
        let source = async {
            let mut source = Wire::connect(&context.source, SESSIONS, Mode::Sql, &[]).await?;
            source.query(statements::BOTH_SIDES).await.doing(|| "preparing the source's session")?;
            source.query(statements::SOURCE_SIDE).await?;
            source
                .query(&statements::import_snapshot(&cut.snapshot))
                .await
                .doing(|| "importing the snapshot")
                .map_err(
                    // Undefined object, invalid value: its walsender is gone.
                    |e| {
                        if e.sqlstate().is_some_and(|s| s == "42704" || s == "22023") {
                            e.reclassed(Class::Retry)
                        } else {
                            e
                        }
                    },
                )?;
            Ok(source)
        };
        let (source, target) = tokio::try_join!(source, connect_target(context))?;
        Ok(Self { source, target })
    }

    /// Works until nothing is left of what is late or is not.
    pub(super) async fn work(mut self, job: Arc<Job>, late: bool) -> Result<Self> {
        let _busy = job.context.finish.beside_a_copy();
        while let Some(unit) = job.next(late) {
            match &unit.content {
                Content::Part(table, range) => {
                    let table = job.table(*table)?;
                    self.copy_part(&job, table, *range).await.doing(|| copying(&[table]))?;
                }
                Content::Tables(tables) => {
                    let tables = tables.iter().map(|&at| job.table(at)).collect::<Result<Vec<_>>>()?;
                    if !self.copy_tables(&job, &tables).await.doing(|| copying(&tables))? {
                        job.give_back(&unit);
                        if tables.len() == 1 {
                            tokio::time::sleep(STEP_ASIDE).await;
                        }
                    }
                }
            }
        }
        Ok(self)
    }

    /// Ends both sessions. The snapshot was read only: there is nothing to commit.
    pub(super) async fn close(self) {
        tokio::join!(self.source.close(), self.target.close());
    }

    /// Fills whole tables, all of them in one transaction. False if one is taken: none was touched then.
    async fn copy_tables(&mut self, job: &Job, tables: &[&InFlight]) -> Result<bool> {
        let Context { source, target, telemetry, store, finish, .. } = &job.context;
        let locked: Vec<&Table> = tables.iter().map(|table| table.table()).collect();
        if !try_lock(&mut self.source, source, &locked, telemetry).await? {
            return Ok(false);
        }
        let pid = self.target.process_id();
        let what = format!("emptying {} on the target", listed(tables));
        let begun = blockers::explained(target, pid, &what, telemetry, begin_whole(&mut self.target, tables)).await;
        let truncated = match begun {
            Err(error) if is_taken(&error) => {
                tokio::try_join!(self.target.query("ROLLBACK"), self.source.query(statements::RELEASE))?;
                return Ok(false);
            }
            begun => begun.map_err(pump::explain_schema)?,
        };
        let passes = tables.iter().zip(truncated).map(|(table, truncated)| pass(table, None, truncated));
        let passes: Vec<Pass> = passes.collect();
        let moved = self.forward(job, tables, &passes).await?;
        let copied: Vec<_> =
            tables.iter().zip(&moved).map(|(table, moved)| (&table.table().name, moved.rows, moved.bytes)).collect();
        commit(&mut self.target, &job.context, &copied_sql(store.name().as_str(), job.cut.lsn, &copied)).await?;
        for table in tables {
            table.parts_left.fetch_sub(1, Ordering::AcqRel);
            telemetry.copy_state(&table.table().name, TableState::Copied);
        }
        let mut small = Vec::new();
        for table in tables {
            let name = &table.table().name;
            // A worker has better to do than to look through a large table.
            if table.table().bytes <= plan::SMALL { small.push(name) } else { finish.begin(name) }
        }
        finish.complete(&mut self.target, &small).await.doing(|| "completing them")?;
        Ok(true)
    }

    /// Adds the rows of a range to a table that was opened before.
    async fn copy_part(&mut self, job: &Job, table: &InFlight, range: Range) -> Result<()> {
        let Context { source, telemetry, store, finish, .. } = &job.context;
        let this = &table.table().name;
        let (Manner::Parts(division) | Manner::Rest(division, _)) = &table.planned.manner else {
            return Err(Error::bug("a part of a table that is not divided"));
        };
        lock(&mut self.source, source, table.table(), telemetry).await?;
        if let Division::Key(_) = division {
            self.source.query(statements::LOOK_UP).await?;
        }
        self.target.query("BEGIN").await?;
        let moved = self.forward(job, &[table], &[pass(table, Some((division, range)), false)]).await?;
        let Moved { rows, bytes } = moved.first().copied().unwrap_or_default();
        let unit = FinishedUnit { range, cut_lsn: job.cut.lsn, rows, bytes };
        commit(&mut self.target, &job.context, &unit_sql(store.name().as_str(), this, unit)).await?;
        if table.parts_left.fetch_sub(1, Ordering::AcqRel) == 1 {
            self.target.query("BEGIN").await?;
            commit(&mut self.target, &job.context, &parts_copied_sql(&job.context, &job.cut, this, table.so_far()))
                .await?;
            telemetry.copy_state(this, TableState::Copied);
            finish.begin(this);
        }
        Ok(())
    }

    /// Forwards the rows of these tables, and lets go of their locks on the source.
    async fn forward(&mut self, job: &Job, tables: &[&InFlight], passes: &[Pass]) -> Result<Vec<Moved>> {
        // Not before: a table that is recorded as `copying` may be emptied without a look.
        for table in tables {
            if !table.touched.swap(true, Ordering::Relaxed) {
                job.context.telemetry.copy_state(&table.table().name, TableState::Copying);
            }
        }
        let mut tell = Tell::new(job, tables);
        let moved = pump::forward(&mut self.source, &mut self.target, passes, statements::RELEASE, &mut tell)
            .await
            .map_err(pump::explain_schema)?;
        tell.now();
        Ok(moved)
    }

    /// Sends what waits of the keys of a table that goes on to the target.
    pub(super) async fn send_keys(&mut self, rest: &mut Rest<'_>) -> Result<()> {
        let piece = rest.piece();
        if piece.is_empty() {
            return Ok(());
        }
        if !rest.touched {
            let table = &rest.planned.of.table.name;
            match self.target.query(&statements::create_touched(rest.at, table, &rest.key)).await {
                Ok(_) => rest.touched = true,
                // Without the right to make temporary tables, or to read the table.
                Err(error) if error.sqlstate().is_some() => {
                    tracing::warn!(%error, table = %table.plain(), "the keys of changed rows cannot be gathered on the target");
                    rest.lose();
                    return Ok(());
                }
                Err(error) => return Err(error),
            }
        }
        self.target.enter_copy(&format!("COPY {} FROM STDIN", statements::touched(rest.at))).await?;
        frontend::CopyData::new(&piece[..])?.write(self.target.outbound());
        frontend::copy_done(self.target.outbound());
        self.target.flush().await?;
        self.target.finish().await.map(drop)
    }

    /// Makes what is there of a table the rows that the cut shows in its ranges; see [`super::resume`].
    pub(super) async fn bring_to_cut(&mut self, context: &Context, cut: &Cut, rest: &Rest<'_>) -> Result<()> {
        let table = &rest.planned.of.table;
        self.target.query("BEGIN").await?;
        if rest.touched {
            self.copy_touched(context, rest).await?;
        }
        let name = context.store.name().as_str();
        let record = if rest.planned.parts > 0 {
            units_at_sql(name, &table.name, cut.lsn)
        } else {
            let Manner::Rest(_, units) = &rest.planned.manner else {
                return Err(Error::bug("a table that does not go on"));
            };
            parts_copied_sql(context, cut, &table.name, plan::total(units))
        };
        commit(&mut self.target, context, &record).await?;
        if rest.planned.parts == 0 {
            context.telemetry.copy_state(&table.name, TableState::Copied);
            context.finish.begin(&table.name);
        }
        Ok(())
    }

    async fn copy_touched(&mut self, context: &Context, rest: &Rest<'_>) -> Result<()> {
        let (of, key) = (&rest.planned.of, &rest.key);
        let form = of.form();
        self.target.query(&statements::delete_touched(rest.at, &of.table.name, key)).await?;
        // Not before: nobody on the source waits for what this takes on the target.
        lock(&mut self.source, &context.source, &of.table, &context.telemetry).await?;
        self.source.query(statements::LOOK_UP).await?;
        let write = statements::write(&of.table, false, form);
        let mut rows = 0;
        loop {
            let keys = self.target.query(&statements::fetch_touched(KEYS_AT_ONCE)).await?;
            let keys: Vec<Vec<String>> = keys.into_iter().map(|row| row.into_iter().flatten().collect()).collect();
            if keys.is_empty() {
                break;
            }
            let read = statements::read_touched(of, key, &keys, rest.division, &rest.ranges);
            let pass = Pass { doing: String::new(), read, write: write.clone(), form };
            let moved = pump::forward(&mut self.source, &mut self.target, &[pass], "", &mut ()).await?;
            rows += moved.iter().map(|moved| moved.rows).sum::<u64>();
        }
        self.source.query(statements::RELEASE).await?;
        tracing::info!(table = %of.table.name.plain(), rows, "copied again the rows that changed since the copy of the table began");
        Ok(())
    }
}

/// The last unit of a table is there: it is whole.
fn parts_copied_sql(context: &Context, cut: &Cut, table: &QualifiedName, moved: Moved) -> String {
    let name = context.store.name().as_str();
    let copied = copied_sql(name, cut.lsn, &[(table, moved.rows, moved.bytes)]);
    format!("{copied}; {}", forget_units_sql(name, table))
}

async fn connect_target(context: &Context) -> Result<Wire> {
    let mut target = Wire::connect(&context.target, SESSIONS, Mode::Sql, &[]).await?;
    target.query(statements::BOTH_SIDES).await.doing(|| "preparing the target's session")?;
    target.query(statements::DURABLE_LATER).await?;
    match target.query(statements::REPLICA_ROLE).await {
        Ok(_) => {}
        Err(error) if error.sqlstate().is_some() => {
            tracing::debug!(%error, "the role may not set session_replication_role");
        }
        Err(error) => return Err(error),
    }
    Ok(target)
}

/// Step 1 for tables that are copied in parts: recorded as `copying` and empty, durably, before any part begins.
pub(super) async fn open_divided_tables(job: &Job) -> Result<()> {
    let tables = job.tables.iter().filter_map(|table| match &table.planned.manner {
        Manner::Parts(division) => Some((table, division)),
        Manner::Whole | Manner::Rest(..) => None,
    });
    let divided: Vec<(&InFlight, &Division)> = tables.collect();
    if divided.is_empty() {
        return Ok(());
    }
    let Context { target: server, store, epoch, telemetry, .. } = &job.context;
    let mut target = connect_target(&job.context).await?;
    let pid = target.process_id();
    for (table, division) in divided {
        let name = &table.table().name;
        let opening = async {
            while let Err(error) = begin_whole(&mut target, &[table]).await {
                if !is_taken(&error) {
                    return Err(error);
                }
                target.query("ROLLBACK").await?;
            }
            let fence = fence_sql(store.name().as_str(), *epoch);
            let opened = opened_sql(store.name().as_str(), name, &table.planned.of.shape, division.bounds());
            target.query(&format!("{fence}; {opened}; COMMIT")).await.map_err(only_the_leader)
        };
        let what = format!("emptying {} on the target", name.plain());
        blockers::explained(server, pid, &what, telemetry, opening)
            .await
            .map_err(pump::explain_schema)
            .doing(|| format!("copying the table {}", name.plain()))?;
    }
    target.close().await;
    Ok(())
}

/// Begins the transaction in which tables are filled from nothing, and tells which of them were truncated. What a table holds that we never
/// touched is not ours to remove.
async fn begin_whole(target: &mut Wire, tables: &[&InFlight]) -> Result<Vec<bool>> {
    let names: Vec<&QualifiedName> = tables.iter().map(|table| &table.table().name).collect();
    let rows = target.query(&statements::begin_alone(&names)).await?;
    let mut truncated = Vec::new();
    for (at, table) in tables.iter().enumerate() {
        let has_no_block = rows.get(at).and_then(|row| row.first()?.as_deref()) == Some("t");
        // To empty a table makes its files anew, which takes longer than to copy a small one.
        let leave = has_no_block && table.table().bytes < WORTH_FREEZING;
        truncated.push(!leave && empty(target, table).await?);
    }
    Ok(truncated)
}

async fn empty(target: &mut Wire, table: &InFlight) -> Result<bool> {
    let name = &table.table().name;
    let rows = target.query(&statements::is_empty(name)).await?;
    let said = |at: usize| rows.first().and_then(|row| row.get(at)?.as_deref()) == Some("t");
    let (is_empty, emptying) = (said(0), Emptying::of(name, said(1), said(2)));
    if !is_empty && !table.planned.begun {
        return Err(holds_strange_rows(name));
    }
    if is_empty && table.table().bytes < WORTH_FREEZING {
        return Ok(false);
    }
    let emptying = match emptying {
        Err(_) if is_empty => return Ok(false),
        other => other?,
    };
    // Also where it is empty: COPY's FREEZE asks for it.
    target.query(&emptying.sql(name)).await?;
    Ok(emptying == Emptying::Truncate)
}

/// Ends the transaction with the rows, and the record of them in it.
async fn commit(target: &mut Wire, context: &Context, record: &str) -> Result<()> {
    let fence = fence_sql(context.store.name().as_str(), context.epoch);
    target.query(&format!("{record}; {fence}; COMMIT")).await.map_err(only_the_leader)?;
    Ok(())
}

/// A table of the target that the move never wrote to is not empty.
pub(crate) fn holds_strange_rows(table: &QualifiedName) -> Error {
    Error::new(
        Class::Operator,
        "target_table_not_empty",
        format!("the table {} of the target holds rows that this move did not write", table.plain()),
    )
    .hint(format!("if they may go: TRUNCATE {table} on the target, then start again"))
}

/// Locks the table for this unit. As long as somebody holds it, others get their turn now and then.
async fn lock(wire: &mut Wire, server: &Server, table: &Table, telemetry: &Telemetry) -> Result<()> {
    while !try_lock(wire, server, &[table], telemetry).await? {
        tokio::time::sleep(STEP_ASIDE).await;
    }
    Ok(())
}

/// Locks the tables, says who holds them if that takes long, and makes sure that the snapshot still shows all of each. False if it
/// took too long, or would have been a deadlock: none is locked then.
async fn try_lock(wire: &mut Wire, server: &Server, tables: &[&Table], telemetry: &Telemetry) -> Result<bool> {
    let what = match tables {
        [table] => format!("locking {} on the source", table.name.plain()),
        _ => format!("locking {} tables on the source", tables.len()),
    };
    let pid = wire.process_id();
    let rows = match blockers::explained(server, pid, &what, telemetry, wire.query(&statements::lock(tables))).await {
        Ok(rows) => rows,
        Err(error) if is_taken(&error) => {
            wire.query(statements::RELEASE).await?;
            return Ok(false);
        }
        // Undefined table: dropped since the cut, which the next one shows.
        Err(error) if error.sqlstate() == Some("42P01") => return Err(error.reclassed(Class::Retry)),
        Err(error) => return Err(error.doing("reading from the source")),
    };
    let at = rows.first().and_then(|row| row.first()?.as_deref()?.parse::<usize>().ok());
    match at.and_then(|at| tables.get(at)) {
        None => Ok(true),
        Some(table) => Err(rewritten().doing(format!("reading {}", table.name.plain()))),
    }
}

/// A lock was not to be had in time, or would have been a deadlock.
fn is_taken(error: &Error) -> bool {
    matches!(error.sqlstate(), Some("55P03" | "40P01"))
}

/// The snapshot does not show all of the table any more.
pub(super) fn rewritten() -> Error {
    Error::new(
        Class::Retry,
        "table_rewritten",
        "the table was truncated, rewritten or made anew after the cut was taken; it is copied under another one",
    )
}

/// One COPY of a table, or of a range of it. `frozen`: the table was truncated in the same transaction.
fn pass(table: &InFlight, range: Option<(&Division, Range)>, frozen: bool) -> Pass {
    let form = table.planned.of.form();
    let read = statements::read(&table.planned.of, range);
    let write = statements::write(table.table(), frozen, form);
    Pass { doing: copying(&[table]), read, write, form }
}

fn copying(tables: &[&InFlight]) -> String {
    match tables {
        [table] => format!("copying the table {}", table.table().name.plain()),
        _ => format!("copying {}", listed(tables)),
    }
}

/// `public.a`, or `public.a and 31 other small tables`.
fn listed(tables: &[&InFlight]) -> String {
    match tables {
        [] => "no table".to_owned(),
        [table] => table.table().name.plain(),
        [first, others @ ..] => format!("{} and {} other small tables", first.table().name.plain(), others.len()),
    }
}

/// Passes the progress of tables on in steps that are worth a report, and keeps the copy below its bound.
struct Tell<'a> {
    job: &'a Job,
    tables: &'a [&'a InFlight],
    /// Which of them is on its way.
    at: usize,
    waiting: Moved,
    last: Instant,
}

impl<'a> Tell<'a> {
    fn new(job: &'a Job, tables: &'a [&'a InFlight]) -> Self {
        Self { job, tables, at: 0, waiting: Moved::default(), last: Instant::now() }
    }

    fn now(&mut self) {
        let waiting = std::mem::take(&mut self.waiting);
        if let Some(table) = self.tables.get(self.at) {
            table.advanced(waiting);
            self.job.context.telemetry.copy_advanced(&table.table().name, waiting.rows, waiting.bytes);
        }
        self.last = Instant::now();
    }
}

impl Advance for Tell<'_> {
    async fn advanced(&mut self, pass: usize, more: Moved) {
        if pass != self.at {
            self.now();
            self.at = pass;
        }
        self.waiting += more;
        if self.waiting.bytes >= TELL_BYTES || self.last.elapsed() >= TELL_EVERY {
            self.now();
        }
        self.job.throttle.pay(more.bytes).await;
    }
}
