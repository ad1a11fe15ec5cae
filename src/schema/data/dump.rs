//! Step 1: pg_dump writes the rows, and says how far it is.

use std::collections::HashMap;
use std::num::NonZeroUsize;
use std::path::Path;
use std::sync::{Mutex, MutexGuard, PoisonError};

use super::folder::{self, Archived};
use super::said::Course;
use super::watch::{self, InFlight};
use super::{DataArchive, DumpRequest};
use crate::copy;
use crate::error::{Error, Result};
use crate::postgres::catalog::Table;
use crate::postgres::{Lsn, QualifiedName};
use crate::schema::child::Child;
use crate::schema::dump::{DUMP, pg_dump, with_patience_for};
use crate::schema::left_out::LeftOut;
use crate::schema::toc;
use crate::state::{Store, TableState};
use crate::telemetry::{Telemetry, Way};

/// Who hears how far the dump is.
#[derive(Clone, Copy)]
pub struct Listeners<'a> {
    /// Metrics, log and bars.
    pub telemetry: &'a Telemetry,
    /// `status` reads it.
    pub store: &'a Store,
}

pub(super) async fn dump(
    archive: &mut DataArchive,
    request: DumpRequest<'_>,
    cut: Lsn,
    tables: &[Table],
    workers: NonZeroUsize,
    listeners: Listeners<'_>,
) -> Result<()> {
    let Some(snapshot) = request.snapshot else {
        return Err(Error::bug("rows dumped without the snapshot of their cut"));
    };
    let rows = archive.rows();
    let (left_out, late) = {
        let session = request.source.connect("schema").await?;
        (LeftOut::find(&*session, request.scope).await?, copy::late(&session).await?)
    };
    archive.invalidate()?;
    folder::remove_folder(&rows)?;
    let progress = Progress::new(tables, workers, &rows, listeners);
    let dumping = with_patience_for(
        || {
            // An attempt that could not get a lock leaves a folder, which the next one would refuse.
            drop(folder::remove_folder(&rows));
            progress.begin();
            pg_dump(request, &left_out)
                .args(["--format=directory", "--data-only", "--no-blobs", "--no-unlogged-table-data", "--verbose"])
                .arg(format!("--jobs={workers}"))
                .arg("--file")
                .arg(&rows)
        },
        |line| progress.hears(line),
    );
    tokio::select! {
        done = dumping => done?,
        never = watch::watch(request.source, DUMP, async |seen| progress.sees(seen).await) => match never {},
    }
    // While pg_dump ran it held a lock on each table; before, one may have been rewritten under the snapshot's feet.
    copy::nothing_rewritten(request.source, snapshot, tables).await?;
    folder::sync(&rows)?;
    let items = items(request, &rows).await?;
    let archived = tables.iter().map(|table| Archived {
        oid: table.oid,
        schema: table.name.schema.clone(),
        table: table.name.name.clone(),
        late: late.contains(&table.oid),
        rows: items.get(&table.oid).and_then(|item| folder::rows_file(&rows, *item, progress.printed(&table.name))),
    });
    archive.note.tables = archived.collect();
    if let Some(table) = archive.note.tables.iter().find(|table| table.rows.is_none() && items.contains_key(&table.oid))
    {
        return Err(Error::bug(format!("pg_dump wrote no file for {}", table.name().plain())));
    }
    archive.complete(cut)?;
    progress.end(&archive.note.tables);
    Ok(())
}

/// The archive's entry with the rows of each table, by the table's oid on the source.
async fn items(request: DumpRequest<'_>, rows: &Path) -> Result<HashMap<u32, u32>> {
    let list = Child::new(request.programs.pg_restore()).arg("--list").arg(rows).run().await?;
    let entries = toc::parse(&list, &toc::Context::default()).into_iter();
    Ok(entries.filter(|entry| entry.kind == "TABLE DATA").map(|entry| (entry.object.1, entry.number)).collect())
}

