//! What can be seen from outside: metrics, status, HTTP, logs, progress bars.
//!
//! The rest of the code reports what happened, once, through [`Telemetry`]; how it is shown is decided here. No call
//! blocks, waits or fails: seeing must never hold up moving.

pub mod logs;

use std::time::Duration;

use crate::error::Error;
use crate::postgres::{Lsn, QualifiedName, Side};
use crate::state::{Phase, TableState};

/// Takes reports from everywhere. Cheap to clone.
#[derive(Clone, Debug, Default)]
pub struct Telemetry {}

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
    /// `wal_status`: reserved, extended, unreserved, lost.
    pub wal_status: Option<String>,
    /// `pg_stat_replication.sent_lsn` of our walsender.
    pub sent: Option<Lsn>,
}

impl Telemetry {
    /// The move entered a phase.
    pub fn phase(&self, phase: Phase) {
        let _ = phase;
    }

    /// What blocks the move now; empty: nothing.
    pub fn blockers(&self, blockers: Vec<Blocker>) {
        drop(blockers);
    }

    /// The target's `server_version`.
    pub fn target_version(&self, version: &str) {
        let _ = version;
    }

    /// A table is part of the copy: its state, rows and bytes so far, and the source's size of it in bytes.
    pub fn copy_table(&self, table: &QualifiedName, state: TableState, rows: u64, bytes: u64, bytes_total: u64) {
        let _ = (table, state, rows, bytes, bytes_total);
    }

    /// A table's copy changed state.
    pub fn copy_state(&self, table: &QualifiedName, state: TableState) {
        let _ = (table, state);
    }

    /// Rows and bytes of a table were sent to the target since the last report.
    pub fn copy_advanced(&self, table: &QualifiedName, rows: u64, bytes: u64) {
        let _ = (table, rows, bytes);
    }

    /// What the daemon does next to copying rows ("building indexes", "gathering statistics"), for bars and log.
    pub fn activity(&self, text: &str) {
        let _ = text;
    }

    /// The stream was read up to here.
    pub fn received(&self, lsn: Lsn) {
        let _ = lsn;
    }

    /// Progress is durable up to here; commit time of the last applied transaction in microseconds since 1970.
    pub fn applied(&self, lsn: Lsn, commit_micros: Option<i64>) {
        let _ = (lsn, commit_micros);
    }

    /// The source was told that it may forget everything before this.
    pub fn confirmed(&self, lsn: Lsn) {
        let _ = lsn;
    }

    /// A batch was committed on the target.
    pub fn batch(&self, batch: BatchApplied) {
        let _ = batch;
    }

    /// A batch took a slower path.
    pub fn fallback(&self, reason: &'static str) {
        let _ = reason;
    }

    /// Bytes waiting in a queue.
    pub fn queue(&self, queue: &'static str, bytes: u64) {
        let _ = (queue, bytes);
    }

    /// The source was sampled.
    pub fn source(&self, sample: SourceSample) {
        drop(sample);
    }

    /// An error was handled: another try follows, or a wait.
    pub fn error(&self, error: &Error) {
        let _ = error;
    }

    /// The error that the move stands on now, or that it was overcome.
    pub fn standing_error(&self, error: Option<&Error>) {
        let _ = error;
    }

    /// A connection was lost and made again.
    pub fn reconnected(&self, side: Side) {
        let _ = side;
    }

    /// An update or delete found no row, under `follow.missing_row = "record"`.
    pub fn missing_row(&self, table: &QualifiedName) {
        let _ = table;
    }

    /// A cutover began (`None`), or ended in this state: `aborted`, `done`.
    pub fn cutover(&self, outcome: Option<&str>) {
        let _ = outcome;
    }

    /// A step of the cutover changed: `running`, `done`, `failed`, `skipped`.
    pub fn cutover_step(&self, name: &str, state: &str, seconds: Option<f64>) {
        let _ = (name, state, seconds);
    }

    /// From the first refused write on the source to the first accepted one on the target.
    pub fn write_pause(&self, pause: Duration) {
        let _ = pause;
    }

    /// Whether lag is below `cutover.max_lag` while following, and nothing blocks.
    #[must_use]
    pub fn ready(&self) -> bool {
        false
    }
}
