//! `copy.method = "dump"`: the rows in two steps, with the archive kept in between.
//!
//! 1. pg_dump writes every table in scope, under the snapshot of a cut, into a folder that belongs to the user:
//!    `pgtandem-<name>.dump` below the working folder. It can be looked at, copied, and restored elsewhere by hand.
//! 2. pg_restore loads it, and one transaction marks every table as copied under the archive's cut.
//!
//! The folder holds `rows/`, which is pg_dump's, and `pgtandem.json`, which says whose it is and, once every row is safely
//! on disk, the cut and the tables. The archive of another cut than the move's newest one is stale: it was made by a move
//! that was cleaned away. Its cut is crossed out before a newer one is taken, so that it is never taken for that one's.
//!
//! Killed in step 1: no cut is written, and the rows are dumped again. Step 2 first marks the tables as `copying`, in the
//! transaction that empties them, and refuses those that hold rows while they are `pending`, for these are someone else's.
//! Killed after that: the tables are ours, so they are emptied and loaded again; the source is not asked. Only the
//! first copy of a move comes from an archive; a table that is new while following is none of its business.
//!
//! A complete archive is never removed by us but for the next one, and a folder that is not ours is never written to.

use std::collections::{HashMap, HashSet};
use std::fs::{self, File};
use std::io::Write;
use std::num::NonZeroUsize;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use tokio_postgres::GenericClient;

use super::child::{Child, list_file};
use super::dump::{DumpRequest, pg_dump, with_patience};
use super::left_out::LeftOut;
use super::restore::{RESTORE, end_leftovers};
use super::{Programs, toc};
use crate::config::MoveName;
use crate::copy;
use crate::error::{Class, Doing, Error, Result};
use crate::postgres::catalog::Table;
use crate::postgres::{Lsn, QualifiedName, Server, Session, quote_literal};
use crate::state::{Store, TableState, copied_sql, copying_sql, fence_sql, only_the_leader};

/// Tables emptied by one transaction; each takes locks on itself, its TOAST table and its indexes.
const EMPTIED_AT_ONCE: usize = 100;

/// The folder of an archive of rows.
#[derive(Clone, Debug)]
pub struct DataArchive {
    folder: PathBuf,
    owner: Owner,
}

/// `pgtandem.json`
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Owner {
    #[serde(rename = "move")]
    name: String,
    /// Tells this source from any other.
    source: String,
    /// The cut's LSN, once the archive is complete.
    cut: Option<String>,
    /// What it holds.
    #[serde(default)]
    tables: Vec<Archived>,
}

/// A table of an archive.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Archived {
    /// On the source; the archive's table of contents knows it by that.
    oid: u32,
    schema: String,
    table: String,
    /// Its rows are checked against those of others, so it is loaded after them.
    #[serde(default)]
    late: bool,
}

impl Archived {
    fn name(&self) -> QualifiedName {
        QualifiedName::new(&self.schema, &self.table)
    }
}

/// What loading an archive needs.
#[derive(Clone, Copy)]
pub struct Loading<'a> {
    /// Where the rows go.
    pub target: &'a Server,
    /// The state of the move; it must know the archive's tables.
    pub store: &'a Store,
    /// Client programs that fit both servers.
    pub programs: &'a Programs,
    /// The number of this daemon, from [`crate::state::Leadership`].
    pub epoch: i64,
    /// So many tables are loaded at a time.
    pub workers: NonZeroUsize,
}

impl DataArchive {
    /// `pgtandem-<name>.dump` below the working folder.
    #[must_use]
    pub fn default_folder(name: &MoveName) -> PathBuf {
        PathBuf::from(format!("pgtandem-{name}.dump"))
    }

    /// Opens a folder, made if it is not there. `source` tells one source from another, such as its system identifier.
    ///
    /// # Errors
    /// Class operator: the folder holds something else, or an archive of another move or source.
    pub fn open(folder: &Path, name: &MoveName, source: &str) -> Result<Self> {
        open(folder, name, source).doing(|| format!("opening the archive folder {}", folder.display()))
    }

