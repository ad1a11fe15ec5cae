//! The folder of a spool: whose it is, its segments, and how far each of them is durable.
//!
//! The folder holds `pgtandem.json`, which says whose it is; `lock`, which a process holds as long as it works here; and the
//! segments, each named after the position at which it begins. It belongs to one slot as it was made once: what was
//! received from an earlier one of the same name is not read, and goes when the folder is opened to be written.

use std::collections::VecDeque;
use std::fs::{self, File, OpenOptions, TryLockError};
use std::io::{self, ErrorKind, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};

use serde::{Deserialize, Serialize};

use super::record::{PREFACE, Whole, preface, scan};
use crate::config::MoveName;
use crate::error::{Class, Error, Result};
use crate::postgres::Lsn;
use crate::state::MoveRecord;
use crate::telemetry::Telemetry;

const NOTE: &str = "pgtandem.json";
const NEW_NOTE: &str = "pgtandem.json.new";
const LOCK: &str = "lock";
const SEGMENT: &str = ".spool";

/// Whose a spool is.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Owner {
    #[serde(rename = "move")]
    name: String,
    /// Tells this source from any other.
    source: String,
    slot: String,
    /// Where the slot was made; another one of the same name has another.
    slot_lsn: String,
}

impl Owner {
    /// `None` before the slot is made.
    pub(super) fn of(name: &MoveName, record: &MoveRecord) -> Option<Self> {
        Some(Self {
            name: name.as_str().to_owned(),
            source: record.source_identity.to_string(),
            slot: name.slot(),
            slot_lsn: record.slot_lsn?.to_string(),
        })
    }

    fn is_same_move(&self, other: &Self) -> bool {
        (&self.name, &self.source, &self.slot) == (&other.name, &other.source, &other.slot)
    }
}

/// A segment: everything that committed from `start` to `end`, in so many durable bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Segment {
    pub start: Lsn,
    pub bytes: u64,
    pub end: Lsn,
}

/// The files of a spool, open. One process at a time has it; within that, one task writes and one reads.
#[derive(Debug)]
pub(crate) struct Spool {
    folder: PathBuf,
    segments: Mutex<VecDeque<Segment>>,
    telemetry: Telemetry,
    /// Released by the system when it is closed.
    _lock: File,
}

impl Spool {
    /// Opens the folder of a move; with `make`, it is made where it is not there, and of an earlier slot nothing is left in it.
    /// Without, `None` says that nothing of this slot is there.
    ///
    /// # Errors
    /// Class operator: it is somebody else's, or cannot be read. Class retry: another process works in it.
    pub(super) fn open(folder: &Path, owner: &Owner, telemetry: Telemetry, make: bool) -> Result<Option<Self>> {
        let failed = |error: io::Error| unusable(folder, &error);
        let known = read_owner(folder)?;
        match &known {
            Some(known) if !known.is_same_move(owner) => return Err(foreign(folder)),
            None if !make => return Ok(None),
            _ => {}
        }
        fs::DirBuilder::new().recursive(true).mode(0o700).create(folder).map_err(failed)?;
        if known.is_none() && holds_strangers(folder).map_err(failed)? {
            return Err(foreign(folder));
        }
        let lock = lock(folder)?;
        if known.as_ref() != Some(owner) {
            if !make {
                return Ok(None);
            }
            remove_segments(folder).map_err(failed)?;
            write_owner(folder, owner).map_err(failed)?;
        }
        let segments = read_segments(folder).map_err(failed)?;
        let spool = Self { folder: folder.to_owned(), segments: Mutex::new(segments), telemetry, _lock: lock };
        spool.tell();
        Ok(Some(spool))
    }

    pub(super) fn folder(&self) -> &Path {
        &self.folder
    }

    fn segments(&self) -> MutexGuard<'_, VecDeque<Segment>> {
        self.segments.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Everything that committed between these two is here; `None`: nothing is.
    pub(super) fn range(&self) -> Option<(Lsn, Lsn)> {
        let segments = self.segments();
        Some((segments.front()?.start, segments.back()?.end))
    }

    /// The end of [`Spool::range`], or zero.
    pub(crate) fn end(&self) -> Lsn {
        self.range().map_or(Lsn::ZERO, |(_, end)| end)
    }

    /// Whether everything that committed from here to its end is in it.
    pub(super) fn holds_from(&self, position: Lsn) -> bool {
        self.range().is_some_and(|(start, end)| start <= position && position < end)
    }

    /// What is on the disk and durable, in bytes.
    pub(super) fn bytes(&self) -> u64 {
        self.segments().iter().map(|segment| segment.bytes).sum()
    }

