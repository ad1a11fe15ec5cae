//! The hand on the target: runs changes inside one transaction, and commits them with progress.
//!
//! Whole sets of rows go out as a few statements behind a savepoint (see [`super::net`]). If the server refuses one, or one finds
//! another number of rows than it should, everything since the savepoint is undone and the changes are applied again with
//! that table one by one: what cannot be applied in that way either is an error that names the row.

use std::collections::HashSet;
use std::sync::Arc;
use std::time::Instant;

use super::change::Change;
use super::net::{Group, How, Stage, stages};
use super::pipeline::{Mismatch, Pipeline, Purpose, StatementKey};
use super::relation::Plan;
use super::shares::Division;
use crate::config::{MissingRow, MoveName};
use crate::error::{Class, Error, Result};
use crate::postgres::{Lsn, quote_literal};
use crate::state::split_json;
use crate::telemetry::{BatchApplied, Telemetry};

/// So many tables are tried to be taken out of the sets, one after the other, before all of them are.
const TRIES: usize = 3;

/// No worker can wait for another one, see [`super::lanes`]. Were it to happen all the same, neither would ever know; so a share that has waited for so
/// long is given up.
const WAIT_LITTLE: &str = "SET LOCAL lock_timeout = '20s'";

/// What is applied early can as well be applied later: it waits for nobody, while the stream behind it does.
const WAIT_BRIEFLY: &str = "SET LOCAL lock_timeout = '3s'";
const WAIT_AS_EVER: &str = "SET LOCAL lock_timeout TO DEFAULT";

const SAVEPOINT: &str = "SAVEPOINT pgtandem_sets";
const RELEASE: &str = "RELEASE SAVEPOINT pgtandem_sets";
const ROLLBACK: &str = "ROLLBACK TO SAVEPOINT pgtandem_sets";

/// See the module's first lines.
pub(super) struct Executor {
    pub pipeline: Pipeline,
    pub move_name: MoveName,
    pub epoch: i64,
    pub missing_row: MissingRow,
    pub telemetry: Telemetry,
    /// Which worker this is. The first, 0, commits with the progress of the move; the others with their own.
    pub worker: u16,
    /// When the open target transaction began.
    pub open: Option<Instant>,
}

/// What is run at once: a stretch of the stream, and its end if it is one at which the target may commit.
#[derive(Debug, Default)]
pub(super) struct Work {
    pub changes: Vec<Change>,
    pub end: Option<End>,
    /// How the batch is divided of which the changes are one worker's share.
    pub division: Option<Arc<Division>>,
    /// The changes belong to a transaction that has not committed yet.
    pub early: bool,
}

/// The end of a batch.
#[derive(Clone, Copy, Debug)]
pub(super) struct End {
    /// Where progress will be, and the commit time that goes with it.
    pub lsn: Lsn,
    pub commit_micros: Option<i64>,
    /// The marker that is part of it.
    pub marker: Option<u64>,
    pub applied: BatchApplied,
    /// The commit waits until it cannot be lost any more.
    pub durable: bool,
}

impl Executor {
    /// Runs the work; the end that is durable now, if it had one.
    pub(super) async fn run(&mut self, work: &Work) -> Result<Option<End>> {
        let is_new = self.open.is_none();
        self.begin().await?;
        if work.early && is_new {
            self.own(WAIT_BRIEFLY).await?;
        }
        if work.division.is_some() && work.end.is_none() {
            self.own(WAIT_LITTLE).await?;
        }
        self.apply(&work.changes).await?;
        let Some(mut end) = work.end else {
            match work.division {
                None if work.early => self.nothing_missing().await?,
                None => self.pipeline.send().await?,
                Some(_) => self.complete().await?,
            }
            return Ok(None);
        };
        if !end.durable {
            self.own("SET LOCAL synchronous_commit = off").await?;
        }
        self.advance(&end, work.division.as_deref()).await?;
        self.pipeline.commit().await?;
        end.applied.duration = self.open.take().map(|begun| begun.elapsed()).unwrap_or_default();
        Ok(Some(end))
    }

    /// Takes what was applied early for a batch that begins here and has all its changes; tells the progress that its session sees.
    pub(super) async fn adopt(&mut self) -> Result<Lsn> {
        if self.open.is_some() {
            self.own(WAIT_AS_EVER).await?;
            // How long the source took to commit it is not the batch's duration.
            self.open = Some(Instant::now());
        }
        let sql =
            format!("SELECT lsn::text FROM pgtandem.progress WHERE move = {}", quote_literal(self.move_name.as_str()));
        let rows = self.pipeline.query(&sql).await?;
        let progress = rows.into_iter().flatten().flatten().next().unwrap_or_default();
        progress.parse().map_err(|_| Error::bug(format!("progress is {progress:?}")))
    }