    /// The cut of a complete archive; `None` if the rows must (still) be dumped.
    ///
    /// # Errors
    /// Class operator: the note of the cut cannot be read.
    pub fn cut(&self) -> Result<Option<Lsn>> {
        self.owner
            .cut
            .as_deref()
            .map(|text| text.parse().map_err(|e: crate::postgres::lsn::InvalidLsn| foreign(&self.folder).because(e)))
            .transpose()
    }

    /// Durably says that the archive is not complete: before a newer cut is taken.
    ///
    /// # Errors
    /// A full disk.
    pub fn invalidate(&mut self) -> Result<()> {
        self.owner.cut = None;
        self.owner.tables.clear();
        write_owner(&self.folder, &self.owner).doing(|| format!("writing into {}", self.folder.display()))
    }

    /// Step 1: dumps the rows under the request's snapshot, whose cut is `cut`, `workers` tables at a time. `tables` are
    /// those in scope as the snapshot shows them.
    ///
    /// # Errors
    /// As [`super::failure`] reads them; class operator without a snapshot; a full disk.
    pub async fn dump(
        &mut self,
        request: DumpRequest<'_>,
        cut: Lsn,
        tables: &[Table],
        workers: NonZeroUsize,
    ) -> Result<()> {
        self.dump_rows(request, cut, tables, workers)
            .await
            .doing(|| format!("dumping rows into {}", self.folder.display()))
    }

    async fn dump_rows(
        &mut self,
        request: DumpRequest<'_>,
        cut: Lsn,
        tables: &[Table],
        workers: NonZeroUsize,
    ) -> Result<()> {
        let Some(snapshot) = request.snapshot else {
            return Err(Error::bug("rows dumped without the snapshot of their cut"));
        };
        let rows = self.rows();
        let (left_out, late) = {
            let session = request.source.connect("schema").await?;
            (LeftOut::find(&*session, request.scope).await?, copy::late(&session).await?)
        };
        self.invalidate()?;
        remove_folder(&rows)?;
        with_patience(|| {
            // An attempt that could not get a lock leaves a folder, which the next one would refuse.
            drop(remove_folder(&rows));
            pg_dump(request, &left_out)
                .args(["--format=directory", "--data-only", "--no-blobs", "--no-unlogged-table-data"])
                .arg(format!("--jobs={workers}"))
                .arg("--file")
                .arg(&rows)
        })
        .await?;
        // While pg_dump ran it held a lock on each table; before, one may have been rewritten under the snapshot's feet.
        copy::nothing_rewritten(request.source, snapshot, tables).await?;
        sync_folder(&rows)?;
        self.owner.cut = Some(cut.to_string());
        self.owner.tables = tables
            .iter()
            .map(|t| Archived {
                oid: t.oid,
                schema: t.name.schema.clone(),
                table: t.name.name.clone(),
                late: late.contains(&t.oid),
            })
            .collect();
        write_owner(&self.folder, &self.owner)
    }

    /// Step 2: loads the rows of the archive's tables into the target and marks them copied. Before it, they are emptied
    /// and marked as being copied, so that it can be repeated.
    ///
    /// # Errors
    /// As [`super::failure`] reads them; class operator if a table holds rows that are not ours; class retry if another
    /// daemon took the move.
    pub async fn restore(&self, loading: Loading<'_>) -> Result<()> {
        self.restore_rows(loading).await.doing(|| format!("restoring rows from {}", self.folder.display()))
    }

