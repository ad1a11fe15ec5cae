//! Step 2: pg_restore loads the rows, and each table is recorded as copied once it is there.
//!
//! A table's rows go in by one COPY, which is its own transaction: all of them are there, or none. pg_restore says when that
//! is committed, and then the table is recorded under the archive's cut. So `copied` is never said too early. Said too
//! late, by a death in between, the table is emptied and loaded again. What makes the word durable makes the rows durable too,
//! for they were committed before it on the same server.

use std::collections::{HashMap, HashSet};
use std::sync::{Mutex, PoisonError};

use tokio::sync::mpsc;
use tokio_postgres::GenericClient;

use super::folder::Archived;
use super::said::Course;
use super::watch::{self, InFlight};
use super::{DataArchive, Loading};
use crate::copy;
use crate::error::{Doing, Error, Result};
use crate::postgres::{Lsn, QualifiedName, Session};
use crate::schema::child::{Child, list_file};
use crate::schema::restore::{RESTORE, end_leftovers};
use crate::schema::toc;
use crate::state::{TableState, copied_sql, copying_sql, fence_sql, only_the_leader};
use crate::telemetry::Way;

/// Tables emptied, or recorded, by one transaction; each takes locks on itself, its TOAST table and its indexes.
const AT_ONCE: usize = 100;

pub(super) async fn restore(archive: &DataArchive, loading: Loading<'_>) -> Result<()> {
    let cut = archive.cut()?.ok_or_else(|| Error::bug("rows restored from an incomplete archive"))?;
    let records = loading.store.tables().await?;
    let states: HashMap<&QualifiedName, TableState> =
        records.iter().map(|record| (&record.name, record.state)).collect();
    let sizes: HashMap<&QualifiedName, u64> = records.iter().map(|r| (&r.name, r.bytes_total)).collect();
    let all = &archive.note.tables;
    // What an earlier start finished stays: its record was committed after its rows.
    let left: Vec<&Archived> =
        all.iter().filter(|table| states.get(&table.name()) != Some(&TableState::Copied)).collect();
    if left.len() < all.len() {
        tracing::info!(restored = all.len() - left.len(), left = left.len(), "going on with the restore");
    }
    let mut session = loading.target.connect("schema").await?;
    end_leftovers(&session, loading.target).await?;
    loading.telemetry.copy_way(Way::Restore);
    for chunk in left.chunks(AT_ONCE) {
        let names: Vec<QualifiedName> = chunk.iter().map(|table| table.name()).collect();
        let untouched: Vec<&QualifiedName> =
            names.iter().filter(|name| states.get(name) != Some(&TableState::Copying)).collect();
        make_ours(&mut session, loading, &names, &untouched).await?;
    }
    for table in &left {
        let name = table.name();
        let size = sizes.get(&name).copied().unwrap_or_default();
        loading.telemetry.copy_table(&name, TableState::Pending, 0, 0, size);
        loading.telemetry.in_archive(&name, table.printed());
    }
    for late in [false, true] {
        let tables: Vec<&Archived> = left.iter().copied().filter(|table| table.late == late).collect();
        load(archive, loading, &mut session, &tables, cut).await?;
    }
    Ok(())
}

/// Loads these tables and records each.
async fn load(
    archive: &DataArchive,
    loading: Loading<'_>,
    session: &mut Session,
    tables: &[&Archived],
    cut: Lsn,
) -> Result<()> {
    let mut recorder = Recorder { loading, session, tables, cut, recorded: HashSet::new() };
    run(archive, loading, tables, &mut recorder).await?;
    // Those of which nothing was said, and those that have no rows in the archive.
    let rest: Vec<usize> = (0..tables.len()).filter(|at| !recorder.recorded.contains(at)).collect();
    for chunk in rest.chunks(AT_ONCE) {
        recorder.record(chunk).await?;
    }
    Ok(())
}

