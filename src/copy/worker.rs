//! One worker: a connection to each side, unit after unit from the shared queue.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use super::plan::Unit;
use super::pump::{self, Moved};
use super::statements::{self, Emptying};
use super::{Context, InFlight, Job, blockers};
use crate::error::{Class, Doing, Error, Result};
use crate::postgres::QualifiedName;
use crate::postgres::replication::Cut;
use crate::postgres::wire::{Mode, Wire};
use crate::state::{TableState, copied_sql, copying_sql, fence_sql, only_the_leader};
use crate::telemetry::Telemetry;

/// Telemetry hears of a table's progress after so many bytes or so much time, whichever is first.
const TELL_BYTES: u64 = 1024 * 1024;
const TELL_EVERY: Duration = Duration::from_millis(100);

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
            let mut source = Wire::connect(&context.source, "copy", Mode::Sql, &[]).await?;
            source.query(statements::BOTH_SIDES).await.doing(|| "preparing the source's session")?;
            source.query(statements::SOURCE_LOCK_TIMEOUT).await?;
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
        while let Some(unit) = job.next(late) {
            let Some(table) = job.tables.get(unit.table) else { return Err(Error::bug("a unit without a table")) };
            self.copy(&job, table, unit).await.doing(|| format!("copying the table {}", table.table().name.plain()))?;
        }
        Ok(self)
    }

    /// Ends both sessions. The snapshot was read only: there is nothing to commit.
    pub(super) async fn close(self) {
        tokio::join!(self.source.close(), self.target.close());
    }

    async fn copy(&mut self, job: &Job, table: &InFlight, unit: Unit) -> Result<()> {
        let Context { source, target, telemetry, .. } = &job.context;
        lock(&mut self.source, source, table, telemetry).await?;
        let whole = unit.blocks.is_none();
        let truncated = if whole {
            let pid = self.target.process_id();
            let what = format!("emptying {} on the target", table.table().name.plain());
            blockers::explained(target, pid, &what, telemetry, begin_whole(&mut self.target, table))
                .await
                .map_err(pump::explain_schema)?
                == Emptying::Truncate
        } else {
            self.target.query("BEGIN").await?;
            false
        };
        // Not before: a table that is recorded as `copying` may be emptied without a look.
        if !table.touched.swap(true, Ordering::Relaxed) {
            telemetry.copy_state(&table.table().name, TableState::Copying);
        }
        let read = statements::read(table.table(), unit.blocks);
        let write = statements::write(table.table(), truncated);
        let mut tell = Tell::new(telemetry, table);
        let moved = pump::forward((&mut self.source, &read), (&mut self.target, &write), |more| tell.advanced(more))
            .await
            .map_err(pump::explain_schema)?;
        tell.now();
        self.source.query(statements::RELEASE).await?;
        let record = if whole { Some(moved) } else { None };
        commit(&mut self.target, job, table, record).await?;
        let was_last = table.parts_left.fetch_sub(1, Ordering::AcqRel) == 1;
        if was_last && !whole {
            self.target.query("BEGIN").await?;
            commit(&mut self.target, job, table, Some(table.so_far())).await?;
        }
        if was_last {
            telemetry.copy_state(&table.table().name, TableState::Copied);
        }
        Ok(())
    }
}