    async fn restore_rows(&self, loading: Loading<'_>) -> Result<()> {
        let cut = self.cut()?.ok_or_else(|| Error::bug("rows restored from an incomplete archive"))?;
        let states: HashMap<QualifiedName, TableState> =
            loading.store.tables().await?.into_iter().map(|table| (table.name, table.state)).collect();
        let tables: Vec<QualifiedName> = self.owner.tables.iter().map(Archived::name).collect();
        if let Some(table) = tables.iter().find(|name| states.get(name) == Some(&TableState::Copied)) {
            return Err(Error::bug(format!("an archive would be loaded over {}, which is copied", table.plain())));
        }
        let mut session = loading.target.connect("schema").await?;
        end_leftovers(&session, loading.target).await?;
        for chunk in tables.chunks(EMPTIED_AT_ONCE) {
            let untouched = |name: &&QualifiedName| states.get(name) != Some(&TableState::Copying);
            let untouched: Vec<&QualifiedName> = chunk.iter().filter(untouched).collect();
            make_ours(&mut session, loading, chunk, &untouched).await?;
        }
        self.load(loading, false).await?;
        self.load(loading, true).await?;
        record_copied(&mut session, loading, &tables, cut).await
    }

    async fn load(&self, Loading { target, programs, workers, .. }: Loading<'_>, late: bool) -> Result<()> {
        let rows = self.rows();
        let list = Child::new(programs.pg_restore()).arg("--list").arg(&rows).run().await?;
        let ours: HashSet<u32> =
            self.owner.tables.iter().filter(|table| table.late == late).map(|table| table.oid).collect();
        // Values of sequences are set at the cutover; the rows of an extension's own tables are the extension's business.
        let tables: Vec<_> = toc::parse(&list, &toc::Context::default())
            .into_iter()
            .filter(|entry| entry.kind == "TABLE DATA" && ours.contains(&entry.object.1))
            .collect();
        if tables.is_empty() {
            return Ok(());
        }
        let list = list_file(&self.folder, tables.iter().map(|entry| entry.line.as_str()))?;
        Child::new(programs.pg_restore())
            .server(target, RESTORE)
            .args(["--no-password", "--exit-on-error", "--data-only"])
            .arg(format!("--jobs={workers}"))
            .arg("--use-list")
            .arg(list.path())
            .database_argument()
            .arg(&rows)
            .run()
            .await
            .map(drop)
    }

