//! Transactions that the source sends while they are in progress (pgoutput's protocol version 2, `streaming`), put together
//! again: whoever takes what comes out of here sees what protocol version 1 would have sent.
//!
//! # Why
//!
//! With version 1 the source keeps each change of a transaction until that commits: beyond `logical_decoding_work_mem` on its
//! disk, from where it reads it all once more; then all of it has to travel, and to be applied. With version 2 it is here when
//! it commits.
//!
//! # What comes out
//!
//! At Stream Commit: Begin, the transaction's messages in their order without what was rolled back, Commit. A transaction that
//! is small enough is sent as before, and passes through. Commits come in the order of the source's log in either version, so
//! the order of what comes out is the same. Nothing comes out of a transaction that has not committed, except of the one that is applied early
//! ([`super::early`]): of that one, all comes out as it comes in, and what it described once more at its commit.
//!
//! **After another start** the source sends a transaction in parts only if its commit record lies at or after the position that
//! we asked for: it decodes from further back, but begins to stream only there. So what is on the target already does not come
//! again, as with version 1; and one of which we had parts comes again from its beginning, for the source keeps its log from the
//! beginning of the oldest transaction in progress on, whatever we confirm.
//!
//! **A subtransaction that was rolled back** is named by its own id, and each change by the (sub)transaction that made it; a
//! savepoint around others names those, too. Relation and Type messages are kept whatever became of theirs: the source
//! remembers for the whole transaction that it described a relation, and describes it again once its shape may have
//! changed; so they count in the order in which they come.
//!
//! **Between transactions** it remembers differently: what it described outside of a block, or in a transaction that
//! committed, counts for all that come later. But a transaction that ends later than it was sent brings its descriptions
//! late, and they may be older. The lock that keeps a table's shape does not help: one that was taken behind a savepoint goes
//! when that is rolled back, and then anybody may alter the table. So a description that is overtaken while its transaction
//! is in progress is followed by the newer one, before Commit.
//!
//! **A prepared transaction** comes as the others do, with Stream Commit at its COMMIT PREPARED, since nobody asked for more.
//! **Logical messages** name the transaction, never a subtransaction. Nothing here depends on them.
//!
//! # What it holds
//!
//! All transactions in progress together hold so much memory at most as [`Bounds`] says; beyond, the largest one goes to a file
//! ([`kept`]). Files are bounded as well. The one that is applied early ([`super::early`]) is kept only while there is room. What fits in neither ends with the error [`SPILL_FAILED`], and nothing is lost by
//! that: the source still has all of it, and keeps large transactions itself once it is asked with version 1.
//!
//! # Where the source fails
//!
//! To decode a transaction in progress, the source reads its catalog as that transaction saw it. Where it has sent changes behind a
//! schema change that was then rolled back with its savepoint, and the same rows of the catalog were changed again later, it takes these rows
//! for gone between the two: an internal error, again after each start. Version 1, which knows the whole transaction, does not
//! have it (seen in 14 and in 18). So any internal error of the source is met by asking once more with version 1.
//!
//! Files are read and written on the thread that asks, which is the reader's own and serves nobody else.

mod kept;
#[cfg(test)]
mod tests;

use std::collections::btree_map::IntoValues;
use std::collections::hash_map::Entry;
use std::collections::{BTreeMap, HashMap, HashSet};

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use bytes::Bytes;

use self::kept::{Kept, Records};
use super::early::{Begins, Part};
use crate::error::{Class, Error, Result};
use crate::postgres::Lsn;
use crate::postgres::pgoutput::{Decoder, Message, Protocol, Unread};

/// The code of the error with which reading ends because there is no room for transactions in progress. The caller asks the
/// source to keep them.
pub(super) const SPILL_FAILED: &str = "spill_failed";

/// The code of the error with which the source gives up where it sends transactions in progress. The caller asks it to keep them.
pub(super) const STREAMING_FAILED: &str = "streaming_failed";

/// What a transaction takes beside its messages, in bytes, about: itself, and each thing that it remembers.
const ENTRY: usize = 512;
const REMEMBERED: usize = 64;

/// How much may be held.
#[derive(Clone, Copy, Debug)]
pub(super) struct Bounds {
    /// In memory, in bytes.
    pub memory: usize,
    /// In files, in bytes.
    pub disk: u64,
    /// Each holds a descriptor, and those are bounded for a process.
    pub files: usize,
}

