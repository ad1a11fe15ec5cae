//! What can be seen from outside: metrics, status, HTTP, logs, progress bars.
//!
//! The rest of the code reports what happened, once, through [`Telemetry`]; how it is shown is decided here. Each report
//! writes its log line and counts its metric in the same place, so that both always agree. No call blocks, waits or
//! fails: seeing must never hold up moving. Nothing shown holds a password ([`redact`]) or the data of a row.

mod archive;
mod eta;
pub mod http;
pub mod lag;
pub mod logs;
pub mod metrics;
mod model;
pub mod progress;
mod rate;
pub mod redact;
pub mod sampler;
pub mod status;
#[cfg(test)]
mod tests;
mod text;
mod wal;

use std::fmt;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock};
use std::time::{Duration, Instant, SystemTime};

use tokio::sync::watch;
use tracing::{error, info, warn};

use crate::config::MoveName;
use crate::error::{Class, Error, Result};
use crate::postgres::{Lsn, QualifiedName, Side};
use crate::state::{Phase, TableState};
pub use eta::Way;
use metrics::{LABELLED_TABLES, Metrics, OTHER_TABLES};
pub use model::Recorded;
use model::{CopySums, Model, Positions, TableProgress, Tables, sums, table_status};
use status::{ApplyStatus, CopyStatus, LagStatus, Problem, Status, StepStatus, TableStatus, TargetStatus};

/// Takes reports from everywhere. Cheap to clone.
#[derive(Clone)]
pub struct Telemetry(Arc<Inner>);

struct Inner {
    name: String,
    max_lag: Duration,
    metrics: Metrics,
    positions: Positions,
    tables: RwLock<Tables>,
    /// Bytes of rows that this process moved, into an archive or into the target.
    moved: AtomicU64,
    model: Mutex<Model>,
    scraped: watch::Sender<Option<Instant>>,
}

/// A reason why the move cannot go on or be cut over, for status and metrics.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Blocker {
    /// Stable snake_case word.
    pub code: &'static str,
    /// What is wrong.
    pub message: String,
    /// What to do about it.
    pub hint: String,
}

impl Blocker {
    /// As it is kept in the state.
    #[must_use]
    pub fn to_json(&self) -> serde_json::Value {
        serde_json::json!({"code": self.code, "message": self.message, "hint": self.hint})
    }
}

/// What a batch changed on the target, reported after its commit.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct BatchApplied {
    /// Source transactions.
    pub transactions: u64,
    /// Rows inserted.
    pub inserts: u64,
    /// Rows updated.
    pub updates: u64,
    /// Rows deleted.
    pub deletes: u64,
    /// TRUNCATE statements.
    pub truncates: u64,
    /// From the first statement to the commit.
    pub duration: Duration,
}

/// What the source said about itself, about once a second.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct SourceSample {
    /// `server_version`, as the server prints it.
    pub version: String,
    /// `pg_current_wal_lsn()`
    pub head: Lsn,
    /// The source's clock at that moment, microseconds since 1970.
    pub now_micros: i64,
    /// The slot's name.
    pub slot: String,
    /// `pg_replication_slots.active`
    pub slot_active: bool,
    /// `confirmed_flush_lsn`
    pub confirmed: Option<Lsn>,
    /// Bytes of WAL kept because of the slot.
    pub retained_wal_bytes: Option<u64>,
    /// `safe_wal_size`; `None` without `max_slot_wal_keep_size`.
    pub safe_wal_bytes: Option<i64>,
    /// `max_slot_wal_keep_size` in bytes; `None` where it is -1.
    pub wal_limit_bytes: Option<u64>,
    /// `wal_status`: reserved, extended, unreserved, lost.
    pub wal_status: Option<String>,
    /// `pg_stat_replication.sent_lsn` of our walsender.
    pub sent: Option<Lsn>,
}

/// The copy and the following in a few numbers, for bars and log lines.
#[derive(Clone, Debug)]
pub struct Overview {
    /// Where the move stands.
    pub phase: Phase,
    /// What the daemon does next to copying rows.
    pub activity: Option<String>,
    /// All tables together.
    pub copy: CopyStatus,
    /// How the rows travel.
    pub way: Way,
    /// Tables whose rows are in the archive.
    pub tables_dumped: u64,
    /// Bytes that COPY will still print on this way, as far as the finished tables tell.
    pub copy_bytes_left: u64,
    /// Tables whose rows are on their way, with the source's size of each.
    pub in_flight: Vec<(TableStatus, u64)>,
    /// Behind the source.
    pub lag: LagStatus,
    /// Source transactions applied each second.
    pub transactions_per_second: Option<f64>,
}