    /// The segment in which to look for what committed from here on.
    pub(super) fn segment_of(&self, position: Lsn) -> Option<Segment> {
        self.segments().iter().rev().find(|segment| segment.start <= position).copied()
    }

    /// How far a segment is now, the one behind it, and how many bytes are in all those behind it.
    pub(super) fn look(&self, start: Lsn) -> Option<(Segment, Option<Segment>, u64)> {
        let segments = self.segments();
        let at = segments.iter().position(|segment| segment.start == start)?;
        let behind = segments.iter().skip(at + 1);
        Some((*segments.get(at)?, behind.clone().next().copied(), behind.map(|segment| segment.bytes).sum()))
    }

    pub(super) fn last(&self) -> Option<Segment> {
        self.segments().back().copied()
    }

    /// The last segment is durable so far.
    pub(super) fn grown(&self, bytes: u64, end: Lsn) {
        if let Some(last) = self.segments().back_mut() {
            (last.bytes, last.end) = (bytes, end);
        }
        self.tell();
    }

    /// Makes the segment that begins here; it is there when this returns, whatever dies.
    ///
    /// # Errors
    /// The disk's.
    pub(super) fn begin_segment(&self, start: Lsn) -> io::Result<File> {
        let mut file = private().write(true).create(true).truncate(true).open(self.path(start))?;
        file.write_all(&preface(start))?;
        file.sync_all()?;
        File::open(&self.folder)?.sync_all()?;
        self.segments().push_back(Segment { start, bytes: PREFACE as u64, end: start });
        self.tell();
        Ok(file)
    }

    pub(super) fn path(&self, start: Lsn) -> PathBuf {
        self.folder.join(format!("{:016X}{SEGMENT}", start.as_u64()))
    }

    /// The target durably holds everything up to `progress`: removes the segments that hold nothing else. The last one goes only
    /// if nobody writes to it (`to_the_end`).
    pub(crate) fn let_go(&self, progress: Lsn, to_the_end: bool) {
        let mut gone = Vec::new();
        {
            let mut segments = self.segments();
            while let Some(first) = segments.front().copied() {
                let is_last = segments.len() == 1;
                if first.end > progress || is_last && !to_the_end {
                    break;
                }
                gone.extend(segments.pop_front());
            }
        }
        for segment in &gone {
            if let Err(error) = remove(&self.path(segment.start)) {
                tracing::warn!(%error, folder = %self.folder.display(), "a segment of the spool could not be removed");
            }
        }
        if !gone.is_empty() {
            self.tell();
        }
    }

    /// Removes what a death left of a segment in the making. Before anything is written.
    ///
    /// # Errors
    /// The disk's.
    pub(super) fn sweep(&self) -> io::Result<()> {
        let known: Vec<Lsn> = self.segments().iter().map(|segment| segment.start).collect();
        for start in starts(&self.folder)?.into_iter().filter(|start| !known.contains(start)) {
            remove(&self.path(start))?;
        }
        File::open(&self.folder)?.sync_all()
    }

    /// Removes all of it; nobody may be writing.
    pub(super) fn empty(&self) {
        self.let_go(Lsn::new(u64::MAX), true);
    }

    fn tell(&self) {
        self.telemetry.queue("spool", self.bytes());
    }

    /// What was read cannot be what was written.
    pub(super) fn damaged(&self, start: Lsn, why: &str) -> Error {
        Error::new(
            Class::Operator,
            "spool_damaged",
            format!("the spool's file {} is damaged: {why}", self.path(start).display()),
        )
        .hint(
            "nothing was applied from there on, and the source does not have these changes any more: bring the file back as it \
             was, or run `pgtandem clean`, empty the target and begin the move again",
        )
    }
}

/// Removes what a move has in its folder, and the folder if nothing else is in it. Returns whether there was something.
///
/// # Errors
/// Class operator: the folder is another move's, or cannot be changed.
pub(super) fn remove_folder(folder: &Path, name: &MoveName) -> Result<bool> {
    let failed = |error: io::Error| unusable(folder, &error);
    let Some(owner) = read_owner(folder)? else { return Ok(false) };
    if owner.name != name.as_str() {
        return Err(foreign(folder));
    }
    let _lock = lock(folder)?;
    remove_segments(folder).map_err(failed)?;
    for file in [NEW_NOTE, NOTE, LOCK] {
        remove(&folder.join(file)).map_err(failed)?;
    }
    match fs::remove_dir(folder) {
        // Whatever else is there is not ours.
        Err(error) if error.kind() != ErrorKind::DirectoryNotEmpty => Err(failed(error)),
        _ => Ok(true),
    }
}

/// Open to its owner alone.
fn private() -> OpenOptions {
    let mut options = OpenOptions::new();
    options.mode(0o600);
    options
}