impl Bounds {
    /// Those of a daemon whose files may hold so many bytes.
    pub(super) fn with_disk(disk: u64) -> Self {
        Self { memory: 32 << 20, disk, files: 256 }
    }
}

/// A relation or a type: the kind of message that describes it, and its oid.
type Described = (u8, u32);

/// A transaction that has not ended.
#[derive(Debug, Default)]
struct Unfinished {
    kept: Kept,
    /// Its subtransactions that were rolled back.
    rolled_back: HashSet<u32>,
    /// What it described, and which description of the stream the last one was.
    described: HashMap<Described, u64>,
    /// What came out since that was described later: the newest, and which description of the stream it was.
    overtaken: BTreeMap<Described, (u64, Bytes)>,
}

impl Unfinished {
    fn in_memory(&self) -> usize {
        let remembered = self.rolled_back.len() + self.described.len() + self.overtaken.len();
        let descriptions: usize = self.overtaken.values().map(|(_, message)| message.len()).sum();
        ENTRY + self.kept.in_memory() + remembered * REMEMBERED + descriptions
    }
}

/// A transaction that committed, on its way out.
#[derive(Debug)]
struct Committed {
    begin: Option<Message>,
    records: Records,
    rolled_back: HashSet<u32>,
    described: HashMap<Described, u64>,
    overtaken: IntoValues<Described, (u64, Bytes)>,
    commit: Message,
    /// What is given back at its end.
    held: Held,
}

/// The transaction that is applied early.
#[derive(Debug)]
struct EarlyOne {
    xid: u32,
    given_up: Arc<AtomicBool>,
    /// Its descriptions, the last ones: they come out also where its rows do not.
    descriptions: BTreeMap<Described, Bytes>,
    /// Its messages are kept.
    kept: bool,
}

/// Why the largest could not go to its file.
struct Unspilled {
    error: Error,
    /// The transaction of which something may be lost by that.
    damaged: Option<u32>,
}

/// What is held, in bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Held {
    pub memory: usize,
    pub disk: u64,
}

/// What becomes of a message of the stream.
#[derive(Debug)]
pub(super) enum Taken {
    /// It passes through.
    Passed(Message),
    /// It is kept, or means nothing to anybody else.
    Kept,
    /// It belongs to the transaction that is applied early. Its changes are kept as well.
    Early(Part),
    /// The transaction that is applied early commits at this position; [`Streamed::settle_early`] is to come next.
    EarlyCommits(Lsn),
}

/// A step of a committed transaction on its way out.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Step {
    /// `None` for what was rolled back.
    pub message: Option<Message>,
    /// How much was looked at, in bytes.
    pub bytes: usize,
}

/// See the module's first lines.
#[derive(Debug)]
pub(super) struct Streamed {
    decoder: Decoder,
    bounds: Bounds,
    /// The transaction whose block is open.
    block: Option<u32>,
    unfinished: HashMap<u32, Unfinished>,
    committed: Option<Committed>,
    early: Option<EarlyOne>,
    /// Counts descriptions.
    descriptions: u64,
    held: Held,
    files: usize,
}

impl Streamed {
    /// For a stream that begins. Under version 1 every message passes through.
    pub(super) fn new(protocol: Protocol, bounds: Bounds) -> Self {
        Self {
            decoder: Decoder::new(protocol),
            bounds,
            block: None,
            unfinished: HashMap::new(),
            committed: None,
            early: None,
            descriptions: 0,
            held: Held::default(),
            files: 0,
        }
    }

    /// Whether the last message stands inside a block.
    pub(super) fn in_block(&self) -> bool {
        self.block.is_some()
    }

    /// What is held now.
    pub(super) fn held(&self) -> Held {
        self.held
    }