    fn rows(&self) -> PathBuf {
        self.folder.join("rows")
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

/// Marks all tables as copied, in one transaction.
async fn record_copied(session: &mut Session, loading: Loading<'_>, tables: &[QualifiedName], cut: Lsn) -> Result<()> {
    let name = loading.store.name().as_str();
    let transaction = session.transaction().await?;
    let mut statements = String::new();
    for table in tables {
        let sql = format!(
            "SELECT count(*), pg_catalog.pg_table_size({}::pg_catalog.regclass) FROM ONLY {table}",
            quote_literal(&table.to_string())
        );
        let row = transaction.query_one(&sql, &[]).await.doing(|| format!("counting {}", table.plain()))?;
        let count = |at: usize| -> Result<u64> { Ok(u64::try_from(row.try_get::<_, i64>(at)?).unwrap_or(0)) };
        statements.push_str(&copied_sql(name, table, cut, count(0)?, count(1)?));
        statements.push_str(";\n");
    }
    statements.push_str(&fence_sql(name, loading.epoch));
    transaction
        .batch_execute(&statements)
        .await
        .map_err(|error| only_the_leader(error.into()))
        .doing(|| "marking the tables copied")?;
    transaction.commit().await.doing(|| "marking the tables copied")
}

fn open(folder: &Path, name: &MoveName, source: &str) -> Result<DataArchive> {
    let wanted = Owner { name: name.as_str().to_owned(), source: source.to_owned(), cut: None, tables: Vec::new() };
    let note = folder.join(NOTE);
    if note.exists() {
        let owner: Owner = serde_json::from_str(&fs::read_to_string(&note)?).map_err(|e| foreign(folder).because(e))?;
        if owner.name != wanted.name || owner.source != wanted.source {
            return Err(foreign(folder));
        }
        return Ok(DataArchive { folder: folder.to_owned(), owner });
    }
    make_private_folder(folder)?;
    // A note that was being written when the machine stopped is the only thing of ours that may be there.
    let strangers =
        fs::read_dir(folder)?.filter_map(std::result::Result::ok).any(|entry| entry.file_name() != NEW_NOTE);
    if strangers {
        return Err(foreign(folder));
    }
    write_owner(folder, &wanted)?;
    Ok(DataArchive { folder: folder.to_owned(), owner: wanted })
}

const NOTE: &str = "pgtandem.json";
const NEW_NOTE: &str = "pgtandem.json.new";

fn foreign(folder: &Path) -> Error {
    Error::new(
        Class::Operator,
        "archive_folder_taken",
        format!("{} holds something else than this move's archive", folder.display()),
    )
    .hint("move the folder away, or remove it if nobody needs it")
}

/// The whole file is there under its name, or the old one is.
fn write_owner(folder: &Path, owner: &Owner) -> Result<()> {
    let text = serde_json::to_string_pretty(owner).map_err(|e| Error::bug(e.to_string()))?;
    let new = folder.join(NEW_NOTE);
    let mut file = File::create(&new)?;
    file.write_all(text.as_bytes())?;
    file.sync_all()?;
    fs::rename(&new, folder.join(NOTE))?;
    File::open(folder)?.sync_all()?;
    Ok(())
}

/// Rows are for the user's eyes only.
fn make_private_folder(folder: &Path) -> Result<()> {
    use std::os::unix::fs::DirBuilderExt;
    fs::DirBuilder::new().recursive(true).mode(0o700).create(folder)?;
    Ok(())
}

fn remove_folder(folder: &Path) -> Result<()> {
    match fs::remove_dir_all(folder) {
        Err(e) if e.kind() != std::io::ErrorKind::NotFound => Err(e.into()),
        _ => Ok(()),
    }
}

/// pg_dump syncs its files in the versions that we know; this does not depend on it.
fn sync_folder(folder: &Path) -> Result<()> {
    for entry in fs::read_dir(folder)? {
        File::open(entry?.path())?.sync_all()?;
    }
    File::open(folder)?.sync_all()?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn name() -> MoveName {
        MoveName::new("app").unwrap()
    }

    #[test]
    fn an_archive_is_complete_once_its_cut_is_written() {
        let place = tempfile::tempdir().unwrap();
        let folder = place.path().join("x.dump");
        let mut archive = DataArchive::open(&folder, &name(), "source 1").unwrap();
        assert_eq!(archive.cut().unwrap(), None);
        archive.owner.cut = Some("16/B374D848".into());
        write_owner(&folder, &archive.owner).unwrap();
        let mut again = DataArchive::open(&folder, &name(), "source 1").unwrap();
        assert_eq!(again.cut().unwrap(), Some("16/B374D848".parse().unwrap()));
        again.invalidate().unwrap();
        let stale = DataArchive::open(&folder, &name(), "source 1").unwrap();
        assert_eq!(stale.cut().unwrap(), None);
    }

    #[test]
    fn a_folder_of_somebody_else_is_refused() {
        let place = tempfile::tempdir().unwrap();
        fs::write(place.path().join("holiday.jpg"), "").unwrap();
        let error = DataArchive::open(place.path(), &name(), "source 1").unwrap_err();
        assert_eq!(error.code(), "archive_folder_taken");
        assert_eq!(fs::read_dir(place.path()).unwrap().count(), 1);
    }

    #[test]
    fn an_archive_of_another_source_is_refused() {
        let place = tempfile::tempdir().unwrap();
        DataArchive::open(place.path(), &name(), "source 1").unwrap();
        assert!(DataArchive::open(place.path(), &name(), "source 2").is_err());
        assert!(DataArchive::open(place.path(), &MoveName::new("other").unwrap(), "source 1").is_err());
    }
}
