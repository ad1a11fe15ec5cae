//! The first copy: every row of the cut, from the source straight into the target.
//!
//! Owns the publications, the cut, the plan, the workers and the statistics afterwards. Promises that a table is
//! recorded as copied if and only if the target holds exactly the rows that its cut shows, whatever dies when.
//!
//! # Why a death at any moment is survived
//!
//! *A table that one worker copies* is emptied, filled and recorded as `copied` in one target transaction, small ones several of them.
//! It is there whole, with its cut, or not at all.
//!
//! *A table that is copied in parts* passes through three durable steps:
//!
//! 1. One transaction records it as `copying`, with its shape and what its ranges are of ([`division`]), and empties it. No unit begins
//!    before that is committed.
//! 2. Each unit commits its rows together with its record: which range of the table, as of which cut.
//! 3. Once the last unit is committed, one transaction records the table as `copied` under the cut that all of them have.
//!
//! Death before 1: the table is `pending` and untouched. Between 1 and 3: it is `copying`, and what its units say is what it
//! holds; the next run takes another cut, brings these units to it ([`resume`]), and copies the others. Where that cannot be done it
//! begins at 1 again. After 3: the table is whole. A unit of the dead run whose COMMIT is still on its way fails at the epoch,
//! as below, or holds the move's row of it until it is committed; so whoever reads the units sees all that there will ever be.
//!
//! A table that is `pending` was never touched by us. Rows in it are someone else's: an error, never a TRUNCATE.
//!
//! *Two daemons:* each transaction that changes a table's state also reads the move's epoch and fails if it is
//! another's; the row stays locked until the commit, so that a successor begins after it.
//!
//! *A table whose rows pass a CHECK of the user's own function*, on the table or on a type, may only be filled once what that
//! function reads is there: such tables begin when all others are committed.
//!
//! All workers import the snapshot before the first row is copied. From then on the walsender that exported it is not
//! needed, and a connection that is lost later ends this run, for its snapshot cannot be had again: the caller takes
//! another cut and runs the copy again, which leaves finished tables alone.

pub mod again;
mod analyze;
mod blockers;
pub mod by_hand;
pub mod cut;
pub mod division;
mod finish;
mod gone;
pub mod plan;
mod processors;
pub mod publication;
pub mod pump;
mod resume;
mod statements;
mod survey;
mod throttle;
mod worker;

use std::collections::{HashSet, VecDeque};
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

pub use analyze::analyze;
pub use finish::Finish;
pub(crate) use worker::holds_strange_rows;

use crate::config::{self, MoveName, Scope};
use crate::error::{Class, Doing, Error, Result};
use crate::follow::spool::Spooling;
use crate::postgres::catalog::{self, Table};
use crate::postgres::replication::{Cut, Walsender};
use crate::postgres::{QualifiedName, Server, Session, leftovers};
use crate::state::{FinishedUnit, Store};
use crate::telemetry::Telemetry;
use plan::{Manner, Plan, Planned, Unit};
use pump::Moved;
use survey::Survey;
use throttle::Throttle;
use worker::Worker;

/// What a copy needs.
#[derive(Clone)]
pub struct Context {
    /// Where the rows are.
    pub source: Server,
    /// Where they go.
    pub target: Server,
    /// The state of the move.
    pub store: Store,
    /// The number of this daemon, from [`crate::state::Leadership`].
    pub epoch: i64,
    /// Which tables move.
    pub scope: Scope,
    /// `[copy]`
    pub settings: config::Copy,
    /// Hears how far it is.
    pub telemetry: Telemetry,
    /// Schema changes come with the stream.
    pub captured: bool,
    /// Keeps changes while rows are copied.
    pub spooling: Spooling,
    /// Takes over what each table needs once it is copied.
    pub finish: Arc<Finish>,
    /// Stops it between two gulps.
    pub cancel: CancellationToken,
}

/// How the copy ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// Every table in scope is copied.
    Complete,
    /// It was told to stop. Finished tables stay.
    Stopped,
}

/// What the workers' sessions are called, on both sides.
const SESSIONS: &str = "copy";

/// How often the state hears how far tables in flight are, for `status`.
const REPORT_EVERY: Duration = Duration::from_secs(2);

/// The stop of a copy that was told to stop, where there is no better way to say it.
pub(super) fn stopped() -> Error {
    Error::new(Class::Retry, "stopped", "the copy was told to stop")
}

