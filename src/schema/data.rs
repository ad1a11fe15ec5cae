//! `copy.method = "dump"`: the rows in two steps, with the archive kept in between.
//!
//! 1. pg_dump writes every table in scope, under the snapshot of a cut, into a folder that belongs to the user:
//!    `pgtandem-<name>.dump` below the working folder. It can be looked at, copied, and restored elsewhere by hand.
//! 2. pg_restore loads it, and each table that is loaded is marked as copied under the archive's cut ([`load`]).
//!
//! The folder ([`folder`]) holds `rows/`, which is pg_dump's, and `pgtandem.json`, which says whose it is and, once every row
//! is safely on disk, the cut and the tables with their files. The archive of another cut than the move's newest one is stale: it
//! was made by a move that was cleaned away. Its cut is crossed out before a newer one is taken, so that it is never taken for
//! that one's. An archive with a file that is missing or of another size is not taken for complete.
//!
//! Killed in step 1: no cut is written, and the rows are dumped again. Step 2 first marks the tables as `copying`, in the
//! transaction that empties them, and refuses those that hold rows while they are `pending`, for these are someone else's.
//! Killed after that: the tables are ours, so those that are not marked as copied are emptied and loaded again; the source is not
//! asked. Only the first copy of a move comes from an archive; a table that is new while following is none of its business.
//!
//! Once its rows are on the target an archive is removed, unless it is to be kept (`copy.keep_archive`). Before, it is never
//! removed by us but for the next one, and a folder that is not ours is never written to.

mod dump;
mod folder;
mod load;
mod said;
mod watch;

use std::num::NonZeroUsize;
use std::path::{Path, PathBuf};

pub use dump::Listeners;
use folder::Note;

use super::Programs;
use super::dump::DumpRequest;
use crate::config::MoveName;
use crate::error::{Doing, Result};
use crate::postgres::catalog::Table;
use crate::postgres::{Lsn, Server};
use crate::state::Store;
use crate::telemetry::Telemetry;

/// The folder of an archive of rows.
#[derive(Clone, Debug)]
pub struct DataArchive {
    folder: PathBuf,
    note: Note,
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
    /// Hears how far it is.
    pub telemetry: &'a Telemetry,
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
        let note =
            folder::open(folder, name, source).doing(|| format!("opening the archive folder {}", folder.display()))?;
        Ok(Self { folder: folder.to_owned(), note })
    }

    /// The cut of a complete archive; `None` if the rows must (still) be dumped.
    ///
    /// # Errors
    /// Class operator: the note of the cut cannot be read.
    pub fn cut(&self) -> Result<Option<Lsn>> {
        let cut = self.note.cut.as_deref().filter(|_| self.note.format == folder::FORMAT);
        cut.map(|text| {
            text.parse().map_err(|e: crate::postgres::lsn::InvalidLsn| folder::foreign(&self.folder).because(e))
        })
        .transpose()
    }

    /// Whether the archive is complete under this cut, with every file as it was then. One that lost a file is said.
    ///
    /// # Errors
    /// As [`DataArchive::cut`].
    pub fn holds(&self, cut: Lsn) -> Result<bool> {
        if self.cut()? != Some(cut) {
            return Ok(false);
        }
        let damaged = folder::damaged(&self.rows(), &self.note);
        if let Some(file) = &damaged {
            tracing::warn!("the archive is not what it was: {} is missing, or has another size", file.display());
        }
        Ok(damaged.is_none())
    }

    /// Durably says that the archive is not complete: before a newer cut is taken.
    ///
    /// # Errors
    /// A full disk.
    pub fn invalidate(&mut self) -> Result<()> {
        self.note.cut = None;
        self.note.tables.clear();
        self.write()
    }

    /// Durably says that the archive is complete.
    fn complete(&mut self, cut: Lsn) -> Result<()> {
        self.note.cut = Some(cut.to_string());
        self.note.format = folder::FORMAT;
        self.write()
    }

    fn write(&self) -> Result<()> {
        folder::write(&self.folder, &self.note).doing(|| format!("writing into {}", self.folder.display()))
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
        listeners: Listeners<'_>,
    ) -> Result<()> {
        let doing = format!("dumping rows into {}", self.folder.display());
        dump::dump(self, request, cut, tables, workers, listeners).await.doing(|| doing)
    }

    /// Step 2: loads the rows of the archive's tables that are not copied into the target, and marks each as copied. Before
    /// it, they are emptied and marked as being copied, so that it can be repeated.
    ///
    /// # Errors
    /// As [`super::failure`] reads them; class operator if a table holds rows that are not ours; class retry if another
    /// daemon took the move.
    pub async fn restore(&self, loading: Loading<'_>) -> Result<()> {
        load::restore(self, loading).await.doing(|| format!("restoring rows from {}", self.folder.display()))
    }

    /// Removes the archive, which nobody needs any more. What somebody else put beside it stays.
    ///
    /// # Errors
    /// A file that cannot be removed.
    pub fn remove(self) -> Result<()> {
        folder::remove(&self.folder).doing(|| format!("removing {}", self.folder.display()))
    }

    fn rows(&self) -> PathBuf {
        self.folder.join("rows")
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

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
        archive.complete("16/B374D848".parse().unwrap()).unwrap();
        let mut again = DataArchive::open(&folder, &name(), "source 1").unwrap();
        assert_eq!(again.cut().unwrap(), Some("16/B374D848".parse().unwrap()));
        again.invalidate().unwrap();
        let stale = DataArchive::open(&folder, &name(), "source 1").unwrap();
        assert_eq!(stale.cut().unwrap(), None);
    }

    #[test]
    fn an_archive_that_lost_a_file_does_not_hold() {
        let place = tempfile::tempdir().unwrap();
        let cut: Lsn = "16/B374D848".parse().unwrap();
        let mut archive = DataArchive::open(place.path(), &name(), "source 1").unwrap();
        fs::create_dir(archive.rows()).unwrap();
        for (file, text) in [("toc.dat", "contents"), ("7.dat", "1\n2\n")] {
            fs::write(archive.rows().join(file), text).unwrap();
        }
        archive.note.tables = vec![folder::Archived {
            oid: 1,
            schema: "public".into(),
            table: "t".into(),
            late: false,
            rows: folder::rows_file(&archive.rows(), 7, 0),
        }];
        archive.complete(cut).unwrap();
        assert!(archive.holds(cut).unwrap());
        assert!(!archive.holds("16/B374D849".parse().unwrap()).unwrap());
        fs::write(archive.rows().join("7.dat"), "1\n").unwrap();
        assert!(!archive.holds(cut).unwrap());
    }

    #[test]
    fn the_archive_of_a_version_that_wrote_another_note_is_made_again() {
        let place = tempfile::tempdir().unwrap();
        let note = r#"{"move": "app", "source": "source 1", "cut": "0/1", "tables": [{"oid": 1, "schema": "a", "table": "b"}]}"#;
        fs::write(place.path().join("pgtandem.json"), note).unwrap();
        assert_eq!(DataArchive::open(place.path(), &name(), "source 1").unwrap().cut().unwrap(), None);
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
