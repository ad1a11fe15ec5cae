//! Reports about tables on their way through an archive, and about what the state in the target knows of tables.
//!
//! An archive takes two ways: into it, and out of it. While it is written, a table is shown as `copying` with what pg_dump has
//! read of it, also once it is in the archive: nothing of it is in the target. When it is restored, all begin at zero
//! again. Metrics count the two apart: `copy_*` is what was sent to the target.

use std::sync::atomic::Ordering;

use tracing::info;

use super::{Telemetry, Way};
use crate::postgres::QualifiedName;
use crate::state::{TableRecord, TableState};

impl Telemetry {
    /// From now on rows travel like this.
    pub fn copy_way(&self, way: Way) {
        self.model().way = way;
    }

    /// pg_dump has read so much of a table.
    pub fn dumping(&self, table: &QualifiedName, rows: u64, bytes: u64) {
        let progress = self.table(table);
        progress.set_state(TableState::Copying);
        let (before, rows) = (progress.bytes(), rows.max(progress.rows()));
        progress.set_counts(rows, bytes.max(before));
        let more = bytes.saturating_sub(before);
        self.0.moved.fetch_add(more, Ordering::Relaxed);
        self.0.metrics.dump_bytes.inc_by(more);
    }

    /// A table is in the archive; `bytes` are what COPY printed of it. May be said again.
    pub fn dumped(&self, table: &QualifiedName, bytes: u64) {
        self.dumping(table, 0, bytes);
        self.in_archive(table, bytes);
        if !self.table(table).dumped.swap(true, Ordering::Relaxed) {
            info!(table = table.plain(), bytes, "dumped {}", table.plain());
        }
    }

    /// How many bytes COPY takes for a table that comes from an archive.
    pub fn in_archive(&self, table: &QualifiedName, bytes: u64) {
        // 0 would be what is not known.
        self.table(table).printed.store(bytes.max(1), Ordering::Relaxed);
    }

    /// pg_restore has sent so much of a table.
    pub fn restoring(&self, table: &QualifiedName, rows: u64, bytes: u64) {
        let progress = self.table(table);
        self.copy_advanced(table, rows.saturating_sub(progress.rows()), bytes.saturating_sub(progress.bytes()));
    }

    /// How far tables are, as the state says. The first time that is where this process begins; later it is what somebody
    /// moved meanwhile, for those who only look.
    pub(super) fn tables_recorded(&self, tables: &[TableRecord]) {
        let again = std::mem::replace(&mut self.model().resumed, true);
        let (mut moved, mut dumps) = (0u64, false);
        for record in tables {
            let before = self.table(&record.name).bytes();
            moved = moved.saturating_add(record.bytes.saturating_sub(before));
            // What the target never saw and is on its way goes into an archive.
            let dumping = record.state == TableState::Pending && record.bytes > 0;
            dumps |= dumping;
            let state = if dumping { TableState::Copying } else { record.state };
            self.set_table(&record.name, state, record.rows, record.bytes, record.bytes_total);
        }
        if again {
            self.0.moved.fetch_add(moved, Ordering::Relaxed);
        }
        if dumps {
            self.copy_way(Way::Dump);
        } else if self.model().way == Way::Dump {
            self.copy_way(Way::Restore);
        }
    }
}
