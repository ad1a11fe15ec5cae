//! What is known about the move right now, and how it becomes a [`Status`] and the gauges.
//!
//! Owns no task, no clock but the monotonic one, and is never held over an await. The daemon's model is fed by reports,
//! the one of `status` by [`Recorded`]; everything shown is derived here, so that all ways of looking agree.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::atomic::{AtomicBool, AtomicI64, AtomicU8, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use prometheus::IntCounter;

use super::eta::{self, Pace, Way};
use super::lag::{self, LagHistory};
use super::metrics::{self, Metrics, WAL_STATUS};
use super::rate::Rate;
use super::redact::shown;
use super::status::{CopyStatus, CutoverStatus, LagStatus, Problem, SlotStatus, SourceStatus, StepStatus, TableStatus};
use super::wal::Watch;
use super::{Blocker, SourceSample};
use crate::error::{Error, Result};
use crate::postgres::{Lsn, QualifiedName};
use crate::state::{CutoverRecord, MoveRecord, Phase, Progress, Store, TableRecord, TableState};

/// A sample older than this no longer says how the source is.
const FRESH: Duration = Duration::from_secs(10);

/// All that the state in the target says about a move: what a daemon goes on from, and what `status` shows.
#[derive(Clone, Debug)]
pub struct Recorded {
    /// The move itself.
    pub record: MoveRecord,
    /// Up to where the target holds everything.
    pub progress: Progress,
    /// Every table of the move.
    pub tables: Vec<TableRecord>,
    /// The last cutover.
    pub cutover: Option<CutoverRecord>,
    /// Whether a daemon holds the move.
    pub daemon: bool,
}

impl Recorded {
    /// Reads it all; `None` if this target knows nothing of the move.
    ///
    /// # Errors
    /// The connection's; class operator for a state of another version.
    pub async fn load(store: &Store) -> Result<Option<Self>> {
        let Some(record) = store.find().await? else { return Ok(None) };
        Ok(Some(Self {
            record,
            progress: store.progress().await?,
            tables: store.tables().await?,
            cutover: store.last_cutover().await?,
            daemon: store.is_led().await?,
        }))
    }
}

/// What changes seldom enough for a mutex.
pub(super) struct Model {
    pub(super) phase: Phase,
    pub(super) phase_since: Option<String>,
    pub(super) activity: Option<String>,
    pub(super) blockers: Vec<Problem>,
    pub(super) target_version: Option<String>,
    sample: Option<(SourceSample, Instant)>,
    pub(super) lag: LagHistory,
    /// Totals of the state when this process began.
    pub(super) base: (u64, u64),
    pub(super) error: Option<Problem>,
    /// The text of the error that was logged last, so that one error is one line.
    pub(super) logged: Option<String>,
    pub(super) cutover: CutoverStatus,
    pub(super) way: Way,
    /// Of what this process moved.
    pub(super) copy_pace: Pace,
    pub(super) apply_rate: Rate,
    /// Whether the state was read before.
    pub(super) resumed: bool,
    pub(super) wal: Watch,
    codes: BTreeSet<String>,
}

impl Default for Model {
    fn default() -> Self {
        Self {
            phase: Phase::Preflight,
            phase_since: None,
            activity: None,
            blockers: Vec::new(),
            target_version: None,
            sample: None,
            lag: LagHistory::default(),
            base: (0, 0),
            error: None,
            logged: None,
            cutover: CutoverStatus::default(),
            way: Way::default(),
            copy_pace: Pace::default(),
            apply_rate: Rate::default(),
            resumed: false,
            wal: Watch::default(),
            codes: BTreeSet::new(),
        }
    }
}

impl Model {
    /// Takes a sample in.
    pub(super) fn sampled(&mut self, sample: SourceSample, at: Instant) {
        self.lag.observe(sample.head, sample.now_micros);
        self.sample = Some((sample, at));
    }

    /// The source does not answer: what it said is no longer shown.
    pub(super) fn source_lost(&mut self) {
        self.sample = None;
    }

    /// The last sample, whatever its age.
    pub(super) fn sample(&self) -> Option<&SourceSample> {
        self.sample.as_ref().map(|(sample, _)| sample)
    }