    /// Reads every answer; everything that was to be found was.
    async fn nothing_missing(&mut self) -> Result<()> {
        self.pipeline.settle().await?;
        match self.pipeline.missing() {
            0 => Ok(()),
            missing => {
                let message = format!("{missing} rows were not found on the target");
                Err(Error::new(Class::Operator, "row_missing", message))
            }
        }
    }

    /// Reads every answer, and rolls back what is open.
    pub(super) async fn roll_back(&mut self) -> Result<()> {
        if self.open.is_some() {
            self.pipeline.query("ROLLBACK").await?;
            self.pipeline.forget_missing(0);
            self.pipeline.unguided();
            self.open = None;
        }
        Ok(())
    }

    /// Reads every answer: afterwards nothing but the commit can fail.
    async fn complete(&mut self) -> Result<()> {
        self.pipeline.settle().await?;
        if self.pipeline.missing() > 0 {
            self.missing_rows().await?;
            self.pipeline.settle().await?;
        }
        Ok(())
    }

    /// Opens the target transaction, if none is open.
    pub(super) async fn begin(&mut self) -> Result<()> {
        if self.open.is_some() {
            return Ok(());
        }
        self.open = Some(Instant::now());
        self.own("BEGIN").await?;
        // Within a transaction of the source a deferrable constraint may have been broken for a while.
        self.own("SET CONSTRAINTS ALL DEFERRED").await
    }

    async fn own(&mut self, sql: &'static str) -> Result<()> {
        let key = StatementKey::Own(sql);
        self.pipeline.execute(key, || sql.to_owned(), std::iter::empty(), Purpose::Own(sql)).await
    }

    /// Applies the changes.
    async fn apply(&mut self, changes: &[Change]) -> Result<()> {
        let observed = changes.iter().any(|change| change.plan.observed);
        // Tables that are taken out of the sets for this stretch.
        let mut ordered: HashSet<u64> = HashSet::new();
        while !observed && ordered.len() < TRIES {
            let stages = stages(changes, |plan| plan.sets.are_paused() || ordered.contains(&plan.generation));
            let sets = groups(&stages).any(|group| !matches!(group.how, How::Ordered(_)));
            if !sets {
                groups(&stages).for_each(|group| group.plan.sets.next());
                break;
            }
            self.own(SAVEPOINT).await?;
            // What was not found before the savepoint stays not found.
            self.pipeline.settle().await?;
            let missing = self.pipeline.missing();
            let Some((error, culprit)) = self.try_sets(&stages).await? else {
                groups(&stages).for_each(|group| group.plan.sets.next());
                // What is not a set may run somebody's trigger, whose own statements are the planner's.
                self.pipeline.guide(false).await?;
                return self.own(RELEASE).await;
            };
            self.telemetry.fallback(reason(&error));
            self.own(ROLLBACK).await?;
            self.pipeline.unguided();
            self.pipeline.forget_missing(missing);
            // A statement for a single row was refused: it may want the order of all tables, as a CHECK does that reads another one.
            let Some(culprit) = culprit else {
                tracing::debug!(%error, "a stretch is applied one by one");
                break;
            };
            tracing::debug!(%error, "the changes of {} are applied one by one", culprit.name.plain());
            culprit.sets.refused();
            ordered.insert(culprit.generation);
        }
        for change in changes {
            self.pipeline.change(change).await?;
        }
        Ok(())
    }