impl Telemetry {
    /// For one move; ready within `max_lag`.
    #[must_use]
    pub fn new(name: &MoveName, max_lag: Duration) -> Self {
        Self::named(name.as_str().to_owned(), max_lag)
    }

    fn named(name: String, max_lag: Duration) -> Self {
        Self(Arc::new(Inner {
            name,
            max_lag,
            metrics: Metrics::new(),
            positions: Positions::default(),
            tables: RwLock::default(),
            moved: AtomicU64::new(0),
            model: Mutex::default(),
            scraped: watch::Sender::default(),
        }))
    }

    /// What the state in the target already knows, reported once when a daemon takes the move: phase and since when,
    /// tables, progress, totals, the last cutover.
    pub fn resumed(&self, recorded: &Recorded) {
        self.tables_recorded(&recorded.tables);
        let progress = &recorded.progress;
        if progress.lsn > Lsn::ZERO {
            self.0.positions.set_applied(progress.lsn, progress.commit_micros);
        }
        let mut model = self.model();
        model.phase = recorded.record.phase;
        model.phase_since = Some(recorded.record.phase_since.clone());
        model.base = (progress.transactions, progress.changes);
        model.error = recorded.record.error.as_ref().map(Problem::from_value);
        model.blockers = recorded.record.blockers.iter().map(Problem::from_value).collect();
        model.cutover = recorded.cutover.as_ref().map(Into::into).unwrap_or_default();
    }

    /// The move entered a phase.
    pub fn phase(&self, phase: Phase) {
        let mut model = self.model();
        if model.phase == phase && model.phase_since.is_some() {
            return;
        }
        model.phase = phase;
        model.phase_since = Some(humantime::format_rfc3339_millis(SystemTime::now()).to_string());
        model.activity = None;
        drop(model);
        info!(phase = phase.as_str(), "entering phase {phase}");
    }

    /// What blocks the move now; empty: nothing.
    pub fn blockers(&self, blockers: &[Blocker]) {
        let blockers: Vec<Problem> = blockers.iter().map(Problem::from).collect();
        let mut model = self.model();
        let new: Vec<_> = blockers.iter().filter(|blocker| !model.blockers.contains(blocker)).cloned().collect();
        let lifted = blockers.is_empty() && !model.blockers.is_empty();
        model.blockers = blockers;
        drop(model);
        for blocker in new {
            warn!(code = blocker.code, hint = blocker.hint, "blocked: {}", blocker.message);
        }
        if lifted {
            info!("nothing blocks the move any more");
        }
    }

    /// The target's `server_version`.
    pub fn target_version(&self, version: &str) {
        self.model().target_version = Some(redact::shown(version));
    }

    /// A table is part of the copy: its state, rows and bytes so far, and the source's size of it in bytes.
    pub fn copy_table(&self, table: &QualifiedName, state: TableState, rows: u64, bytes: u64, bytes_total: u64) {
        self.set_table(table, state, rows, bytes, bytes_total);
    }

    /// A table's copy changed state. One that is pending again begins at zero.
    pub fn copy_state(&self, table: &QualifiedName, state: TableState) {
        let progress = self.table(table);
        let before = progress.set_state(state);
        match state {
            TableState::Pending => progress.set_counts(0, 0),
            TableState::Copied if before != state => {
                info!(
                    table = table.plain(),
                    rows = progress.rows(),
                    bytes = progress.bytes(),
                    "copied {}",
                    table.plain()
                );
            }
            TableState::Copying | TableState::Copied => {}
        }
    }

    /// Rows and bytes of a table were sent to the target since the last report.
    pub fn copy_advanced(&self, table: &QualifiedName, rows: u64, bytes: u64) {
        self.table(table).advance(rows, bytes);
        self.0.moved.fetch_add(bytes, Ordering::Relaxed);
    }

    /// What the daemon does next to copying rows ("building indexes", "gathering statistics"), for bars and log.
    pub fn activity(&self, text: &str) {
        let text = redact::shown(text);
        if !text.is_empty() {
            info!("{text}");
        }
        self.model().activity = Some(text).filter(|text| !text.is_empty());
    }

    /// The stream was read up to here.
    pub fn received(&self, lsn: Lsn) {
        self.0.positions.set_received(lsn);
    }