    /// The last sample if it still says how the source is.
    fn fresh(&self) -> Option<&SourceSample> {
        self.sample.as_ref().filter(|(_, at)| at.elapsed() <= FRESH).map(|(sample, _)| sample)
    }

    /// How far progress is behind. Once the source does not answer, the target gets older by the second: what was
    /// written there since is not known.
    pub(super) fn lag(&self, positions: &Positions) -> LagStatus {
        let (Some((sample, at)), Some(applied)) = (&self.sample, positions.applied()) else {
            return LagStatus::default();
        };
        let age = at.elapsed();
        let unseen = if age > FRESH { age.as_secs_f64() } else { 0.0 };
        let seconds = self.lag.seconds(applied, positions.commit_micros(), sample.now_micros);
        // Between two samples a target that keeps up shows nothing left to apply; how old its newest transaction was
        // when it arrived is then the better word.
        let latency = positions.latency_micros().map_or(0.0, lag::seconds);
        LagStatus { bytes: self.lag.bytes(applied), seconds: seconds.map(|seconds| (seconds + unseen).max(latency)) }
    }

    pub(super) fn source_status(&self) -> SourceStatus {
        let Some(sample) = self.sample() else { return SourceStatus::default() };
        SourceStatus {
            version: Some(shown(&sample.version)),
            head_lsn: Some(sample.head.to_string()),
            slot: sample.has_slot().then(|| SlotStatus {
                name: sample.slot.clone(),
                active: sample.slot_active,
                confirmed_lsn: sample.confirmed.map(|lsn| lsn.to_string()),
                retained_wal_bytes: sample.retained_wal_bytes,
                wal_status: sample.wal_status.clone(),
            }),
        }
    }

    /// What was reported, and what the last sample of the slot says by itself.
    pub(super) fn all_blockers(&self) -> Vec<Problem> {
        let mut all: Vec<_> = self.blockers.clone();
        if let Some(problem) = self.slot_problem()
            && !all.iter().any(|known| known.code == problem.code)
        {
            all.push(problem);
        }
        all
    }

    /// What may become a reason to act, and blocks nothing.
    pub(super) fn warnings(&self) -> Vec<Problem> {
        self.fresh().and_then(|_| self.wal.risk()).cloned().into_iter().collect()
    }

    fn slot_problem(&self) -> Option<Problem> {
        let sample = self.fresh()?;
        let problem = |code: &str, message: String| Problem {
            code: code.to_owned(),
            message,
            hint: Some("changes since then are gone from the source: run `pgtandem clean` and move again".to_owned()),
        };
        if sample.wal_status.as_deref() == Some("lost") {
            return Some(problem("slot_lost", format!("the source dropped WAL that the slot {} needs", sample.slot)));
        }
        let follows = matches!(self.phase, Phase::Catchup | Phase::Follow);
        (follows && !sample.has_slot())
            .then(|| problem("slot_missing", format!("the slot {} is not on the source", sample.slot)))
    }

    /// Whether a cutover may begin, or why not.
    pub(super) fn readiness(&self, positions: &Positions, max_lag: Duration) -> Result<(), String> {
        if self.phase != Phase::Follow {
            return Err(format!("the move is in phase {}, not follow", self.phase));
        }
        if let Some(error) = &self.error {
            return Err(error.message.clone());
        }
        if let Some(blocker) = self.all_blockers().first() {
            return Err(blocker.message.clone());
        }
        let Some(sample) = self.fresh() else { return Err("the source does not answer".to_owned()) };
        if !sample.slot_active {
            return Err(format!("no connection reads the slot {}", sample.slot));
        }
        match self.lag(positions).seconds {
            None => Err("the lag is not known yet".to_owned()),
            Some(seconds) if seconds > max_lag.as_secs_f64() => {
                Err(format!("lag is {seconds:.1} s, above cutover.max_lag of {} s", max_lag.as_secs_f64()))
            }
            Some(_) => Ok(()),
        }
    }