async fn run(
    archive: &DataArchive,
    loading: Loading<'_>,
    tables: &[&Archived],
    recorder: &mut Recorder<'_, '_>,
) -> Result<()> {
    let Loading { target, programs, workers, .. } = loading;
    let rows = archive.rows();
    let list = Child::new(programs.pg_restore()).arg("--list").arg(&rows).run().await?;
    let places: HashMap<u32, usize> = tables.iter().enumerate().map(|(at, table)| (table.oid, at)).collect();
    // Values of sequences are set at the cutover; the rows of an extension's own tables are the extension's business.
    let entries: Vec<_> = toc::parse(&list, &toc::Context::default())
        .into_iter()
        .filter(|entry| entry.kind == "TABLE DATA" && places.contains_key(&entry.object.1))
        .collect();
    if entries.is_empty() {
        return Ok(());
    }
    let items = entries
        .iter()
        .filter_map(|entry| Some((entry.number, *places.get(&entry.object.1)?)))
        .collect::<HashMap<_, _>>();
    let list = list_file(&archive.folder, entries.iter().map(|entry| entry.line.as_str()))?;
    let names = tables.iter().map(|table| table.name()).collect();
    let mut course = Course::new(names, items, workers.get());
    let (finished, mut is_finished) = mpsc::unbounded_channel();
    let restoring = Child::new(programs.pg_restore())
        .server(target, RESTORE)
        .args(["--no-password", "--exit-on-error", "--data-only", "--verbose"])
        .arg(format!("--jobs={workers}"))
        .arg("--use-list")
        .arg(list.path())
        .database_argument()
        .arg(&rows)
        .run_watched(move |line| {
            if let Some(table) = course.hears(line) {
                // Whoever records has failed, and so does this.
                finished.send(table.table).ok();
            }
        });
    let open: HashMap<QualifiedName, Seen> = tables.iter().map(|table| (table.name(), None)).collect();
    let open = Mutex::new(open);
    let recording = async {
        let mut some = Vec::new();
        while is_finished.recv_many(&mut some, AT_ONCE).await > 0 {
            for name in some.iter().filter_map(|at| tables.get(*at)).map(|table| table.name()) {
                open.lock().unwrap_or_else(PoisonError::into_inner).remove(&name);
            }
            recorder.record(&some).await?;
            some.clear();
        }
        Ok(())
    };
    // A program that failed has finished tables all the same: they are recorded before its error is told.
    let both = async { tokio::try_join!(async { Ok::<_, Error>(restoring.await) }, recording) };
    let watching = watch::watch(target, RESTORE, async |seen| tell(loading, seen, &open).await);
    tokio::select! {
        done = both => done?.0.map(drop),
        never = watching => match never {},
    }
}

/// Rows and bytes of a table that was seen in flight.
type Seen = Option<(u64, u64)>;

/// Says how far the tables are that pg_restore is at; `open` are those that are not finished.
async fn tell(
    Loading { telemetry, store, .. }: Loading<'_>,
    seen: Vec<InFlight>,
    open: &Mutex<HashMap<QualifiedName, Seen>>,
) {
    let mut so_far = Vec::new();
    for InFlight { table, rows, bytes } in seen {
        let mut open = open.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(known) = open.get_mut(&table) else { continue };
        if known.replace((rows, bytes)) != Some((rows, bytes)) {
            telemetry.copy_state(&table, TableState::Copying);
            telemetry.restoring(&table, rows, bytes);
            so_far.push((table, rows, bytes));
        }
    }
    if let Err(error) = store.report_copying(&so_far).await {
        tracing::debug!(%error, "cannot report how far the restore is");
    }
}

/// Records tables as copied, each once.
struct Recorder<'a, 's> {
    loading: Loading<'a>,
    session: &'s mut Session,
    tables: &'a [&'a Archived],
    cut: Lsn,
    recorded: HashSet<usize>,
}

