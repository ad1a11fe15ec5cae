//! The folder of an archive: whose it is, whether it is complete, and which file holds which table.
//!
//! The note `pgtandem.json` is replaced whole, so that it always says one thing or the other. A folder that is not ours is
//! never written to.

use std::fs::{self, File};
use std::io::{Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::config::MoveName;
use crate::error::{Class, Error, Result};
use crate::postgres::QualifiedName;

const NOTE: &str = "pgtandem.json";
const NEW_NOTE: &str = "pgtandem.json.new";
/// What this version writes. An archive with another note is made again.
pub(super) const FORMAT: u32 = 1;

/// `pgtandem.json`
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Note {
    #[serde(rename = "move")]
    pub(super) name: String,
    /// Tells this source from any other.
    pub(super) source: String,
    /// The shape of what follows.
    #[serde(default)]
    pub(super) format: u32,
    /// The cut's LSN, once the archive is complete.
    pub(super) cut: Option<String>,
    /// What it holds.
    #[serde(default)]
    pub(super) tables: Vec<Archived>,
}

/// A table of an archive.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Archived {
    /// On the source; the archive's table of contents knows it by that.
    pub(super) oid: u32,
    pub(super) schema: String,
    pub(super) table: String,
    /// Its rows are checked against those of others, so it is loaded after them.
    #[serde(default)]
    pub(super) late: bool,
    /// Where its rows are; `None` where pg_dump takes none, as of an unlogged table.
    #[serde(default)]
    pub(super) rows: Option<RowsFile>,
}

/// The file with the rows of one table.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct RowsFile {
    /// Its name in `rows/`.
    pub(super) file: String,
    /// Its size.
    pub(super) bytes: u64,
    /// What COPY printed into it, in bytes.
    pub(super) printed: u64,
}

impl Archived {
    pub(super) fn name(&self) -> QualifiedName {
        QualifiedName::new(&self.schema, &self.table)
    }

    /// What COPY printed, in bytes.
    pub(super) fn printed(&self) -> u64 {
        self.rows.as_ref().map_or(0, |rows| rows.printed)
    }
}

/// The note of a folder of this move and source; the folder is made if it is not there.
pub(super) fn open(folder: &Path, name: &MoveName, source: &str) -> Result<Note> {
    let wanted = Note {
        name: name.as_str().to_owned(),
        source: source.to_owned(),
        format: FORMAT,
        cut: None,
        tables: Vec::new(),
    };
    if let Some(note) = read(folder)? {
        if note.name != wanted.name || note.source != wanted.source {
            return Err(foreign(folder));
        }
        return Ok(note);
    }
    make_private(folder)?;
    // A note that was being written when the machine stopped is the only thing of ours that may be there.
    let strangers =
        fs::read_dir(folder)?.filter_map(std::result::Result::ok).any(|entry| entry.file_name() != NEW_NOTE);
    if strangers {
        return Err(foreign(folder));
    }
    write(folder, &wanted)?;
    Ok(wanted)
}

fn read(folder: &Path) -> Result<Option<Note>> {
    match fs::read_to_string(folder.join(NOTE)) {
        Ok(text) => serde_json::from_str(&text).map(Some).map_err(|e| foreign(folder).because(e)),
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => Ok(None),
        Err(e) => Err(e.into()),
    }
}

pub(super) fn foreign(folder: &Path) -> Error {
    Error::new(
        Class::Operator,
        "archive_folder_taken",
        format!("{} holds something else than this move's archive", folder.display()),
    )
    .hint("move the folder away, or remove it if nobody needs it")
}

/// The whole note is there under its name, or the old one is.
pub(super) fn write(folder: &Path, note: &Note) -> Result<()> {
    let text = serde_json::to_string_pretty(note).map_err(|e| Error::bug(e.to_string()))?;
    let new = folder.join(NEW_NOTE);
    let mut file = File::create(&new)?;
    file.write_all(text.as_bytes())?;
    file.sync_all()?;
    fs::rename(&new, folder.join(NOTE))?;
    File::open(folder)?.sync_all()?;
    Ok(())
}

/// Rows are for the user's eyes only.
fn make_private(folder: &Path) -> Result<()> {
    use std::os::unix::fs::DirBuilderExt;
    fs::DirBuilder::new().recursive(true).mode(0o700).create(folder)?;
    Ok(())
}

/// Removes what an archive consists of; the note goes last, so that what a death leaves is still known to be ours.
pub(super) fn remove(folder: &Path) -> Result<()> {
    remove_folder(&folder.join("rows"))?;
    for note in [NEW_NOTE, NOTE] {
        ignore_missing(fs::remove_file(folder.join(note)))?;
    }
    // What somebody else put there stays, and with it the folder.
    drop(fs::remove_dir(folder));
    Ok(())
}