    /// Sets every gauge that is derived from the model.
    pub(super) fn show(&mut self, metrics: &Metrics, positions: &Positions, ready: bool) {
        for phase in Phase::ALL {
            metrics::set(&metrics.phase, phase.as_str(), flag(phase == self.phase));
        }
        metrics.ready.set(flag(ready));
        let blockers: BTreeSet<_> = self.all_blockers().into_iter().map(|blocker| blocker.code).collect();
        self.codes.extend(blockers.iter().cloned());
        for code in &self.codes {
            metrics::set(&metrics.blocker, code, flag(blockers.contains(code)));
        }
        metrics.lag_seconds.set(self.lag(positions).seconds);
        metrics.last_commit.set(positions.commit_micros().map(lag::seconds));
        metrics.write_pause.set(self.cutover.write_pause_seconds);
        self.show_stages(metrics, positions);
        self.show_slot(metrics);
    }

    fn show_stages(&self, metrics: &Metrics, positions: &Positions) {
        let sample = self.sample();
        let confirmed = positions.confirmed().max(sample.and_then(|sample| sample.confirmed));
        for (stage, position) in [
            ("sent", sample.and_then(|sample| sample.sent)),
            ("received", positions.received()),
            ("applied", positions.applied()),
            ("confirmed", confirmed),
        ] {
            match position.and_then(|position| self.lag.bytes(position)) {
                Some(bytes) => metrics::set(&metrics.lag_bytes, stage, bytes as f64),
                // An error says that the stage was not shown before either.
                None => drop(metrics.lag_bytes.remove_label_values(&[stage])),
            }
        }
    }

    fn show_slot(&self, metrics: &Metrics) {
        let slot = self.sample().filter(|sample| sample.has_slot());
        metrics.slot_active.set(self.sample().map(|sample| flag(sample.slot_active)));
        metrics.slot_retained.set(slot.and_then(|slot| slot.retained_wal_bytes).map(|bytes| bytes as f64));
        metrics.slot_safe.set(slot.and_then(|slot| slot.safe_wal_bytes).map(|bytes| bytes as f64));
        for status in WAL_STATUS {
            let is = slot.is_some_and(|slot| slot.wal_status.as_deref() == Some(status));
            metrics::set(&metrics.slot_wal_status, status, flag(is));
        }
    }
}

fn flag(yes: bool) -> f64 {
    if yes { 1.0 } else { 0.0 }
}

/// How far each stage is; written on the hot path. 0 stands for nothing reported yet.
pub(super) struct Positions {
    received: AtomicU64,
    applied: AtomicU64,
    confirmed: AtomicU64,
    commit_micros: AtomicI64,
    /// The source's clock minus ours, in microseconds, as of the last sample; ours counts from `began`.
    clock: AtomicI64,
    /// When the last transaction was applied, by the source's clock, and how long after its commit; microseconds.
    applied_at: AtomicI64,
    latency: AtomicI64,
    began: Instant,
}

impl Default for Positions {
    fn default() -> Self {
        let zero = AtomicU64::default;
        let unknown = || AtomicI64::new(i64::MIN);
        Self {
            received: zero(),
            applied: zero(),
            confirmed: zero(),
            commit_micros: unknown(),
            clock: unknown(),
            applied_at: unknown(),
            latency: AtomicI64::new(0),
            began: Instant::now(),
        }
    }
}

impl Positions {
    /// A new connection reads again from the confirmed position: this one may go back.
    pub(super) fn set_received(&self, lsn: Lsn) {
        self.received.store(lsn.as_u64(), Ordering::Relaxed);
    }

    pub(super) fn set_applied(&self, lsn: Lsn, commit_micros: Option<i64>) {
        self.applied.fetch_max(lsn.as_u64(), Ordering::Relaxed);
        if let Some(micros) = commit_micros {
            self.commit_micros.fetch_max(micros, Ordering::Relaxed);
        }
    }

    /// A transaction of this commit time became durable on the target just now.
    pub(super) fn arrived(&self, commit_micros: i64) {
        if let Some(now) = self.source_now() {
            self.latency.store(now.saturating_sub(commit_micros), Ordering::Relaxed);
            self.applied_at.store(now, Ordering::Relaxed);
        }
    }

    /// Sets our copy of the source's clock.
    pub(super) fn set_clock(&self, source_micros: i64) {
        self.clock.store(source_micros.saturating_sub(self.elapsed()), Ordering::Relaxed);
    }

    /// What the source's clock shows about now; it was read when the last sample was asked for.
    fn source_now(&self) -> Option<i64> {
        known_micros(&self.clock).map(|offset| offset.saturating_add(self.elapsed()))
    }