    /// Runs what follows a savepoint, and reads every answer. If a statement did not do what it should, and that may
    /// be for the want of order: the error, and the table if it was for a set of its rows.
    async fn try_sets(&mut self, stages: &[Stage<'_>]) -> Result<Option<(Error, Option<Arc<Plan>>)>> {
        let error = match self.sets(stages).await {
            Ok(()) => match self.pipeline.take_mismatch() {
                None => return Ok(None),
                Some(Mismatch { plan, what, expected, found }) => {
                    let message = format!("{expected} {what} found {found} rows in table {}", plan.name.plain());
                    return Ok(Some((Error::new(Class::Operator, "row_missing", message), Some(plan))));
                }
            },
            Err(error) => error,
        };
        // A deadlock, a full disk or a lost connection would meet the ordered path as well.
        let culprit = self.pipeline.take_refused();
        if error.class() != Class::Operator || error.sqlstate().is_none() {
            return Err(error);
        }
        self.pipeline.recover().await?;
        Ok(Some((error, culprit)))
    }

    async fn sets(&mut self, stages: &[Stage<'_>]) -> Result<()> {
        for stage in stages {
            match stage {
                Stage::Truncate(change) => self.pipeline.change(change).await?,
                Stage::Tables(groups) => {
                    for group in groups {
                        match &group.how {
                            How::Ordered(changes) => {
                                for change in changes {
                                    self.pipeline.change(change).await?;
                                }
                            }
                            How::Keyed(net) => self.pipeline.keyed(group.plan, net).await?,
                            How::Alike(net) => self.pipeline.alike(group.plan, net).await?,
                        }
                    }
                }
            }
        }
        self.pipeline.settle().await
    }

    /// Writes progress as the last statement of the batch, after all others were answered.
    async fn advance(&mut self, end: &End, division: Option<&Division>) -> Result<()> {
        match division.filter(|_| self.worker > 0) {
            Some(division) => self.advance_worker(end, division).await?,
            None => self.advance_move(end).await?,
        }
        self.pipeline.settle().await?;
        if self.pipeline.own_count() != 1 {
            return Err(Error::new(
                Class::Retry,
                "leadership_lost",
                format!(
                    "progress could not be advanced to {}: another daemon took this move, or progress is beyond",
                    end.lsn
                ),
            ));
        }
        self.complete().await
    }

    async fn advance_move(&mut self, end: &End) -> Result<()> {
        let values = [
            self.move_name.as_str().to_owned(),
            self.epoch.to_string(),
            end.lsn.to_string(),
            end.commit_micros.map(|micros| micros.to_string()).unwrap_or_default(),
            end.applied.transactions.to_string(),
            end.applied.changes().to_string(),
        ];
        self.write_down("progress", PROGRESS, &values).await
    }

    async fn advance_worker(&mut self, end: &End, division: &Division) -> Result<()> {
        let values = [
            self.move_name.as_str().to_owned(),
            self.epoch.to_string(),
            end.lsn.to_string(),
            self.worker.to_string(),
            division.workers.to_string(),
            split_json(&division.split),
        ];
        self.write_down("worker's progress", WORKER_PROGRESS, &values).await
    }

    /// An empty value stands for NULL.
    async fn write_down(&mut self, what: &'static str, sql: &str, values: &[String]) -> Result<()> {
        let values = values.iter().map(|value| (!value.is_empty()).then_some(value.as_bytes()));
        self.pipeline.execute(StatementKey::Own(what), || sql.to_owned(), values, Purpose::Own(what)).await
    }

    async fn missing_rows(&mut self) -> Result<()> {
        let missing = self.pipeline.take_missing();
        if self.missing_row == MissingRow::Stop
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
            let sql: Arc<str> = format!(
                "INSERT INTO pgtandem.missing_row (move, table_name, operation, lsn, xid) VALUES ({}, {}, '{}', '{}', {})",
                quote_literal(self.move_name.as_str()),
                quote_literal(&row.table.plain()),
                row.operation.as_str(),
                row.at.commit_lsn,
                row.at.xid
            )
            .into();
            let key = StatementKey::Text(Arc::clone(&sql));
            self.pipeline.execute(key, || sql.to_string(), std::iter::empty(), Purpose::Own("missing row")).await?;
            self.telemetry.missing_row(&row.table);
        }
        Ok(())
    }
}

/// Of a statement for a set that did not do what it should, as a label.
fn reason(error: &Error) -> &'static str {
    match error.sqlstate() {
        None => "rows_not_found",
        Some("23505") => "unique_violation",
        Some("23P01") => "exclusion_violation",
        Some(_) => "refused",
    }
}

fn groups<'s, 'c>(stages: &'s [Stage<'c>]) -> impl Iterator<Item = &'s Group<'c>> {
    stages.iter().flat_map(|stage| match stage {
        Stage::Tables(groups) => groups.as_slice(),
        Stage::Truncate(_) => &[],
    })
}

/// `$1` move, `$2` epoch, `$3` LSN, `$4` commit time in microseconds since 1970 or NULL, `$5` transactions, `$6` changes.
const PROGRESS: &str = "\
    UPDATE pgtandem.progress
    SET lsn = $3,
        commit_time = COALESCE(timestamptz 'epoch' + $4::int8 * interval '1 microsecond', commit_time),
        transactions = transactions + $5::int8,
        changes = changes + $6::int8
    WHERE move = $1 AND epoch = $2::int8 AND lsn <= $3::pg_lsn";

/// `$1` move, `$2` epoch, `$3` LSN, `$4` worker, `$5` among how many, `$6` the tables that are split.
///
/// The lock keeps a successor from raising the epoch, and from reading how far the workers are, until this is committed or not.
const WORKER_PROGRESS: &str = "\
    WITH led AS MATERIALIZED (
        SELECT FROM pgtandem.progress WHERE move = $1 AND epoch = $2::int8 AND lsn <= $3::pg_lsn FOR SHARE)
    INSERT INTO pgtandem.worker_progress (move, worker, workers, lsn, split)
    SELECT $1, $4::int4, $5::int4, $3::pg_lsn, $6::jsonb FROM led
    ON CONFLICT (move, worker) DO UPDATE
        SET workers = excluded.workers, lsn = excluded.lsn, split = excluded.split";
