//! `copy.method = "dump"`: the rows in two steps, with the archive kept in between.
//!
//! 1. pg_dump writes every table in scope, under the snapshot of a cut, into a folder that belongs to the user:
//!    `pgtandem-<name>.dump` below the working folder. It can be looked at, copied, and restored elsewhere by hand.
//! 2. pg_restore loads it, and one transaction marks every table as copied under the archive's cut.
//!
//! The folder holds `rows/`, which is pg_dump's, and `pgtandem.json`, which says whose it is and, once every row is safely
//! on disk, the cut. Killed in step 1: no cut is written, and the rows are dumped again. Killed in step 2: the tables
//! are emptied and loaded again from the archive; the source is not asked. The folder is never removed by us
//! once it is complete, and a folder that is not ours is never written to.

use std::fs::{self, File};
use std::io::Write;
use std::num::NonZeroUsize;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::child::{Child, list_file};
use super::dump::{DumpRequest, pg_dump, with_patience};
use super::left_out::LeftOut;
use super::restore::{RESTORE, end_leftovers};
use super::{Programs, toc};
use crate::config::MoveName;
use crate::error::{Class, Doing, Error, Result};
use crate::postgres::{Lsn, QualifiedName, Server, quote_literal};
use crate::state::{Store, copied_sql};

/// Tables emptied by one statement; each takes locks on itself, its TOAST table and its indexes.
const TRUNCATE_AT_ONCE: usize = 100;

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
    /// Tells this source, and this run of the move, from any other.
    source: String,
    /// The cut's LSN, once the archive is complete.
    cut: Option<String>,
}

impl DataArchive {
    /// `pgtandem-<name>.dump` below the working folder.
    #[must_use]
    pub fn default_folder(name: &MoveName) -> PathBuf {
        PathBuf::from(format!("pgtandem-{name}.dump"))
    }

    /// Opens a folder, made if it is not there. `source` tells one source and slot from another, such as the system
    /// identifier with the slot's first LSN: an archive of another one is stale.
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

    /// Step 1: dumps the rows under the request's snapshot, whose cut is `cut`, `workers` tables at a time.
    ///
    /// # Errors
    /// As [`super::failure`] reads them; class operator without a snapshot; a full disk.
    pub async fn dump(&mut self, request: DumpRequest<'_>, cut: Lsn, workers: NonZeroUsize) -> Result<()> {
        self.dump_rows(request, cut, workers).await.doing(|| format!("dumping rows into {}", self.folder.display()))
    }

    async fn dump_rows(&mut self, request: DumpRequest<'_>, cut: Lsn, workers: NonZeroUsize) -> Result<()> {
        if request.snapshot.is_none() {
            return Err(Error::bug("rows dumped without the snapshot of their cut"));
        }
        let rows = self.rows();
        let left_out = {
            let session = request.source.connect("schema").await?;
            LeftOut::find(&*session, request.scope).await?
        };
        remove_folder(&rows)?;
        with_patience(|| {
            // An attempt that could not get a lock leaves a folder, which the next one would refuse.
            drop(remove_folder(&rows));
            pg_dump(request, &left_out)
                .args(["--format=directory", "--data-only", "--no-blobs"])
                .arg(format!("--jobs={workers}"))
                .arg("--file")
                .arg(&rows)
        })
        .await?;
        sync_folder(&rows)?;
        self.owner.cut = Some(cut.to_string());
        write_owner(&self.folder, &self.owner)
    }

    /// Step 2: loads the rows of `tables` into the target, `workers` tables at a time, and marks them copied.
    /// Before it, they are emptied, so that it can be repeated.
    ///
    /// # Errors
    /// As [`super::failure`] reads them; class operator if the archive is not complete.
    pub async fn restore(
        &self,
        target: &Server,
        store: &Store,
        programs: &Programs,
        tables: &[QualifiedName],
        workers: NonZeroUsize,
    ) -> Result<()> {
        async {
            let cut = self.cut()?.ok_or_else(|| Error::bug("rows restored from an incomplete archive"))?;
            let mut session = target.connect("schema").await?;
            end_leftovers(&session, target).await?;
            for chunk in tables.chunks(TRUNCATE_AT_ONCE) {
                let names = chunk.iter().map(|table| format!("ONLY {table}")).collect::<Vec<_>>().join(", ");
                session.batch_execute(&format!("TRUNCATE {names}")).await.doing(|| "emptying the tables")?;
            }
            self.load(target, programs, workers).await?;
            let mut statements = String::new();
            let transaction = session.transaction().await?;
            for table in tables {
                let sql = format!(
                    "SELECT count(*), pg_catalog.pg_table_size({}::pg_catalog.regclass) FROM ONLY {table}",
                    quote_literal(&table.to_string())
                );
                let row = transaction.query_one(&sql, &[]).await.doing(|| format!("counting {}", table.plain()))?;
                let count = |at: usize| -> Result<u64> { Ok(u64::try_from(row.try_get::<_, i64>(at)?).unwrap_or(0)) };
                statements.push_str(&copied_sql(store.name().as_str(), table, cut, count(0)?, count(1)?));
                statements.push_str(";\n");
            }
            transaction.batch_execute(&statements).await.doing(|| "marking the tables copied")?;
            transaction.commit().await.doing(|| "marking the tables copied")
        }
        .await
        .doing(|| format!("restoring rows from {}", self.folder.display()))
    }

    async fn load(&self, target: &Server, programs: &Programs, workers: NonZeroUsize) -> Result<()> {
        let rows = self.rows();
        let list = Child::new(programs.pg_restore()).arg("--list").arg(&rows).run().await?;
        // Values of sequences are set at the cutover.
        let tables: Vec<_> = toc::parse(&list, &toc::Context::default())
            .into_iter()
            .filter(|entry| entry.kind == "TABLE DATA")
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

fn open(folder: &Path, name: &MoveName, source: &str) -> Result<DataArchive> {
    let wanted = Owner { name: name.as_str().to_owned(), source: source.to_owned(), cut: None };
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
        let again = DataArchive::open(&folder, &name(), "source 1").unwrap();
        assert_eq!(again.cut().unwrap(), Some("16/B374D848".parse().unwrap()));
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