fn remove(path: &Path) -> io::Result<()> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}

fn read_owner(folder: &Path) -> Result<Option<Owner>> {
    match fs::read_to_string(folder.join(NOTE)) {
        Ok(text) => serde_json::from_str(&text).map(Some).map_err(|error| foreign(folder).because(error)),
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(None),
        Err(error) => Err(unusable(folder, &error)),
    }
}

/// The whole note is there under its name, or the old one is.
fn write_owner(folder: &Path, owner: &Owner) -> io::Result<()> {
    let new = folder.join(NEW_NOTE);
    let mut file = private().write(true).create(true).truncate(true).open(&new)?;
    file.write_all(serde_json::to_string_pretty(owner)?.as_bytes())?;
    file.sync_all()?;
    fs::rename(&new, folder.join(NOTE))?;
    File::open(folder)?.sync_all()
}

/// Whether there is anything that we do not leave where a note was never written.
fn holds_strangers(folder: &Path) -> io::Result<bool> {
    for entry in fs::read_dir(folder)? {
        let name = entry?.file_name();
        if name != NEW_NOTE && name != LOCK {
            return Ok(true);
        }
    }
    Ok(false)
}

fn lock(folder: &Path) -> Result<File> {
    let file = private().write(true).create(true).truncate(false).open(folder.join(LOCK));
    let file = file.map_err(|error| unusable(folder, &error))?;
    match file.try_lock() {
        Ok(()) => Ok(file),
        Err(TryLockError::WouldBlock) => Err(Error::new(
            Class::Retry,
            "spool_in_use",
            format!("another process works in the spool's folder {}", folder.display()),
        )
        .hint("a daemon of this move is ending; if one of another move runs, give each a follow.spool of its own")),
        Err(TryLockError::Error(error)) => Err(unusable(folder, &error)),
    }
}

/// Where the segments of a folder begin, in their order.
fn starts(folder: &Path) -> io::Result<Vec<Lsn>> {
    let mut starts = Vec::new();
    for entry in fs::read_dir(folder)? {
        let name = entry?.file_name();
        let digits = name.to_str().and_then(|name| name.strip_suffix(SEGMENT)).filter(|digits| digits.len() == 16);
        starts.extend(digits.and_then(|digits| u64::from_str_radix(digits, 16).ok()).map(Lsn::new));
    }
    starts.sort_unstable();
    Ok(starts)
}

fn remove_segments(folder: &Path) -> io::Result<()> {
    for start in starts(folder)? {
        remove(&folder.join(format!("{:016X}{SEGMENT}", start.as_u64())))?;
    }
    Ok(())
}

/// Each segment ends where the next one begins; the last one where its whole transactions end, which are durable from here on.
fn read_segments(folder: &Path) -> io::Result<VecDeque<Segment>> {
    let starts = starts(folder)?;
    let mut segments = VecDeque::new();
    for (at, &start) in starts.iter().enumerate() {
        let mut file = File::open(folder.join(format!("{:016X}{SEGMENT}", start.as_u64())))?;
        let bytes = file.metadata()?.len();
        if let Some(&end) = starts.get(at + 1) {
            segments.push_back(Segment { start, bytes, end });
            continue;
        }
        let mut buffered = io::BufReader::with_capacity(256 * 1024, &mut file);
        let whole = scan(&mut buffered, bytes, start)?;
        // One that was being made when its process died holds nothing, and whoever writes makes it again.
        if let Some(Whole { place, end }) = whole {
            file.sync_all()?;
            segments.push_back(Segment { start, bytes: place, end });
        }
    }
    File::open(folder)?.sync_all()?;
    Ok(segments)
}

fn foreign(folder: &Path) -> Error {
    Error::new(
        Class::Operator,
        "spool_folder_taken",
        format!("{} holds something else than this move's spool", folder.display()),
    )
    .hint("move the folder away, or remove it if nobody needs it; or name another one with follow.spool")
}

/// The code of the error that says that the disk does not let us work.
pub(super) const SPOOL_UNUSABLE: &str = "spool_unusable";

/// The disk does not let us work there. What is full may have room later.
pub(super) fn unusable(folder: &Path, error: &io::Error) -> Error {
    let is_full = matches!(error.kind(), ErrorKind::StorageFull | ErrorKind::QuotaExceeded);
    let (class, code) = if is_full { (Class::Wait, "spool_unusable") } else { (Class::Operator, "spool_unusable") };
    Error::new(class, code, format!("the spool's folder {} cannot be used: {error}", folder.display()))
        .hint("make it writable for the daemon and give it room, or name another one with follow.spool")
}
