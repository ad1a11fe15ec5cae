//! What is received goes to the segments, and becomes durable.
//!
//! Each segment stands for itself: whoever begins to read there finds a description of each relation before its first row. The
//! source describes a relation once for a connection, so a segment that goes on with a connection tells the description
//! again where it is first needed.

use std::collections::{HashMap, HashSet};
use std::fs::{File, OpenOptions};
use std::io::{self, Seek, SeekFrom, Write};
use std::sync::Arc;

use bytes::Bytes;

use super::files::{Spool, unusable};
use super::peek::{Descriptions, Gathering, Seen, peek};
use super::record::{HEADER, Whole, header};
use crate::error::{Class, Error, Result};
use crate::postgres::Lsn;

/// A segment is about so large, unless all of the spool is small; a transaction is never divided.
const SEGMENT: u64 = 64 << 20;
const SMALLEST_SEGMENT: u64 = 1 << 20;

/// So much is written at once, in bytes.
const WRITE: usize = 1 << 20;

/// The code of the error with which writing ends because the spool has no room.
pub(super) const SPOOL_FULL: &str = "spool_full";

/// See the module's first lines. What it writes counts from [`Writer::sync`] on.
pub(super) struct Writer {
    spool: Arc<Spool>,
    /// In bytes, for all segments.
    most: u64,
    segment: u64,
    file: File,
    start: Lsn,
    /// Not written yet.
    buffer: Vec<u8>,
    /// Where the next record comes to stand.
    place: u64,
    /// Up to here whole transactions were taken.
    whole: Whole,
    /// Up to here they are durable.
    durable: Whole,
    /// Nothing more commits before this.
    passed: Lsn,
    inside: bool,
    unsynced: u64,
    /// What the other segments hold, in bytes, when it was last looked at.
    others: u64,
    /// What the connection described.
    known: HashMap<u32, Descriptions>,
    /// What this segment describes.
    here: HashSet<u32>,
    gathering: Gathering,
}

impl Writer {
    /// Goes on where the last durable transaction ends; what comes after it is cut off. For one connection to the source.
    ///
    /// # Errors
    /// The disk's.
    pub(super) fn open(spool: Arc<Spool>, most: u64) -> Result<Self> {
        let last = spool.last().ok_or_else(|| Error::bug("a spool without a segment is written to"))?;
        let opened = || -> io::Result<File> {
            let mut file = OpenOptions::new().write(true).open(spool.path(last.start))?;
            file.set_len(last.bytes)?;
            file.sync_all()?;
            file.seek(SeekFrom::Start(last.bytes))?;
            Ok(file)
        };
        let file = opened().map_err(|error| refused(&spool, &error))?;
        let whole = Whole { place: last.bytes, end: last.end };
        Ok(Self {
            most,
            segment: (most / 16).clamp(SMALLEST_SEGMENT, SEGMENT),
            file,
            start: last.start,
            buffer: Vec::with_capacity(WRITE),
            place: last.bytes,
            whole,
            durable: whole,
            passed: last.end,
            inside: false,
            unsynced: 0,
            others: spool.bytes().saturating_sub(last.bytes),
            known: HashMap::new(),
            here: HashSet::new(),
            gathering: Gathering::default(),
            spool,
        })
    }

    /// With smaller segments than any daemon has.
    #[cfg(test)]
    pub(super) fn with_segments_of(self, segment: u64) -> Self {
        Self { segment, ..self }
    }

    /// Everything that committed before is durable.
    pub(super) fn end(&self) -> Lsn {
        self.durable.end
    }

    /// What is not durable yet, in bytes.
    pub(super) fn unsynced(&self) -> u64 {
        self.unsynced
    }

    /// The stream is between two transactions, and nothing more commits before this.
    pub(super) fn passed(&mut self, position: Lsn) {
        if !self.inside {
            self.passed = self.passed.max(position);
        }
    }

    /// Takes the next message of the stream.
    ///
    /// # Errors
    /// [`SPOOL_FULL`]; the disk's; the message is out of place.
    pub(super) fn append(&mut self, start: Lsn, payload: &Bytes) -> Result<()> {
        let seen = peek(payload).ok_or_else(|| malformed(start, "it ends too early"))?;
        match &seen {
            Seen::Begin { .. } if self.inside => return Err(malformed(start, "a transaction begins in another one")),
            Seen::Commit { .. } if !self.inside => return Err(malformed(start, "nothing began that could commit")),
            Seen::Begin { .. } => {
                if self.place >= self.segment && self.whole.end > self.start {
                    self.begin_segment()?;
                }
                self.inside = true;
            }
            Seen::Row(oid) => self.describe(*oid)?,
            Seen::Truncate(oids) => oids.iter().try_for_each(|oid| self.describe(*oid))?,
            _ => {}
        }
        if let Some((oid, descriptions)) = self.gathering.take(start, payload, &seen) {
            self.known.insert(oid, descriptions);
            self.here.insert(oid);
        }
        self.record(start, false, payload)?;
        if let Seen::Commit { end } = seen {
            self.inside = false;
            self.whole = Whole { place: self.place, end };
            self.passed = self.passed.max(end);
        }
        Ok(())
    }