async fn connect_target(context: &Context) -> Result<Wire> {
    let mut target = Wire::connect(&context.target, "copy", Mode::Sql, &[]).await?;
    target.query(statements::BOTH_SIDES).await.doing(|| "preparing the target's session")?;
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
    let divided: Vec<&InFlight> = job.tables.iter().filter(|table| table.planned.parts > 1).collect();
    if divided.is_empty() {
        return Ok(());
    }
    let Context { target: server, store, epoch, telemetry, .. } = &job.context;
    let mut target = connect_target(&job.context).await?;
    let pid = target.process_id();
    for table in divided {
        let name = &table.table().name;
        let opening = async {
            begin_whole(&mut target, table).await?;
            let fence = fence_sql(store.name().as_str(), *epoch);
            let copying = copying_sql(store.name().as_str(), name);
            target.query(&format!("{fence}; {copying}; COMMIT")).await.map_err(only_the_leader)
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

/// Begins the transaction in which a table is filled from nothing. What a table holds that we never touched is not
/// ours to remove.
async fn begin_whole(target: &mut Wire, table: &InFlight) -> Result<Emptying> {
    let name = &table.table().name;
    let rows = target.query(&statements::begin_alone(name)).await?;
    let said = |at: usize| rows.first().and_then(|row| row.get(at)?.as_deref()) == Some("t");
    let (is_empty, emptying) = (said(0), Emptying::of(name, said(1), said(2)));
    if !is_empty && !table.planned.begun {
        return Err(holds_strange_rows(name));
    }
    let emptying = match emptying {
        Err(_) if is_empty => return Ok(Emptying::Delete),
        other => other?,
    };
    // Also where it is empty: COPY's FREEZE asks for it.
    target.query(&emptying.sql(name)).await?;
    Ok(emptying)
}

/// Ends the transaction with the rows; with `copied`, the table is recorded in it.
async fn commit(target: &mut Wire, job: &Job, table: &InFlight, copied: Option<Moved>) -> Result<()> {
    let name = job.context.store.name().as_str();
    let fence = fence_sql(name, job.context.epoch);
    let record = copied
        .map(|moved| copied_sql(name, &table.table().name, job.cut.lsn, moved.rows, moved.bytes) + "; ")
        .unwrap_or_default();
    target.query(&format!("{fence}; {record}COMMIT")).await.map_err(only_the_leader)?;
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

/// Locks the table for this unit, says who holds it if that takes long, and makes sure that the snapshot still shows
/// all of it.
async fn lock(
    wire: &mut Wire,
    server: &crate::postgres::Server,
    table: &InFlight,
    telemetry: &Telemetry,
) -> Result<()> {
    let sql = statements::lock(table.table());
    let what = format!("locking {} on the source", table.table().name.plain());
    let rows = loop {
        let pid = wire.process_id();
        match blockers::explained(server, pid, &what, telemetry, wire.query(&sql)).await {
            Ok(rows) => break rows,
            Err(error) if matches!(error.sqlstate(), Some("55P03" | "40P01")) => {
                wire.query(statements::RELEASE).await?;
                tokio::time::sleep(STEP_ASIDE).await;
            }
            // Undefined table: dropped since the cut, which the next one shows.
            Err(error) if error.sqlstate() == Some("42P01") => return Err(error.reclassed(Class::Retry)),
            Err(error) => return Err(error.doing("reading from the source")),
        }
    };
    if rows.first().and_then(|row| row.first()?.as_deref()) == Some("t") {
        return Ok(());
    }
    Err(rewritten())
}

/// The snapshot does not show all of the table any more.
pub(super) fn rewritten() -> Error {
    Error::new(
        Class::Retry,
        "table_rewritten",
        "the table was truncated, rewritten or made anew after the cut was taken; it is copied under another one",
    )
}

/// Passes a table's progress on in steps that are worth a report.
struct Tell<'a> {
    telemetry: &'a Telemetry,
    table: &'a InFlight,
    waiting: Moved,
    last: Instant,
}

impl<'a> Tell<'a> {
    fn new(telemetry: &'a Telemetry, table: &'a InFlight) -> Self {
        Self { telemetry, table, waiting: Moved::default(), last: Instant::now() }
    }

    fn advanced(&mut self, more: Moved) {
        self.waiting += more;
        if self.waiting.bytes >= TELL_BYTES || self.last.elapsed() >= TELL_EVERY {
            self.now();
        }
    }

    fn now(&mut self) {
        let waiting = std::mem::take(&mut self.waiting);
        self.table.advanced(waiting);
        self.telemetry.copy_advanced(&self.table.table().name, waiting.rows, waiting.bytes);
        self.last = Instant::now();
    }
}