pub(super) fn remove_folder(folder: &Path) -> Result<()> {
    ignore_missing(fs::remove_dir_all(folder))
}

fn ignore_missing(outcome: std::io::Result<()>) -> Result<()> {
    match outcome {
        Err(e) if e.kind() != std::io::ErrorKind::NotFound => Err(e.into()),
        _ => Ok(()),
    }
}

/// pg_dump syncs its files in the versions that we know; this does not depend on it.
pub(super) fn sync(folder: &Path) -> Result<()> {
    for entry in fs::read_dir(folder)? {
        File::open(entry?.path())?.sync_all()?;
    }
    File::open(folder)?.sync_all()?;
    Ok(())
}

/// After the rows stand a line that ends them and two that are empty.
const END: u64 = 5;

/// The file of an entry of the archive's table of contents, if it is there. `seen`: so many bytes were printed at least.
pub(super) fn rows_file(rows: &Path, item: u32, seen: u64) -> Option<RowsFile> {
    ["dat.gz", "dat"].iter().find_map(|ending| {
        let file = format!("{item}.{ending}");
        let path = rows.join(&file);
        let bytes = fs::metadata(&path).ok()?.len();
        let held = if *ending == "dat" { bytes } else { unpacked(&path, bytes, seen).unwrap_or(seen) };
        Some(RowsFile { file, bytes, printed: held.saturating_sub(END) })
    })
}

/// What a gzip file holds: its last four bytes say it, but for multiples of 4 GiB, which `seen` and its own size tell where
/// they can. See RFC 1952, ISIZE.
fn unpacked(path: &Path, bytes: u64, seen: u64) -> std::io::Result<u64> {
    let mut file = File::open(path)?;
    file.seek(SeekFrom::End(-4))?;
    let mut last = [0; 4];
    file.read_exact(&mut last)?;
    Ok(at_least(u64::from(u32::from_le_bytes(last)), seen.max(bytes.saturating_sub(bytes / 100 + OVERHEAD))))
}

/// What does not pack well is a little smaller than its file: by this, and by less than one in a hundred.
const OVERHEAD: u64 = 64;

/// The smallest number that is `low` but for multiples of 4 GiB and not below `least`.
fn at_least(low: u64, least: u64) -> u64 {
    low.saturating_add(least.saturating_sub(low).div_ceil(1 << 32).saturating_mul(1 << 32))
}

/// The first file that is missing or not as it was when the archive was complete.
pub(super) fn damaged(rows: &Path, note: &Note) -> Option<PathBuf> {
    let contents = rows.join("toc.dat");
    if !contents.is_file() {
        return Some(contents);
    }
    let files = note.tables.iter().filter_map(|table| table.rows.as_ref());
    files
        .map(|known| (rows.join(&known.file), known.bytes))
        .find(|(path, bytes)| fs::metadata(path).map(|file| file.len()).ok() != Some(*bytes))
        .map(|(path, _)| path)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_size_of_what_is_packed_is_read_modulo_four_gigabytes() {
        assert_eq!(at_least(100, 0), 100);
        assert_eq!(at_least(100, 99), 100);
        assert_eq!(at_least(100, 101), (1 << 32) + 100);
        assert_eq!(at_least(0, 3 << 32), 3 << 32);
    }

    #[test]
    fn a_file_of_few_rows_is_larger_than_they_are() {
        let place = tempfile::tempdir().unwrap();
        // What gzip makes of "1\n" and the end: only its last four bytes matter.
        let packed = [&[0; 23][..], &[7, 0, 0, 0]].concat();
        fs::write(place.path().join("7.dat.gz"), packed).unwrap();
        fs::write(place.path().join("8.dat"), "1\n2\n\\.\n\n\n").unwrap();
        assert_eq!(rows_file(place.path(), 7, 0).map(|file| (file.bytes, file.printed)), Some((27, 2)));
        assert_eq!(rows_file(place.path(), 8, 0).map(|file| (file.bytes, file.printed)), Some((9, 4)));
        assert_eq!(rows_file(place.path(), 9, 0), None);
    }

    #[test]
    fn what_is_removed_is_the_archive_and_nothing_else() {
        let place = tempfile::tempdir().unwrap();
        let folder = place.path().join("x.dump");
        open(&folder, &MoveName::new("app").unwrap(), "source 1").unwrap();
        fs::create_dir(folder.join("rows")).unwrap();
        fs::write(folder.join("holiday.jpg"), "").unwrap();
        remove(&folder).unwrap();
        let left: Vec<_> = fs::read_dir(&folder).unwrap().map(|entry| entry.unwrap().file_name()).collect();
        assert_eq!(left, ["holiday.jpg"]);
        fs::remove_file(folder.join("holiday.jpg")).unwrap();
        remove(&folder).unwrap();
        assert!(!folder.exists());
        remove(&folder).unwrap();
    }
}