/// How far pg_dump is: its lines and the source's view of it come from two sides.
struct Progress<'a> {
    tables: &'a [Table],
    rows: &'a Path,
    workers: usize,
    listeners: Listeners<'a>,
    course: Mutex<Option<Course>>,
    /// Rows and bytes that were seen of a table.
    seen: Mutex<HashMap<QualifiedName, (u64, u64)>>,
    /// Those that `status` was not told yet.
    news: Mutex<HashMap<QualifiedName, (u64, u64)>>,
}

impl<'a> Progress<'a> {
    fn new(tables: &'a [Table], workers: NonZeroUsize, rows: &'a Path, listeners: Listeners<'a>) -> Self {
        let (course, seen, news) = (Mutex::default(), Mutex::default(), Mutex::default());
        Self { tables, rows, workers: workers.get(), listeners, course, seen, news }
    }

    /// Each attempt begins at zero.
    fn begin(&self) {
        let telemetry = self.listeners.telemetry;
        telemetry.copy_way(Way::Dump);
        for table in self.tables {
            telemetry.copy_table(&table.name, TableState::Pending, 0, 0, table.bytes);
        }
        let names = self.tables.iter().map(|table| table.name.clone()).collect();
        *lock(&self.course) = Some(Course::new(names, HashMap::new(), self.workers));
        lock(&self.seen).clear();
        lock(&self.news).clear();
    }

    fn hears(&self, line: &str) {
        let mut course = lock(&self.course);
        let Some(course) = course.as_mut() else { return };
        let Some(finished) = course.hears(line) else { return };
        let Some(name) = course.tables().get(finished.table).cloned() else { return };
        let (rows, seen) = lock(&self.seen).get(&name).copied().unwrap_or_default();
        // With one worker nobody says which file it was.
        let file = finished.item.and_then(|item| folder::rows_file(self.rows, item, seen));
        let bytes = file.map_or(seen, |file| file.printed);
        self.learns(&name, rows, bytes);
        self.listeners.telemetry.dumped(&name, bytes);
    }

    /// What is known of a table never becomes less: an answer may be older than a line.
    fn learns(&self, name: &QualifiedName, rows: u64, bytes: u64) {
        let mut seen = lock(&self.seen);
        let known = seen.entry(name.clone()).or_default();
        let better = (known.0.max(rows), known.1.max(bytes));
        if std::mem::replace(known, better) != better {
            lock(&self.news).insert(name.clone(), better);
        }
    }

    async fn sees(&self, in_flight: Vec<InFlight>) {
        for InFlight { table, rows, bytes } in in_flight {
            // Partitioned and foreign tables, and what is read beside the rows, are none of ours.
            if self.tables.iter().any(|known| known.name == table) {
                self.listeners.telemetry.dumping(&table, rows, bytes);
                self.learns(&table, rows, bytes);
            }
        }
        let news = std::mem::take(&mut *lock(&self.news));
        let so_far: Vec<_> = news.into_iter().map(|(name, (rows, bytes))| (name, rows, bytes)).collect();
        if let Err(error) = self.listeners.store.report_dumping(&so_far).await {
            tracing::debug!(%error, "cannot report how far the dump is");
        }
    }

    /// At least so many bytes were printed of a table.
    fn printed(&self, table: &QualifiedName) -> u64 {
        lock(&self.seen).get(table).map_or(0, |(_, bytes)| *bytes)
    }

    /// All is there: those tables too whose end nobody said.
    fn end(&self, tables: &[Archived]) {
        for table in tables {
            self.listeners.telemetry.dumped(&table.name(), table.printed());
        }
        let files = tables.iter().filter_map(|table| table.rows.as_ref());
        let (bytes, printed) = files.fold((0u64, 0u64), |(b, p), file| (b + file.bytes, p + file.printed));
        tracing::info!(tables = tables.len(), bytes, rows_bytes = printed, "the archive is complete");
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