/// Copies every table in scope that the state does not know as copied, under `cut`, which `exporter` holds.
///
/// The publications must hold these tables since before the cut, and the cut must be recorded; see [`publication`] and
/// [`cut`]. Not to be dropped in the middle of a step: when it is, the connections go and the servers roll back.
///
/// # Errors
/// The first error of any worker, with its table; the others are stopped. Class retry: run it again under another
/// cut. Class operator: a table's shape changed, or a table of the target is not empty.
pub async fn run(context: &Context, exporter: Walsender, cut: &Cut) -> Result<Outcome> {
    tokio::select! {
        biased;
        () = context.cancel.cancelled() => Ok(Outcome::Stopped),
        done = copy(context, exporter, cut) => done.map(|()| Outcome::Complete),
    }
}

async fn copy(context: &Context, exporter: Walsender, cut: &Cut) -> Result<()> {
    // What an earlier run of this daemon still commits would not be in what is read next.
    let session = context.target.connect("control").await?;
    leftovers::end(&session, &context.target.application_name(SESSIONS)).await?;
    drop(session);
    let mut survey = Survey::take(context, cut).await?;
    survey.tell(context);
    survey.copied().for_each(|table| context.finish.begin(table));
    let mut plan = survey.plan(&context.settings);
    if plan.tables.is_empty() {
        exporter.close().await;
        return Ok(());
    }
    // One that goes on may turn out to begin anew, with many more units.
    let goes_on = plan.tables.iter().any(|planned| matches!(planned.manner, Manner::Rest(..)));
    let count = context.settings.workers.get().min(if goes_on { usize::MAX } else { plan.units.len() });
    let mut workers = connect(context, cut, count).await?;
    exporter.close().await;
    if let Some(worker) = workers.first_mut().filter(|_| goes_on) {
        let lost = resume::settle(context, cut, &plan, worker).await?;
        if !lost.is_empty() {
            lost.iter().for_each(|table| survey.begin_anew(table));
            survey.tell(context);
            plan = survey.plan(&context.settings);
        }
    }
    tracing::info!(tables = plan.tables.len(), units = plan.units.len(), workers = count, "copying");
    let job = Arc::new(Job::new(context.clone(), cut.clone(), plan));
    worker::open_divided_tables(&job).await?;
    // Those that are late begin once all others are committed.
    let all = async {
        let workers = work(workers, &job, false).await?;
        let workers = work(workers, &job, true).await?;
        futures_util::future::join_all(workers.into_iter().map(Worker::close)).await;
        Ok(())
    };
    tokio::select! {
        done = all => done,
        never = report(&job) => match never {},
    }
}

/// Has the workers do what is there to do, until nothing of it is left.
async fn work(workers: Vec<Worker>, job: &Arc<Job>, late: bool) -> Result<Vec<Worker>> {
    // Dropping the set, at the first error or when this is dropped, ends the others.
    let mut running: JoinSet<Result<Worker>> = JoinSet::new();
    for worker in workers {
        running.spawn(worker.work(Arc::clone(job), late));
    }
    let mut workers = Vec::new();
    while let Some(done) = running.join_next().await {
        workers.push(done.map_err(|e| Error::bug(format!("a copy worker ended: {e}")))??);
    }
    Ok(workers)
}

/// Tables that are copied after all others; see [`statements::CHECKED_BY_FUNCTIONS`].
pub(crate) async fn late(session: &Session) -> Result<HashSet<u32>> {
    let rows = session
        .query(statements::CHECKED_BY_FUNCTIONS, &[])
        .await
        .doing(|| "looking for checks that call functions")?;
    rows.iter().map(|row| Ok(row.try_get(0)?)).collect()
}

/// The tables in scope as a cut shows them, each of them published since before it.
///
/// # Errors
/// Class retry: one was made while the cut was taken; under another one it is in place.
pub async fn tables_of_cut(source: &Server, scope: &Scope, name: &MoveName, cut: &Cut) -> Result<Vec<Table>> {
    let session = source.connect("copy").await?;
    let tables = shown(&session, scope, name, cut, &HashSet::new()).await?;
    session.batch_execute("COMMIT").await?;
    Ok(tables)
}

/// Makes sure that the cut still shows every row of its tables: a TRUNCATE or an ALTER TABLE that rewrites leaves nothing
/// of a table for those who look at it through an older snapshot. Asked after the rows were read.
///
/// # Errors
/// Class retry: a table was rewritten since the cut, so what was read of it may be nothing at all.
pub async fn nothing_rewritten(source: &Server, snapshot: &str, tables: &[Table]) -> Result<()> {
    let session = source.connect("copy").await?;
    session.batch_execute(&statements::import_snapshot(snapshot)).await.doing(|| "importing the snapshot")?;
    let oids: Vec<u32> = tables.iter().map(|table| table.oid).collect();
    let rewritten = session.query(statements::REWRITTEN, &[&oids]).await.doing(|| "looking for rewritten tables")?;
    session.batch_execute("COMMIT").await?;
    let Some(row) = rewritten.first() else { return Ok(()) };
    let oid: u32 = row.try_get(0)?;
    let name = tables.iter().find(|table| table.oid == oid).map(|table| table.name.plain()).unwrap_or_default();
    Err(worker::rewritten().doing(format!("reading the table {name}")))
}