impl Recorder<'_, '_> {
    /// These tables hold all their rows: marks them as copied, in one transaction.
    async fn record(&mut self, places: &[usize]) -> Result<()> {
        let tables: Vec<&Archived> = places.iter().filter_map(|at| self.tables.get(*at).copied()).collect();
        let names: Vec<QualifiedName> = tables.iter().map(|table| table.name()).collect();
        let rows = self.commit(&tables, &names).await.doing(|| "marking the tables copied")?;
        self.recorded.extend(places);
        for ((table, name), rows) in tables.iter().zip(&names).zip(rows) {
            self.loading.telemetry.restoring(name, rows, table.printed());
            self.loading.telemetry.copy_state(name, TableState::Copied);
        }
        Ok(())
    }

    async fn commit(&mut self, tables: &[&Archived], names: &[QualifiedName]) -> Result<Vec<u64>> {
        let move_name = self.loading.store.name().as_str();
        let transaction = self.session.transaction().await?;
        let counts = names.iter().enumerate();
        let counts = counts.map(|(at, name)| format!("SELECT {at}::int4, count(*) FROM ONLY {name}"));
        let counts = counts.collect::<Vec<_>>().join(" UNION ALL ");
        let mut rows = vec![0; names.len()];
        for counted in &transaction.query(&counts, &[]).await.doing(|| "counting the rows")? {
            let (at, count): (i32, i64) = (counted.try_get(0)?, counted.try_get(1)?);
            if let Some(place) = usize::try_from(at).ok().and_then(|at| rows.get_mut(at)) {
                *place = u64::try_from(count).unwrap_or(0);
            }
        }
        let copied = tables.iter().zip(names).zip(&rows).map(|((table, name), &rows)| (name, rows, table.printed()));
        let copied = copied_sql(move_name, self.cut, &copied.collect::<Vec<_>>());
        let fence = fence_sql(move_name, self.loading.epoch);
        transaction
            .batch_execute(&format!("{copied};\n{fence}"))
            .await
            .map_err(|error| only_the_leader(error.into()))?;
        transaction.commit().await?;
        Ok(rows)
    }
}

/// Empties tables and marks them as being copied, in one transaction. `untouched` are those that the move never wrote
/// to: what they hold is not ours to remove.
async fn make_ours(
    session: &mut Session,
    loading: Loading<'_>,
    tables: &[QualifiedName],
    untouched: &[&QualifiedName],
) -> Result<()> {
    let transaction = session.transaction().await?;
    let names = tables.iter().map(|table| format!("ONLY {table}")).collect::<Vec<_>>().join(", ");
    let lock = format!("LOCK TABLE {names} IN ACCESS EXCLUSIVE MODE");
    transaction.batch_execute(&lock).await.doing(|| "locking the tables of the target")?;
    if let Some(table) = first_with_rows(&transaction, untouched).await? {
        return Err(copy::holds_strange_rows(table));
    }
    let name = loading.store.name().as_str();
    let marks = tables.iter().map(|table| copying_sql(name, table) + "; ").collect::<String>();
    transaction
        .batch_execute(&format!("TRUNCATE {names}; {marks}{}", fence_sql(name, loading.epoch)))
        .await
        .map_err(|error| only_the_leader(error.into()))
        .doing(|| "emptying the tables")?;
    transaction.commit().await.doing(|| "emptying the tables")
}

async fn first_with_rows<'t>(
    client: &impl GenericClient,
    tables: &[&'t QualifiedName],
) -> Result<Option<&'t QualifiedName>> {
    if tables.is_empty() {
        return Ok(None);
    }
    let questions = tables.iter().enumerate();
    let questions = questions.map(|(at, table)| format!("SELECT {at}::int4 WHERE EXISTS (SELECT FROM ONLY {table})"));
    let sql = questions.collect::<Vec<_>>().join(" UNION ALL ") + " LIMIT 1";
    let found = client.query_opt(&sql, &[]).await.doing(|| "looking for rows in the tables of the target")?;
    let Some(row) = found else { return Ok(None) };
    let at = usize::try_from(row.try_get::<_, i32>(0)?).unwrap_or(0);
    Ok(tables.get(at).copied())
}