    /// Takes the next message of the stream. To be called when [`Streamed::step`] has nothing.
    ///
    /// # Errors
    /// The message is malformed, or out of place; or [`SPILL_FAILED`].
    pub(super) fn take(&mut self, start: Lsn, payload: &Bytes) -> Result<Taken> {
        if let Some(top) = self.block
            && let Some(unread) = self.decoder.peek(payload).map_err(|why| malformed(start, &why))?
        {
            self.keep(top, start, &unread)?;
            let Some(early) = self.early(top)? else { return Ok(Taken::Kept) };
            if let Some(oid) = unread.described {
                early.descriptions.insert((unread.kind, oid), unread.bare());
            }
            let message = self.decoder.decode(payload).map_err(|why| malformed(start, &why))?.message;
            return Ok(Taken::Early(Part::Message(message)));
        }
        let message = self.decoder.decode(payload).map_err(|why| malformed(start, &why))?.message;
        match &message {
            Message::StreamStart { xid, first } => return self.begin_block(start, *xid, *first),
            Message::StreamStop => self.block = None,
            Message::StreamCommit { xid, commit_lsn, .. } => {
                self.commit(start, *xid, &message)?;
                if self.early(*xid)?.is_some() {
                    return Ok(Taken::EarlyCommits(*commit_lsn));
                }
            }
            Message::StreamAbort { xid, subxid, .. } => {
                self.roll_back(*xid, *subxid);
                // Of what was rolled back as a whole nothing is needed any more.
                if xid != subxid && self.early(*xid)?.is_some_and(|early| !early.kept) {
                    return Err(not_kept("a part of it was rolled back"));
                }
                if self.early.take_if(|early| early.xid == *xid).is_some() {
                    return Ok(Taken::Early(Part::RolledBack));
                }
            }
            Message::Relation(relation) => {
                self.descriptions += 1;
                self.overtakes((b'R', relation.oid), self.descriptions, payload);
                return Ok(Taken::Passed(message));
            }
            Message::Type { oid, .. } => {
                self.descriptions += 1;
                self.overtakes((b'Y', *oid), self.descriptions, payload);
                return Ok(Taken::Passed(message));
            }
            _ => return Ok(Taken::Passed(message)),
        }
        Ok(Taken::Kept)
    }

    /// What is applied early, if it is this transaction, and was not given up.
    fn early(&mut self, xid: u32) -> Result<Option<&mut EarlyOne>> {
        match self.early.take_if(|early| early.given_up.load(Ordering::Relaxed)) {
            Some(EarlyOne { kept: false, .. }) => Err(not_kept("it was given up")),
            _ => Ok(self.early.as_mut().filter(|early| early.xid == xid)),
        }
    }

    /// The transaction that committed is on the target already, or it is not. Where it is, what comes out of it is what it described.
    ///
    /// # Errors
    /// [`SPILL_FAILED`]: it is not, and was not kept.
    pub(super) fn settle_early(&mut self, applied: bool) -> Result<()> {
        let (Some(early), Some(committed)) = (self.early.take(), &mut self.committed) else { return Ok(()) };
        if !applied && !early.kept {
            return Err(not_kept("it was given up"));
        }
        if applied {
            let mut kept = Kept::default();
            for ((kind, _), description) in early.descriptions {
                let rest = description.get(1..).unwrap_or_default();
                kept.push(early.xid, Lsn::ZERO, kind, rest).map_err(|error| malformed(Lsn::ZERO, &error))?;
            }
            committed.records = kept.into_records().map_err(|error| unreadable(&error))?;
        }
        Ok(())
    }

    /// The next step of the transaction that committed last, until all of it is out.
    ///
    /// # Errors
    /// A message of it is malformed; or [`SPILL_FAILED`].
    pub(super) fn step(&mut self) -> Result<Option<Step>> {
        let Some(committed) = &mut self.committed else { return Ok(None) };
        if let Some(begin) = committed.begin.take() {
            return Ok(Some(Step { message: Some(begin), bytes: 0 }));
        }
        if let Some(record) = committed.records.next().map_err(|error| unreadable(&error))? {
            let bytes = record.message.len();
            let described = described(&record.message);
            if described.is_none() && committed.rolled_back.contains(&record.xid) {
                return Ok(Some(Step { message: None, bytes }));
            }
            // A row keeps the block that it lies in. What was rolled back around it would be kept too, and counted by nobody.
            let bare = if committed.rolled_back.is_empty() {
                record.message.clone()
            } else {
                Bytes::copy_from_slice(&record.message)
            };
            let message = Message::decode(&bare).map_err(|why| malformed(record.start, &why))?;
            if let Some(described) = described {
                let last = committed.described.get(&described).copied().unwrap_or_default();
                self.overtakes(described, last, &record.message);
            }
            return Ok(Some(Step { message: Some(message), bytes }));
        }
        if let Some((_, newer)) = committed.overtaken.next() {
            // It came out before, so it was decoded before.
            let message = Message::decode(&newer).map_err(|why| malformed(Lsn::ZERO, &why))?;
            return Ok(Some(Step { message: Some(message), bytes: newer.len() }));
        }
        let Some(Committed { commit, held, .. }) = self.committed.take() else { return Ok(None) };
        self.held.memory -= held.memory;
        self.held.disk -= held.disk;
        Ok(Some(Step { message: Some(commit), bytes: 0 }))
    }