/// As [`tables_of_cut`], but for those that are copied already; the session stays in the transaction that sees the cut.
async fn shown(
    session: &Session,
    scope: &Scope,
    name: &MoveName,
    cut: &Cut,
    copied: &HashSet<QualifiedName>,
) -> Result<Vec<Table>> {
    session.batch_execute(&statements::import_snapshot(&cut.snapshot)).await.doing(|| "importing the snapshot")?;
    let tables = catalog::tables_in_scope(&**session, scope).await?;
    let unpublished = publication::unpublished(&**session, name.publications(), &tables).await?;
    match unpublished.iter().find(|table| !copied.contains(table)) {
        None => Ok(tables),
        Some(table) => Err(Error::new(
            Class::Retry,
            "table_made_meanwhile",
            format!("the table {} came or went while the cut was taken; another one is taken", table.plain()),
        )),
    }
}

/// `server_version_num`
pub(crate) async fn version(session: &Session) -> Result<i32> {
    let row = session.query_one("SELECT pg_catalog.current_setting('server_version_num')::int4", &[]).await?;
    Ok(row.try_get(0)?)
}

/// All workers, each with the snapshot imported.
async fn connect(context: &Context, cut: &Cut, count: usize) -> Result<Vec<Worker>> {
    let connecting = (0..count).map(|_| Worker::connect(context, cut));
    futures_util::future::try_join_all(connecting).await
}

/// What all workers of a run share.
struct Job {
    context: Context,
    cut: Cut,
    tables: Vec<InFlight>,
    queue: Mutex<VecDeque<Unit>>,
    throttle: Throttle,
}

/// A planned table and how far it is.
struct InFlight {
    planned: Planned,
    parts_left: AtomicUsize,
    rows: AtomicU64,
    bytes: AtomicU64,
    touched: AtomicBool,
}

impl Job {
    fn new(context: Context, cut: Cut, plan: Plan) -> Self {
        let tables = plan.tables.into_iter().map(InFlight::new).collect();
        let throttle = Throttle::new(context.settings.max_bytes_per_second);
        Self { context, cut, tables, queue: Mutex::new(plan.units.into()), throttle }
    }

    fn next(&self, late: bool) -> Option<Unit> {
        self.queue().pop_front_if(|unit| unit.late == late)
    }

    /// Somebody holds one of these tables. They come again one by one, behind all others of their kind, so that it holds up nobody else.
    fn give_back(&self, unit: &Unit) {
        let mut queue = self.queue();
        let behind = queue.iter().position(|other| other.late != unit.late).unwrap_or(queue.len());
        for alone in unit.alone().into_iter().rev() {
            queue.insert(behind, alone);
        }
    }

    fn queue(&self) -> MutexGuard<'_, VecDeque<Unit>> {
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn table(&self, at: usize) -> Result<&InFlight> {
        self.tables.get(at).ok_or_else(|| Error::bug("a unit without a table"))
    }
}

impl InFlight {
    fn new(planned: Planned) -> Self {
        let there: &[FinishedUnit] = match &planned.manner {
            Manner::Rest(_, units) => units,
            Manner::Whole | Manner::Parts(_) => &[],
        };
        let Moved { rows, bytes } = plan::total(there);
        let touched = !there.is_empty();
        Self {
            parts_left: AtomicUsize::new(planned.parts),
            planned,
            rows: AtomicU64::new(rows),
            bytes: AtomicU64::new(bytes),
            touched: AtomicBool::new(touched),
        }
    }

    fn table(&self) -> &Table {
        &self.planned.of.table
    }

    fn advanced(&self, more: Moved) {
        self.rows.fetch_add(more.rows, Ordering::Relaxed);
        self.bytes.fetch_add(more.bytes, Ordering::Relaxed);
    }

    fn so_far(&self) -> Moved {
        Moved { rows: self.rows.load(Ordering::Relaxed), bytes: self.bytes.load(Ordering::Relaxed) }
    }
}

/// Keeps the state informed about tables in flight. Never ends, and never holds the copy up.
async fn report(job: &Job) -> std::convert::Infallible {
    loop {
        tokio::time::sleep(REPORT_EVERY).await;
        let in_flight: Vec<_> = job
            .tables
            .iter()
            .filter(|t| t.touched.load(Ordering::Relaxed) && t.parts_left.load(Ordering::Relaxed) > 0)
            .map(|t| (t.table().name.clone(), t.so_far().rows, t.so_far().bytes))
            .collect();
        if let Err(error) = job.context.store.report_copying(&in_flight).await {
            tracing::debug!(%error, "cannot report how far the copy is");
        }
    }
}