    /// Tells again what this segment does not know of a relation.
    fn describe(&mut self, oid: u32) -> Result<()> {
        if !self.here.insert(oid) {
            return Ok(());
        }
        for (start, payload) in self.known.get(&oid).cloned().unwrap_or_default() {
            self.record(start, true, &payload)?;
        }
        Ok(())
    }

    fn record(&mut self, start: Lsn, again: bool, payload: &[u8]) -> Result<()> {
        let header = header(self.place, start, again, payload)
            .ok_or_else(|| malformed(start, "it is longer than any can be"))?;
        let needed = (HEADER + payload.len()) as u64;
        if self.others + self.place + needed > self.most {
            return Err(full(&self.spool));
        }
        self.buffer.extend_from_slice(&header);
        self.place += needed;
        self.unsynced += needed;
        if payload.len() >= WRITE {
            self.write_out()?;
            return self.file.write_all(payload).map_err(|error| refused(&self.spool, &error));
        }
        self.buffer.extend_from_slice(payload);
        if self.buffer.len() >= WRITE { self.write_out() } else { Ok(()) }
    }

    fn write_out(&mut self) -> Result<()> {
        self.file.write_all(&self.buffer).map_err(|error| refused(&self.spool, &error))?;
        self.buffer.clear();
        Ok(())
    }

    /// Makes whole transactions durable; returns up to where everything that committed is.
    ///
    /// # Errors
    /// The disk's. Then nothing counts that was not durable before.
    pub(super) fn sync(&mut self) -> Result<Lsn> {
        if !self.inside && self.passed > self.whole.end {
            self.record(self.passed, false, &[])?;
            self.whole = Whole { place: self.place, end: self.passed };
        }
        self.settle()
    }

    /// The same, without a word about what came after the last transaction.
    ///
    /// # Errors
    /// As [`Writer::sync`].
    pub(super) fn settle(&mut self) -> Result<Lsn> {
        if self.unsynced > 0 {
            self.write_out()?;
            self.file.sync_data().map_err(|error| refused(&self.spool, &error))?;
            self.unsynced = 0;
            self.durable = self.whole;
            self.spool.grown(self.durable.place, self.durable.end);
        }
        self.others = self.spool.bytes().saturating_sub(self.durable.place);
        Ok(self.durable.end)
    }

    fn begin_segment(&mut self) -> Result<()> {
        self.sync()?;
        // What stands behind the last transaction belongs to none, and is not sent again.
        self.spool.grown(self.place, self.whole.end);
        self.start = self.whole.end;
        self.file = self.spool.begin_segment(self.start).map_err(|error| refused(&self.spool, &error))?;
        let last = self.spool.last().ok_or_else(|| Error::bug("the segment that was made is not there"))?;
        self.place = last.bytes;
        self.whole = Whole { place: last.bytes, end: last.end };
        self.durable = self.whole;
        self.others = self.spool.bytes().saturating_sub(last.bytes);
        self.here.clear();
        Ok(())
    }

    /// Gives back the room of what did not become durable: the source still has it.
    pub(super) fn cut_back(self) {
        if let Err(error) = self.file.set_len(self.durable.place) {
            tracing::debug!(%error, "the end of the spool could not be cut off; it is at the next start");
        }
    }
}

fn malformed(start: Lsn, why: &str) -> Error {
    Error::new(Class::Bug, "stream_malformed", format!("the message at {start} cannot be kept: {why}"))
        .hint("please report this with the source's version")
}

/// The disk does not take it; the source still has it.
fn refused(spool: &Spool, error: &io::Error) -> Error {
    unusable(spool.folder(), error).reclassed(Class::Wait)
}

fn full(spool: &Spool) -> Error {
    let folder = spool.folder().display();
    Error::new(Class::Wait, "spool_full", format!("the spool {folder} holds as much as follow.spool_max_bytes allows"))
        .hint("nothing is lost: the source keeps its WAL from there on. If the folder has more room, raise follow.spool_max_bytes")
}