    fn begin_block(&mut self, start: Lsn, xid: u32, first: bool) -> Result<Taken> {
        match self.unfinished.entry(xid) {
            Entry::Vacant(_) if !first => {
                return Err(malformed(start, &format!("it goes on with transaction {xid}, which did not begin")));
            }
            Entry::Occupied(known) if first && (known.get().kept.in_memory() > 0 || known.get().kept.has_file()) => {
                return Err(malformed(start, &format!("it begins transaction {xid}, which did not end")));
            }
            Entry::Occupied(_) => {}
            Entry::Vacant(vacant) => {
                self.held.memory += vacant.insert(Unfinished::default()).in_memory();
            }
        }
        self.block = Some(xid);
        if self.early(xid)?.is_some() {
            return Ok(Taken::Early(Part::Block { at: start, begins: None }));
        }
        // One at a time, and from its beginning.
        if !first || self.early.is_some() {
            return Ok(Taken::Kept);
        }
        let given_up = Arc::new(AtomicBool::new(false));
        let descriptions = BTreeMap::new();
        self.early = Some(EarlyOne { xid, given_up: Arc::clone(&given_up), descriptions, kept: true });
        Ok(Taken::Early(Part::Block { at: start, begins: Some(Begins { xid, given_up }) }))
    }

    fn keep(&mut self, top: u32, start: Lsn, unread: &Unread<'_>) -> Result<()> {
        let Some(unfinished) = self.unfinished.get_mut(&top) else {
            return Err(Error::bug(format!("the block of transaction {top} is open, and nothing is known of it")));
        };
        let before = unfinished.in_memory();
        if let Some(oid) = unread.described {
            self.descriptions += 1;
            unfinished.described.insert((unread.kind, oid), self.descriptions);
            unfinished.overtaken.remove(&(unread.kind, oid));
        }
        let xid = unread.xid.unwrap_or(top);
        if self.early.as_ref().is_none_or(|early| early.xid != top || early.kept) {
            unfinished.kept.push(xid, start, unread.kind, unread.rest).map_err(|error| malformed(start, &error))?;
        }
        self.held.memory = self.held.memory + unfinished.in_memory() - before;
        self.make_room()
    }

    /// The largest go to their files until the rest fits. Where there is no room for that, the one that is applied early is not kept
    /// any longer: that is needed only if it is given up.
    fn make_room(&mut self) -> Result<()> {
        while self.held.memory > self.bounds.memory {
            if let Err(Unspilled { error, damaged }) = self.spill_largest()
                && !self.let_go_of_early(damaged)
            {
                return Err(error);
            }
        }
        Ok(())
    }

    fn spill_largest(&mut self) -> Result<(), Unspilled> {
        let full = |why| Unspilled { error: no_room(why), damaged: None };
        let largest = self.unfinished.iter_mut().max_by_key(|(_, unfinished)| unfinished.kept.in_memory());
        let Some((&xid, Unfinished { kept, .. })) = largest.filter(|(_, largest)| largest.kept.in_memory() > 0) else {
            return Err(full("there are more of them than can be remembered"));
        };
        let (memory, bytes) = (kept.in_memory(), kept.to_spill());
        if self.held.disk.saturating_add(bytes) > self.bounds.disk {
            return Err(full("they hold more than follow.spill_max_bytes"));
        }
        let (on_disk, has_file) = (kept.on_disk(), kept.has_file());
        if !has_file && self.files >= self.bounds.files {
            return Err(full("there are more of them than files may be open"));
        }
        let spilled = kept.spill();
        // Also of what could not be written whole.
        self.held.disk += kept.on_disk() - on_disk;
        self.files += usize::from(kept.has_file()) - usize::from(has_file);
        spilled.map_err(|error| Unspilled { error: unwritable(&error), damaged: Some(xid) })?;
        self.held.memory -= memory;
        Ok(())
    }

    /// Whether the transaction that is applied early was kept, and no other one is damaged. What was kept of it is gone then.
    fn let_go_of_early(&mut self, damaged: Option<u32>) -> bool {
        let Some(early) = self.early.as_mut().filter(|early| early.kept && !early.given_up.load(Ordering::Relaxed))
        else {
            return false;
        };
        let Some(unfinished) =
            self.unfinished.get_mut(&early.xid).filter(|_| damaged.is_none_or(|xid| xid == early.xid))
        else {
            return false;
        };
        early.kept = false;
        let kept = std::mem::take(&mut unfinished.kept);
        self.held.memory -= kept.in_memory();
        self.held.disk -= kept.on_disk();
        self.files -= usize::from(kept.has_file());
        tracing::info!(xid = early.xid, "there is no room to keep a transaction in progress that is applied meanwhile");
        true
    }