    fn elapsed(&self) -> i64 {
        i64::try_from(self.began.elapsed().as_micros()).unwrap_or(i64::MAX)
    }

    /// How long after its commit the last transaction was applied, if that was within the last [`RECENT`] microseconds.
    pub(super) fn latency_micros(&self) -> Option<i64> {
        let applied_at = known_micros(&self.applied_at)?;
        let age = self.source_now()?.saturating_sub(applied_at);
        (age <= RECENT).then(|| self.latency.load(Ordering::Relaxed).max(0))
    }

    pub(super) fn set_confirmed(&self, lsn: Lsn) {
        self.confirmed.fetch_max(lsn.as_u64(), Ordering::Relaxed);
    }

    fn received(&self) -> Option<Lsn> {
        known(&self.received)
    }

    pub(super) fn applied(&self) -> Option<Lsn> {
        known(&self.applied)
    }

    fn confirmed(&self) -> Option<Lsn> {
        known(&self.confirmed)
    }

    pub(super) fn commit_micros(&self) -> Option<i64> {
        known_micros(&self.commit_micros)
    }
}

/// A transaction applied so recently still says something about the lag of now, in microseconds.
const RECENT: i64 = 2_000_000;

fn known_micros(clock: &AtomicI64) -> Option<i64> {
    Some(clock.load(Ordering::Relaxed)).filter(|micros| *micros != i64::MIN)
}

fn known(position: &AtomicU64) -> Option<Lsn> {
    Some(position.load(Ordering::Relaxed)).filter(|bytes| *bytes > 0).map(Lsn::new)
}

/// The copy of one table; counted on the hot path.
pub(super) struct TableProgress {
    state: AtomicU8,
    pub(super) rows: AtomicU64,
    pub(super) bytes: AtomicU64,
    pub(super) bytes_total: AtomicU64,
    /// Its rows are in the archive.
    pub(super) dumped: AtomicBool,
    /// All that COPY prints of it; 0: not known.
    pub(super) printed: AtomicU64,
    pub(super) rows_counter: Option<IntCounter>,
    pub(super) bytes_counter: Option<IntCounter>,
    /// The value of the label `table`.
    pub(super) label: String,
}

impl TableProgress {
    pub(super) fn new(rows_counter: Option<IntCounter>, bytes_counter: Option<IntCounter>, label: String) -> Self {
        let zero = AtomicU64::default;
        Self {
            state: AtomicU8::new(0),
            rows: zero(),
            bytes: zero(),
            bytes_total: zero(),
            dumped: AtomicBool::new(false),
            printed: zero(),
            rows_counter,
            bytes_counter,
            label,
        }
    }

    pub(super) fn state(&self) -> TableState {
        let at = usize::from(self.state.load(Ordering::Relaxed));
        TableState::ALL.get(at).copied().unwrap_or(TableState::Pending)
    }

    /// Returns the state before.
    pub(super) fn set_state(&self, state: TableState) -> TableState {
        let before = self.state();
        let at = TableState::ALL.iter().position(|known| *known == state).unwrap_or(0);
        self.state.store(u8::try_from(at).unwrap_or(0), Ordering::Relaxed);
        before
    }

    pub(super) fn advance(&self, rows: u64, bytes: u64) {
        self.rows.fetch_add(rows, Ordering::Relaxed);
        self.bytes.fetch_add(bytes, Ordering::Relaxed);
        if let Some(counter) = &self.rows_counter {
            counter.inc_by(rows);
        }
        if let Some(counter) = &self.bytes_counter {
            counter.inc_by(bytes);
        }
    }

    pub(super) fn set_counts(&self, rows: u64, bytes: u64) {
        self.rows.store(rows, Ordering::Relaxed);
        self.bytes.store(bytes, Ordering::Relaxed);
    }

    pub(super) fn rows(&self) -> u64 {
        self.rows.load(Ordering::Relaxed)
    }

    pub(super) fn bytes(&self) -> u64 {
        self.bytes.load(Ordering::Relaxed)
    }

    pub(super) fn total(&self) -> u64 {
        self.bytes_total.load(Ordering::Relaxed)
    }

