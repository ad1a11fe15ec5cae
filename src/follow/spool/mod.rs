//! The spool: what the source sent while nothing could be applied, in files of the daemon.
//!
//! # Why
//!
//! From the moment the slot is made, the source keeps all WAL for it. While rows are copied, which may take hours, nothing
//! is applied and so nothing could be confirmed; the WAL fills the source's disk, or `max_slot_wal_keep_size` gives up the
//! slot. With `follow.spool` changes are received meanwhile, written to files, and confirmed once they are durable
//! there. Following plays the files first, and goes on with the slot's stream at exactly their end ([`super::inflow`]).
//!
//! # Why no change is lost or applied twice, whatever dies when
//!
//! Three positions matter. *Progress* is what the target durably holds. The *spool's range* is from where its first segment begins to where
//! its last whole transaction ends: every transaction that is published and whose commit record begins within is in the files, once,
//! in the order of commit. *Confirmed* is what the slot was told; the source has everything from there on, and need not have
//! what is before. One sentence always holds:
//!
//! > confirmed ≤ progress, or the range begins at or before progress and confirmed ≤ its end.
//!
//! So everything from progress on is in the files, or on the source, or in both; and each of both leaves out transactions
//! whose commit record begins before the position that it is asked for. The reader asks the files from progress on, and the source
//! from the end of the files or from progress on, whichever is later. Nothing is missing between the two, nothing comes twice; and
//! what was applied is behind progress, which was committed together with it.
//!
//! *The sentence holds at each step.* The spool begins at progress. It grows by appending behind its end, where the source
//! was asked from exactly that end on, after a look that the slot does not stand beyond it; the source is told the end
//! only after the files were synced, and a new file's name with its folder. A segment goes once progress has passed its end, the oldest one first. While the
//! stream follows behind the files, the source is told the later one of progress and the end of the files.
//!
//! *The daemon dies, or its machine does.* The last segment may end in the middle of a record or of a transaction, or hold bytes that never
//! reached the disk: on opening it is read from its beginning, and all that comes after the last whole, undamaged transaction is
//! cut off. Nothing of that was confirmed, for confirming came after the sync. If more than that is missing, the slot stands beyond the
//! end: an error, and nothing is followed. A segment in the making holds nothing yet and is made again. Segments that were let go
//! of and come back are behind progress, and are let go of again; a segment that is missing between two others is noticed
//! by the position at which the one before it ends.
//!
//! *The target dies and comes back:* progress is asked again, in a way that it cannot go back from; segments were let go of by durable progress.
//!
//! *The source dies and comes back:* its slot may have forgotten the last confirmations, and is asked from the spool's end on all the same.
//! One whose log ends before the spool does is another history, and refused as one that ends before progress.
//!
//! *The folder is lost, or the daemon starts elsewhere, or without the setting:* the slot stands beyond progress and nothing
//! here holds what is between. That is refused (`spool_lost`, `slot_advanced`), never passed over.
//!
//! *The slot is made again* (a start that died before it could write its first cut down; `clean` and a new beginning): the
//! folder's note names the position at which the slot was made. What another slot sent is not read, and removed.
//!
//! *Two daemons:* the folder is locked by the process that works in it, and the slot serves one connection.
//!
//! # What it promises beside that
//!
//! At most `follow.spool_max_bytes` on the disk, and little memory: a block of the file, a message, and a description of each
//! relation. Where there is no room the filling ends, says so, and lets the slot go: then the source keeps its WAL as it does
//! without a spool.

mod checksum;
mod files;
mod peek;
mod playing;
mod record;
mod spooler;
mod spooling;
#[cfg(test)]
mod tests;
mod writer;

pub(crate) use self::files::Spool;
pub(super) use self::playing::Playing;
pub use self::spooling::{Source, Spooling, clean};