    /// Takes a transaction out of those in progress.
    fn end(&mut self, xid: u32) -> Option<(Unfinished, Held)> {
        let ended = self.unfinished.remove(&xid)?;
        let held = Held { memory: ended.in_memory(), disk: ended.kept.on_disk() };
        self.files -= usize::from(ended.kept.has_file());
        Some((ended, held))
    }

    fn commit(&mut self, start: Lsn, xid: u32, message: &Message) -> Result<()> {
        let &Message::StreamCommit { commit_lsn, end_lsn, commit_micros, .. } = message else { return Ok(()) };
        let Some((Unfinished { kept, rolled_back, described, overtaken }, held)) = self.end(xid) else {
            return Err(malformed(start, &format!("it commits transaction {xid}, which did not begin")));
        };
        self.committed = Some(Committed {
            begin: Some(Message::Begin { commit_lsn, commit_micros, xid }),
            records: kept.into_records().map_err(|error| unreadable(&error))?,
            rolled_back,
            described,
            overtaken: overtaken.into_values(),
            commit: Message::Commit { commit_lsn, end_lsn, commit_micros },
            held,
        });
        Ok(())
    }

    /// Nothing of what is not known here can have come out, so nothing is missing then.
    fn roll_back(&mut self, xid: u32, subxid: u32) {
        if xid != subxid {
            if let Some(unfinished) = self.unfinished.get_mut(&xid)
                && unfinished.rolled_back.insert(subxid)
            {
                self.held.memory += REMEMBERED;
            }
        } else if let Some((_, held)) = self.end(xid) {
            self.held.memory -= held.memory;
            self.held.disk -= held.disk;
        }
    }

    /// A description comes out that was, as the stream counts them, this one. Transactions in progress that have an older one of
    /// the same are to be followed by it.
    fn overtakes(&mut self, described: Described, number: u64, message: &Bytes) {
        for unfinished in self.unfinished.values_mut() {
            let Some(&own) = unfinished.described.get(&described) else { continue };
            let newest = unfinished.overtaken.get(&described).map_or(own, |(newest, _)| own.max(*newest));
            if newest <= number && own < number {
                let before = unfinished.in_memory();
                // A copy, because the original may be a part of something large.
                unfinished.overtaken.insert(described, (number, Bytes::copy_from_slice(message)));
                self.held.memory = self.held.memory + unfinished.in_memory() - before;
            }
        }
    }
}

/// What a message of version 1 describes, if it does.
fn described(message: &[u8]) -> Option<Described> {
    let (&[kind, a, b, c, d], _) = message.split_first_chunk::<5>()?;
    matches!(kind, b'R' | b'Y').then(|| (kind, u32::from_be_bytes([a, b, c, d])))
}

fn malformed(start: Lsn, why: &dyn std::fmt::Display) -> Error {
    Error::new(Class::Bug, "stream_malformed", format!("the message at {start} cannot be read: {why}"))
        .hint("nothing was applied beyond the last progress; please report this with the source's version")
}

fn unwritable(error: &std::io::Error) -> Error {
    no_room(&format!("they cannot be written to the temporary folder: {error}"))
}

fn unreadable(error: &std::io::Error) -> Error {
    no_room(&format!("they cannot be read back from the temporary folder: {error}"))
}

/// An error of the stream under version 2: if it is an internal one of the source, it may be its way of decoding.
pub(super) fn failed_on_the_source(error: Error) -> Error {
    match error.sqlstate() {
        Some("XX000") => error.recoded(Class::Wait, "streaming_failed"),
        _ => error,
    }
}

/// Of the one that was applied early.
fn not_kept(why: &str) -> Error {
    no_room(&format!("one that was applied meanwhile could not be kept as well, and {why}"))
}

fn no_room(why: &str) -> Error {
    Error::new(
        Class::Wait,
        "spill_failed",
        format!("there is no room for the source's transactions in progress: {why}"),
    )
    .hint("raise follow.spill_max_bytes, or make room in the daemon's temporary folder (TMPDIR)")
}