    /// Progress is durable up to here; commit time of the last applied transaction in microseconds since 1970.
    pub fn applied(&self, lsn: Lsn, commit_micros: Option<i64>) {
        self.0.positions.set_applied(lsn, commit_micros);
    }

    /// A transaction became durable on the target just now; its commit time in microseconds since 1970.
    pub fn arrived(&self, commit_micros: i64) {
        self.0.positions.arrived(commit_micros);
    }

    /// The source was told that it may forget everything before this.
    pub fn confirmed(&self, lsn: Lsn) {
        self.0.positions.set_confirmed(lsn);
    }

    /// A batch was committed on the target.
    pub fn batch(&self, batch: BatchApplied) {
        let metrics = &self.0.metrics;
        metrics.transactions.inc_by(batch.transactions);
        for (operation, count) in batch.by_operation() {
            metrics::add(&metrics.changes, operation, count);
        }
        metrics.batch_duration.observe(batch.duration.as_secs_f64());
        metrics.batch_changes.observe(batch.changes() as f64);
    }

    /// A batch took a slower path.
    pub fn fallback(&self, reason: &'static str) {
        metrics::add(&self.0.metrics.fallbacks, reason, 1);
        tracing::debug!(reason, "a batch took a slower path");
    }

    /// The reasons that [`Telemetry::fallback`] may be called with: their counters begin at 0.
    pub fn fallback_reasons(&self, reasons: &[&'static str]) {
        for reason in reasons {
            metrics::add(&self.0.metrics.fallbacks, reason, 0);
        }
    }

    /// Bytes waiting in a queue.
    pub fn queue(&self, queue: &'static str, bytes: u64) {
        metrics::set(&self.0.metrics.queue_bytes, queue, bytes as f64);
    }

    /// The source was sampled.
    pub fn source(&self, sample: SourceSample) {
        let now = Instant::now();
        let sums = self.sums();
        let transactions = self.0.metrics.transactions.get();
        let mut model = self.model();
        self.0.positions.set_clock(sample.now_micros);
        model.wal.observe(now, &sample, sums.bytes_total);
        model.sampled(sample, now);
        if let Some(applied) = self.0.positions.applied() {
            model.lag.reached(applied);
        }
        self.observe_pace(&mut model, now);
        model.apply_rate.observe(now, transactions);
    }

    /// Logs what became of the WAL that the slot keeps, once for each step on the way to trouble.
    pub fn warn_of_wal(&self) {
        let news = self.model().wal.news();
        if let Some(Problem { code, message, hint }) = news {
            warn!(code, hint, "{message}");
        }
    }

    /// The source does not answer; until it does, nothing is known of it.
    pub fn source_lost(&self) {
        self.model().source_lost();
    }

    /// An error was handled: another try follows, or a wait.
    pub fn error(&self, error: &Error) {
        self.0.metrics.error(error.class(), error.sqlstate().unwrap_or_default(), 1);
        let problem = Problem::from(error);
        self.model().logged = Some(problem.message.clone());
        let (class, code, hint) = (error.class().as_str(), error.code(), problem.hint);
        match error.class() {
            Class::Operator | Class::Bug => error!(class, code, hint, "{}", problem.message),
            _ => warn!(class, code, hint, "{}", problem.message),
        }
    }

    /// The error that the move stands on now, or that it was overcome.
    pub fn standing_error(&self, error: Option<&Error>) {
        let problem = error.map(Problem::from);
        let mut model = self.model();
        if model.error == problem {
            return;
        }
        let known = problem.as_ref().is_none_or(|problem| model.logged.as_ref() == Some(&problem.message));
        model.error.clone_from(&problem);
        drop(model);
        match problem {
            Some(problem) if !known => error!(code = problem.code, hint = problem.hint, "{}", problem.message),
            Some(_) => {}
            None => info!("the error was overcome"),
        }
    }

    /// A connection was lost and made again.
    pub fn reconnected(&self, side: Side) {
        metrics::add(&self.0.metrics.reconnects, side.as_str(), 1);
        info!(side = side.as_str(), "connected to the {} again", side.as_str());
    }

    /// An update or delete found no row, under `follow.missing_row = "record"`.
    pub fn missing_row(&self, table: &QualifiedName) {
        metrics::add(&self.0.metrics.missing_rows, &self.table_label(table), 1);
        warn!(table = table.plain(), "a change of {} found no row on the target", table.plain());
    }

    /// A table was compared on both sides: how many rows differ.
    pub fn compared(&self, table: &QualifiedName, different_rows: u64) {
        metrics::set(&self.0.metrics.different_rows, &self.table_label(table), different_rows as f64);
        if different_rows > 0 {
            error!(table = table.plain(), different_rows, "{} differs in {different_rows} rows", table.plain());
        }
    }

    /// All tables were compared and are equal.
    pub fn verified(&self) {
        let since = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
        self.0.metrics.verified.set(Some(since.as_secs_f64()));
        info!("both sides are equal");
    }

    /// A cutover began (`None`), or ended in this state: `aborted`, `done`.
    pub fn cutover(&self, outcome: Option<&str>) {
        let mut model = self.model();
        match outcome {
            None => model.cutover = status::CutoverStatus { state: Some("preparing".to_owned()), ..Default::default() },
            Some(state) => model.cutover.state = Some(state.to_owned()),
        }
        drop(model);
        match outcome {
            None => info!("the cutover begins"),
            Some(state) => info!(state, "the cutover is {state}"),
        }
    }

    /// A step of the cutover changed: `running`, `done`, `failed`, `skipped`.
    pub fn cutover_step(&self, name: &str, state: &str, seconds: Option<f64>) {
        if let Some(seconds) = seconds {
            metrics::set(&self.0.metrics.cutover_step, name, seconds);
        }
        let step = StepStatus { name: name.to_owned(), state: state.to_owned(), seconds };
        let mut model = self.model();
        match model.cutover.steps.iter_mut().find(|known| known.name == name) {
            Some(known) => *known = step,
            None => model.cutover.steps.push(step),
        }
        drop(model);
        info!(step = name, state, seconds, "cutover step {name}: {state}");
    }

    /// From the first refused write on the source to the first accepted one on the target.
    pub fn write_pause(&self, pause: Duration) {
        let seconds = pause.as_secs_f64();
        self.model().cutover.write_pause_seconds = Some(seconds);
        info!(seconds, "writes paused for {seconds:.3} s");
    }

    /// Whether lag is below `cutover.max_lag` while following, and nothing blocks.
    #[must_use]
    pub fn ready(&self) -> bool {
        self.readiness().is_ok()
    }

    /// Like [`Telemetry::ready`], with the reason against it.
    ///
    /// # Errors
    /// A sentence that says why not.
    pub fn readiness(&self) -> Result<(), String> {
        self.model().readiness(&self.0.positions, self.0.max_lag)
    }

    /// Where the move stands.
    #[must_use]
    pub fn status(&self) -> Status {
        let sums = self.observe();
        let tables = self.read_tables(|tables| tables.iter().map(|(name, table)| table_status(name, table)).collect());
        let applied = self.applied_here();
        let model = self.model();
        let readiness = model.readiness(&self.0.positions, self.0.max_lag);
        Status {
            name: self.0.name.clone(),
            phase: model.phase.as_str(),
            phase_since: model.phase_since.clone(),
            source: model.source_status(),
            target: TargetStatus {
                version: model.target_version.clone(),
                progress_lsn: self.0.positions.applied().map(|lsn| lsn.to_string()),
            },
            lag: model.lag(&self.0.positions),
            copy: sums.status(&model.copy_pace),
            tables,
            apply: ApplyStatus { transactions: model.base.0 + applied.0, changes: model.base.1 + applied.1 },
            ready: readiness.is_ok(),
            blockers: model.all_blockers(),
            cutover: model.cutover.clone(),
            error: model.error.clone(),
            warnings: model.warnings(),
            not_ready_because: readiness.err(),
            daemon: true,
            activity: model.activity.clone(),
        }
    }

    /// The few numbers of [`Overview`].
    #[must_use]
    pub fn overview(&self) -> Overview {
        let sums = self.observe();
        let in_flight = self.read_tables(|tables| {
            let copying = tables.iter().filter(|(_, table)| table.state() == TableState::Copying);
            copying.map(|(name, table)| (table_status(name, table), table.total())).collect()
        });
        let model = self.model();
        Overview {
            phase: model.phase,
            activity: model.activity.clone(),
            copy: sums.status(&model.copy_pace),
            way: model.way,
            tables_dumped: sums.dumped,
            copy_bytes_left: sums.left.now,
            in_flight,
            lag: model.lag(&self.0.positions),
            transactions_per_second: model.apply_rate.per_second(),
        }
    }

    /// The metrics in the Prometheus text format.
    ///
    /// # Errors
    /// Class bug, if they cannot be printed.
    pub fn metrics_text(&self) -> Result<String> {
        let sums = self.observe();
        let metrics = &self.0.metrics;
        for (state, count) in TableState::ALL.iter().zip(sums.by_state) {
            metrics::set(&metrics.copy_tables, state.as_str(), count as f64);
        }
        let mut model = self.model();
        let eta = sums.status(&model.copy_pace).eta_seconds;
        metrics.copy_eta.set(eta.map(|seconds| seconds as f64));
        let ready = model.readiness(&self.0.positions, self.0.max_lag).is_ok();
        model.show(metrics, &self.0.positions, ready);
        drop(model);
        metrics.text()
    }

    /// Sums up the tables and lets both rates see the totals.
    fn observe(&self) -> CopySums {
        let sums = self.sums();
        let transactions = self.0.metrics.transactions.get();
        let now = Instant::now();
        let mut model = self.model();
        self.observe_pace(&mut model, now);
        model.apply_rate.observe(now, transactions);
        sums
    }

    /// Outside the copy nothing moves, and that says nothing about its speed.
    fn observe_pace(&self, model: &mut Model, now: Instant) {
        if model.phase == Phase::Copy {
            model.copy_pace.observe(now, self.0.moved.load(Ordering::Relaxed));
        }
    }

    fn sums(&self) -> CopySums {
        let way = self.model().way;
        self.read_tables(|tables| sums(tables.values().map(AsRef::as_ref), way))
    }

    /// Transactions and changes applied by this process.
    fn applied_here(&self) -> (u64, u64) {
        let metrics = &self.0.metrics;
        let changes = metrics::OPERATIONS
            .iter()
            .filter_map(|operation| metrics.changes.get_metric_with_label_values(&[operation]).ok())
            .map(|counter| counter.get())
            .sum();
        (metrics.transactions.get(), changes)
    }

    fn set_table(&self, table: &QualifiedName, state: TableState, rows: u64, bytes: u64, bytes_total: u64) {
        let progress = self.table(table);
        progress.set_state(state);
        progress.set_counts(rows, bytes);
        progress.bytes_total.store(bytes_total, Ordering::Relaxed);
        progress.dumped.store(false, Ordering::Relaxed);
        progress.printed.store(0, Ordering::Relaxed);
    }

    /// The progress of a table, made at its first report.
    fn table(&self, table: &QualifiedName) -> Arc<TableProgress> {
        if let Some(known) = self.read_tables(|tables| tables.get(table).cloned()) {
            return known;
        }
        let mut tables = self.0.tables.write().unwrap_or_else(PoisonError::into_inner);
        let label = if tables.len() < LABELLED_TABLES { table.plain() } else { OTHER_TABLES.to_owned() };
        let metrics = &self.0.metrics;
        let made = || {
            metrics::add(&metrics.missing_rows, &label, 0);
            Arc::new(TableProgress::new(
                metrics.copy_rows.get_metric_with_label_values(&[&label]).ok(),
                metrics.copy_bytes.get_metric_with_label_values(&[&label]).ok(),
                label.clone(),
            ))
        };
        Arc::clone(tables.entry(table.clone()).or_insert_with(made))
    }

    fn table_label(&self, table: &QualifiedName) -> String {
        self.table(table).label.clone()
    }

    fn read_tables<T>(&self, read: impl FnOnce(&Tables) -> T) -> T {
        read(&self.0.tables.read().unwrap_or_else(PoisonError::into_inner))
    }

    /// Held for a few reads or writes, never over an await.
    fn model(&self) -> MutexGuard<'_, Model> {
        self.0.model.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Default for Telemetry {
    /// Without a name, ready within one second: for tests and parts that are looked at alone.
    fn default() -> Self {
        Self::named(String::new(), Duration::from_secs(1))
    }
}

impl fmt::Debug for Telemetry {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Telemetry").field("name", &self.0.name).finish_non_exhaustive()
    }
}

impl BatchApplied {
    /// All changes together.
    #[must_use]
    pub fn changes(&self) -> u64 {
        self.inserts + self.updates + self.deletes + self.truncates
    }

    /// Takes in another one's transactions and changes.
    pub fn add(&mut self, other: &Self) {
        self.transactions += other.transactions;
        self.inserts += other.inserts;
        self.updates += other.updates;
        self.deletes += other.deletes;
        self.truncates += other.truncates;
    }

    fn by_operation(&self) -> [(&'static str, u64); 4] {
        [("insert", self.inserts), ("update", self.updates), ("delete", self.deletes), ("truncate", self.truncates)]
    }
}
