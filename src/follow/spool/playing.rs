//! The spool as a stream: what the source would send to whoever asked it for everything from a position on.
//!
//! The source skips transactions whose commit record begins before that position, and describes a relation before its
//! first row. So what skipped transactions described is kept here until a row needs it; and what a later segment tells again is
//! left out, for a description that came since then may have been changed by what it describes.

use std::collections::{HashMap, HashSet, VecDeque};
use std::fs::File;
use std::io::{Read, Seek, SeekFrom};
use std::sync::Arc;

use bytes::BytesMut;

use super::files::{Segment, Spool};
use super::peek::{Descriptions, Gathering, Seen, peek};
use super::record::{self, Damaged, PREFACE, Record, preface};
use crate::error::{Error, Result};
use crate::postgres::Lsn;
use crate::postgres::replication::Event;

/// See the module's first lines. Nothing is read beyond what is durable.
pub(crate) struct Playing {
    spool: Arc<Spool>,
    from: Lsn,
    current: Option<Current>,
    /// Read and not yet taken.
    buffer: BytesMut,
    /// Everything that committed before was taken.
    position: Lsn,
    inside: bool,
    skipping: bool,
    /// Descriptions that no row has needed yet.
    known: HashMap<u32, Descriptions>,
    /// Relations that were described to whoever reads.
    described: HashSet<u32>,
    gathering: Gathering,
    ready: VecDeque<Event>,
}

/// The segment that is read.
struct Current {
    file: File,
    start: Lsn,
    /// So far.
    read: u64,
}

impl Playing {
    pub(crate) fn new(spool: Arc<Spool>, from: Lsn) -> Self {
        Self {
            spool,
            from,
            current: None,
            buffer: BytesMut::new(),
            position: Lsn::ZERO,
            inside: false,
            skipping: false,
            known: HashMap::new(),
            described: HashSet::new(),
            gathering: Gathering::default(),
            ready: VecDeque::new(),
        }
    }

    pub(crate) fn spool(&self) -> &Arc<Spool> {
        &self.spool
    }

    /// What is durable in the spool and was not read yet, in bytes.
    pub(crate) fn left(&self) -> u64 {
        let (start, read) = match &self.current {
            Some(current) => (current.start, current.read),
            None => match self.spool.segment_of(self.from) {
                Some(segment) => (segment.start, 0),
                None => return 0,
            },
        };
        self.spool.look(start).map_or(0, |(segment, _, behind)| segment.bytes.saturating_sub(read) + behind)
    }

    /// The next event, if it was read already.
    ///
    /// # Errors
    /// Class operator: a file is damaged.
    pub(crate) fn buffered(&mut self) -> Result<Option<Event>> {
        loop {
            if let Some(event) = self.ready.pop_front() {
                return Ok(Some(event));
            }
            let Some(current) = &self.current else { return Ok(None) };
            let place = current.read - self.buffer.len() as u64;
            match record::take(&mut self.buffer, place).and_then(|record| record.map(|one| self.take(one)).transpose())
            {
                Ok(Some(())) => {}
                Ok(None) => return Ok(None),
                Err(Damaged(why)) => return Err(self.damaged(why)),
            }
        }
    }

    fn take(&mut self, Record { start, again, payload }: Record) -> Result<(), Damaged> {
        if payload.is_empty() {
            if self.inside {
                return Err(Damaged("a position stands inside of a transaction"));
            }
            self.position = self.position.max(start);
            if start >= self.from {
                self.ready.push_back(Event::Keepalive { sent: start, reply: false });
            }
            return Ok(());
        }
        let seen = peek(&payload).ok_or(Damaged("a message ends too early"))?;
        match &seen {
            Seen::Begin { commit } if !self.inside => {
                self.inside = true;
                self.skipping = *commit < self.from;
            }
            Seen::Commit { end } if self.inside => {
                self.inside = false;
                self.position = *end;
            }
            Seen::Begin { .. } | Seen::Commit { .. } => return Err(Damaged("transactions do not follow each other")),
            // What belongs to no transaction.
            _ if !self.inside && start < self.from => return Ok(()),
            _ => {}
        }
        if (again || self.skipping)
            && let Some((oid, descriptions)) = self.gathering.take(start, &payload, &seen)
            && !self.described.contains(&oid)
        {
            self.known.insert(oid, descriptions);
        }
        if again || self.skipping {
            self.skipping &= self.inside;
            return Ok(());
        }
        match &seen {
            Seen::Relation(oid) => {
                self.known.remove(oid);
                self.described.insert(*oid);
            }
            Seen::Row(oid) => self.describe(*oid),
            Seen::Truncate(oids) => oids.iter().for_each(|oid| self.describe(*oid)),
            _ => {}
        }
        self.ready.push_back(Event::Data { start, payload });
        Ok(())
    }

    fn describe(&mut self, oid: u32) {
        if let Some(descriptions) = self.known.remove(&oid) {
            self.described.insert(oid);
            self.ready.extend(descriptions.into_iter().map(|(start, payload)| Event::Data { start, payload }));
        }
    }

    /// Reads on, so many bytes at most; 0 where what is durable ends.
    ///
    /// # Errors
    /// Class operator: a file is damaged, or gone.
    pub(crate) fn read(&mut self, most: usize) -> Result<usize> {
        loop {
            let Some(current) = &mut self.current else {
                let segment = self.spool.segment_of(self.from);
                let segment =
                    segment.ok_or_else(|| Error::bug(format!("the spool holds nothing from {}", self.from)))?;
                self.position = segment.start;
                self.current = Some(self.open(segment)?);
                continue;
            };
            let (segment, next, _) =
                self.spool.look(current.start).ok_or_else(|| Error::bug("a segment was let go of too early"))?;
            let place = current.read - self.buffer.len() as u64;
            if record::length(&self.buffer).is_some_and(|length| place + length as u64 > segment.bytes) {
                return Err(self.damaged("a record is longer than the file"));
            }
            let left = usize::try_from(segment.bytes.saturating_sub(current.read)).unwrap_or(usize::MAX);
            if left > 0 {
                let wanted = left.min(most);
                let before = self.buffer.len();
                self.buffer.resize(before + wanted, 0);
                let read = current.file.read_exact(self.buffer.get_mut(before..).unwrap_or_default());
                current.read += wanted as u64;
                return match read {
                    Ok(()) => Ok(wanted),
                    Err(error) => Err(self.damaged(&error.to_string())),
                };
            }
            if !self.buffer.is_empty() {
                return Err(self.damaged("it ends in the middle of a record"));
            }
            let Some(next) = next else { return Ok(0) };
            if self.inside || self.position != next.start {
                return Err(self.damaged("it does not end where the next one begins"));
            }
            self.current = Some(self.open(next)?);
        }
    }

    fn open(&self, segment: Segment) -> Result<Current> {
        let opened = File::open(self.spool.path(segment.start)).and_then(|mut file| {
            let mut found = [0; PREFACE];
            file.read_exact(&mut found)?;
            file.seek(SeekFrom::Start(PREFACE as u64))?;
            Ok((file, found))
        });
        match opened {
            Ok((file, found)) if found == preface(segment.start) => {
                Ok(Current { file, start: segment.start, read: PREFACE as u64 })
            }
            Ok(_) => Err(self.spool.damaged(segment.start, "it does not begin as one")),
            Err(error) => Err(self.spool.damaged(segment.start, &error.to_string())),
        }
    }

    fn damaged(&self, why: &str) -> Error {
        self.spool.damaged(self.current.as_ref().map_or(self.from, |current| current.start), why)
    }
}