    /// What the estimate asks of it.
    fn for_estimate(&self) -> eta::Table {
        eta::Table {
            copied: self.state() == TableState::Copied,
            dumped: self.dumped.load(Ordering::Relaxed),
            bytes: self.bytes(),
            total: self.total(),
            printed: Some(self.printed.load(Ordering::Relaxed)).filter(|printed| *printed > 0),
        }
    }
}

/// Sums over the tables, with the bytes that COPY will still print.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct CopySums {
    pub(super) by_state: [u64; TableState::ALL.len()],
    pub(super) dumped: u64,
    pub(super) rows: u64,
    pub(super) bytes: u64,
    pub(super) bytes_total: u64,
    pub(super) left: eta::Left,
}

pub(super) fn sums<'a>(tables: impl Iterator<Item = &'a TableProgress> + Clone, way: Way) -> CopySums {
    let mut sums =
        CopySums { left: eta::left(tables.clone().map(TableProgress::for_estimate), way), ..CopySums::default() };
    for table in tables {
        let state = table.state();
        if let Some(count) = TableState::ALL.iter().position(|s| *s == state).and_then(|at| sums.by_state.get_mut(at)) {
            *count += 1;
        }
        sums.dumped += u64::from(table.dumped.load(Ordering::Relaxed));
        sums.rows += table.rows();
        sums.bytes += table.bytes();
        sums.bytes_total += table.total();
    }
    sums
}

impl CopySums {
    pub(super) fn tables(&self) -> u64 {
        self.by_state.iter().sum()
    }

    pub(super) fn copied(&self) -> u64 {
        self.by_state.last().copied().unwrap_or(0)
    }

    pub(super) fn status(&self, pace: &Pace) -> CopyStatus {
        let finished = self.copied() == self.tables();
        CopyStatus {
            tables_total: self.tables(),
            tables_done: self.copied(),
            bytes_total: self.bytes_total,
            bytes_done: self.bytes,
            rows_done: self.rows,
            eta_seconds: if finished { None } else { pace.seconds_for(self.left.all).map(|s| s.round() as u64) },
        }
    }
}

/// The tables of the move by name.
pub(super) type Tables = BTreeMap<QualifiedName, std::sync::Arc<TableProgress>>;

pub(super) fn table_status(name: &QualifiedName, table: &TableProgress) -> TableStatus {
    TableStatus {
        schema: name.schema.clone(),
        name: name.name.clone(),
        state: table.state().as_str(),
        rows: table.rows(),
        bytes: table.bytes(),
    }
}

impl SourceSample {
    /// Whether the slot is on the source.
    #[must_use]
    pub fn has_slot(&self) -> bool {
        self.slot_active || self.confirmed.is_some() || self.wal_status.is_some() || self.retained_wal_bytes.is_some()
    }
}

impl From<&Blocker> for Problem {
    fn from(blocker: &Blocker) -> Self {
        Self { code: blocker.code.to_owned(), message: shown(&blocker.message), hint: Some(shown(&blocker.hint)) }
    }
}

impl From<&Error> for Problem {
    fn from(error: &Error) -> Self {
        Self { code: error.code().to_owned(), message: shown(&error.to_string()), hint: error.hint_text().map(shown) }
    }
}

impl Problem {
    /// The document that the state keeps in its column `error`.
    #[must_use]
    pub fn to_value(&self) -> serde_json::Value {
        serde_json::json!({ "code": self.code, "message": self.message, "hint": self.hint })
    }

    /// Reads [`Problem::to_value`]; whatever else stands there is shown as it is.
    #[must_use]
    pub fn from_value(value: &serde_json::Value) -> Self {
        let text = |key: &str| value.get(key).and_then(serde_json::Value::as_str).map(shown);
        Self {
            code: text("code").unwrap_or_else(|| "unknown".to_owned()),
            message: text("message").unwrap_or_else(|| shown(&value.to_string())),
            hint: text("hint"),
        }
    }
}

impl From<&CutoverRecord> for CutoverStatus {
    fn from(record: &CutoverRecord) -> Self {
        Self {
            state: Some(record.state.as_str().to_owned()),
            steps: record
                .steps
                .iter()
                .map(|step| StepStatus { name: step.name.clone(), state: step.state.clone(), seconds: step.seconds })
                .collect(),
            write_pause_seconds: record.write_pause_seconds,
        }
    }
}
