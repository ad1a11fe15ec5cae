//! From bytes to messages.
//!
//! Every flag that the protocol does not know is refused, as PostgreSQL's own subscriber does with most: a message is
//! read the way it was written, or not at all.

use bytes::{Buf, Bytes};

use super::{
    Aborted, Decoded, Malformed, Message, OldTuple, Prepared, Protocol, Relation, RelationColumn, Tuple, Unread,
};
use crate::postgres::{Lsn, QualifiedName};

/// Microseconds between 1970-01-01 and 2000-01-01, where PostgreSQL's timestamps begin.
const POSTGRES_EPOCH_MICROS: i64 = 946_684_800_000_000;

/// Reads one message.
pub(super) struct Reader<'a> {
    whole: &'a Bytes,
    cursor: Cursor<'a>,
    protocol: Protocol,
    in_block: bool,
}

impl<'a> Reader<'a> {
    pub(super) fn new(whole: &'a Bytes, protocol: Protocol, in_block: bool) -> Self {
        Self { whole, cursor: Cursor::new(whole), protocol, in_block }
    }

    /// Nothing may be left over.
    pub(super) fn end(&self) -> Result<(), Malformed> {
        match self.cursor.rest().len() {
            0 => Ok(()),
            left => Err(Malformed::LeftOver(left)),
        }
    }

    pub(super) fn message(&mut self) -> Result<Decoded, Malformed> {
        let kind = self.cursor.u8("the kind of message")?;
        if is_change(kind) {
            let xid = if self.in_block { Some(self.cursor.u32("the xid of a change")?) } else { None };
            return Ok(Decoded { xid, message: self.change(kind)? });
        }
        let message = match kind {
            b'B' | b'C' | b'O' => self.transaction(kind)?,
            b'S' | b'E' | b'c' | b'A' => self.streamed(kind)?,
            b'b' | b'P' | b'K' | b'r' | b'p' => self.prepared(kind)?,
            byte => return Err(Malformed::Unknown { what: "kind of message", byte }),
        };
        self.check_place(&message)?;
        Ok(Decoded { xid: None, message })
    }

    /// Changes and Origin stand inside and outside of blocks alike; all else has its place.
    fn check_place(&self, message: &Message) -> Result<(), Malformed> {
        let fits = match message {
            Message::Origin { .. } => true,
            Message::StreamStop => self.in_block,
            _ => !self.in_block,
        };
        if fits { Ok(()) } else { Err(Malformed::OutOfPlace(message.kind())) }
    }

    // --- changes --------------------------------------------------------------------------------------------

    fn change(&mut self, kind: u8) -> Result<Message, Malformed> {
        Ok(match kind {
            b'R' => Message::Relation(self.relation()?),
            b'Y' => {
                Message::Type { oid: self.cursor.u32("a type's oid")?, name: self.cursor.qualified("a type's name")? }
            }
            b'I' => {
                let relation = self.cursor.u32("a relation's oid")?;
                match self.cursor.u8("the kind of tuple")? {
                    b'N' => Message::Insert { relation, new: self.tuple()? },
                    byte => return Err(Malformed::Unknown { what: "new tuple", byte }),
                }
            }
            b'U' => self.update()?,
            b'D' => {
                let relation = self.cursor.u32("a relation's oid")?;
                match self.cursor.u8("the kind of tuple")? {
                    b'K' => Message::Delete { relation, old: OldTuple::Key(self.tuple()?) },
                    b'O' => Message::Delete { relation, old: OldTuple::Full(self.tuple()?) },
                    byte => return Err(Malformed::Unknown { what: "old tuple", byte }),
                }
            }
            b'T' => self.truncate()?,
            _ => self.logical()?,
        })
    }

    fn relation(&mut self) -> Result<Relation, Malformed> {
        let cursor = &mut self.cursor;
        let oid = cursor.u32("a relation's oid")?;
        let name = cursor.qualified("a relation's name")?;
        let identity = cursor.u8("a replica identity")?;
        if !b"dnfi".contains(&identity) {
            return Err(Malformed::Unknown { what: "replica identity", byte: identity });
        }
        let count = cursor.u16("the number of columns")?;
        // Each column takes at least ten bytes: a lying count ends in `Truncated`, not in a huge allocation.
        let mut columns = Vec::with_capacity(usize::from(count).min(cursor.rest().len() / 10));
        for _ in 0..count {
            columns.push(RelationColumn {
                key: cursor.flags("set of flags of a column", 1)? == 1,
                name: cursor.name("a column's name")?,
                type_oid: cursor.u32("a column's type")?,
                type_modifier: cursor.i32("a column's type modifier")?,
            });
        }
        Ok(Relation { oid, name, identity, columns })
    }

    fn update(&mut self) -> Result<Message, Malformed> {
        let relation = self.cursor.u32("a relation's oid")?;
        let mut kind = self.cursor.u8("the kind of tuple")?;
        let old = match kind {
            b'K' => Some(OldTuple::Key(self.tuple()?)),
            b'O' => Some(OldTuple::Full(self.tuple()?)),
            _ => None,
        };
        if old.is_some() {
            kind = self.cursor.u8("the kind of tuple")?;
        }
        match kind {
            b'N' => Ok(Message::Update { relation, old, new: self.tuple()? }),
            byte => Err(Malformed::Unknown { what: "new tuple", byte }),
        }
    }

    fn truncate(&mut self) -> Result<Message, Malformed> {
        let cursor = &mut self.cursor;
        let count = cursor.u32("the number of relations")?;
        let options = cursor.flags("set of options of a truncate", 3)?;
        // Collected without a look at the count, which may lie.
        let relations = (0..count).map(|_| cursor.u32("a relation's oid")).collect::<Result<Vec<_>, _>>()?;
        Ok(Message::Truncate { relations, cascade: options & 1 != 0, restart_identity: options & 2 != 0 })
    }

    fn logical(&mut self) -> Result<Message, Malformed> {
        let cursor = &mut self.cursor;
        let transactional = cursor.flags("set of flags of a message", 1)? == 1;
        let lsn = cursor.lsn()?;
        let prefix = cursor.name("a message's prefix")?;
        let content = cursor.sized("a message's content")?;
        Ok(Message::Logical { transactional, lsn, prefix, content: self.whole.slice_ref(content) })
    }

    fn tuple(&mut self) -> Result<Tuple, Malformed> {
        Tuple::take(&mut self.cursor, self.whole)
    }

    // --- transactions ---------------------------------------------------------------------------------------

    fn transaction(&mut self, kind: u8) -> Result<Message, Malformed> {
        let cursor = &mut self.cursor;
        Ok(match kind {
            b'B' => {
                Message::Begin { commit_lsn: cursor.lsn()?, commit_micros: cursor.time()?, xid: cursor.u32("xid")? }
            }
            b'C' => {
                cursor.flags("set of flags of a commit", 0)?;
                Message::Commit { commit_lsn: cursor.lsn()?, end_lsn: cursor.lsn()?, commit_micros: cursor.time()? }
            }
            _ => Message::Origin { lsn: cursor.lsn()?, name: cursor.name("an origin")? },
        })
    }

    fn streamed(&mut self, kind: u8) -> Result<Message, Malformed> {
        if self.protocol < Protocol::V2 {
            return Err(Malformed::NotInProtocol("one of a streamed transaction"));
        }
        let cursor = &mut self.cursor;
        Ok(match kind {
            b'S' => Message::StreamStart {
                xid: cursor.u32("xid")?,
                first: cursor.flags("flag of a transaction's first block", 1)? == 1,
            },
            b'E' => Message::StreamStop,
            b'c' => {
                let xid = cursor.u32("xid")?;
                cursor.flags("set of flags of a commit", 0)?;
                Message::StreamCommit {
                    xid,
                    commit_lsn: cursor.lsn()?,
                    end_lsn: cursor.lsn()?,
                    commit_micros: cursor.time()?,
                }
            }
            _ => {
                let (xid, subxid) = (cursor.u32("xid")?, cursor.u32("xid of a subtransaction")?);
                let told = self.protocol == Protocol::V4 { parallel: true };
                let aborted = if told { Some(Aborted { lsn: cursor.lsn()?, micros: cursor.time()? }) } else { None };
                Message::StreamAbort { xid, subxid, aborted }
            }
        })
    }

    fn prepared(&mut self, kind: u8) -> Result<Message, Malformed> {
        if self.protocol < Protocol::V3 {
            return Err(Malformed::NotInProtocol("one of a prepared transaction"));
        }
        let cursor = &mut self.cursor;
        if kind != b'b' {
            cursor.flags("set of flags of a prepared transaction", 0)?;
        }
        Ok(match kind {
            b'b' => Message::BeginPrepare(prepare(cursor)?),
            b'P' => Message::Prepare(prepare(cursor)?),
            b'p' => Message::StreamPrepare(prepare(cursor)?),
            b'K' => Message::CommitPrepared {
                commit_lsn: cursor.lsn()?,
                end_lsn: cursor.lsn()?,
                commit_micros: cursor.time()?,
                xid: cursor.u32("xid")?,
                gid: cursor.name("a prepared transaction's name")?,
            },
            _ => Message::RollbackPrepared {
                prepare_end_lsn: cursor.lsn()?,
                rollback_end_lsn: cursor.lsn()?,
                prepare_micros: cursor.time()?,
                rollback_micros: cursor.time()?,
                xid: cursor.u32("xid")?,
                gid: cursor.name("a prepared transaction's name")?,
            },
        })
    }
}

/// Inside a block these name their transaction.
fn is_change(kind: u8) -> bool {
    matches!(kind, b'R' | b'Y' | b'I' | b'U' | b'D' | b'T' | b'M')
}

/// The beginning of a message inside a block; `None` for what is no part of a transaction's content.
pub(super) fn unread(bytes: &[u8]) -> Result<Option<Unread<'_>>, Malformed> {
    let mut cursor = Cursor::new(bytes);
    let kind = cursor.u8("the kind of message")?;
    if !is_change(kind) && kind != b'O' {
        return Ok(None);
    }
    let xid = if is_change(kind) { Some(cursor.u32("the xid of a change")?) } else { None };
    let rest = cursor.rest();
    let described = match kind {
        b'R' => Some(cursor.u32("a relation's oid")?),
        b'Y' => Some(cursor.u32("a type's oid")?),
        _ => None,
    };
    Ok(Some(Unread { kind, xid, described, rest }))
}

fn prepare(cursor: &mut Cursor<'_>) -> Result<Prepared, Malformed> {
    Ok(Prepared {
        prepare_lsn: cursor.lsn()?,
        end_lsn: cursor.lsn()?,
        prepare_micros: cursor.time()?,
        xid: cursor.u32("xid")?,
        gid: cursor.name("a prepared transaction's name")?,
    })
}

/// Takes fields off the front, and never reads past the end.
pub(super) struct Cursor<'a> {
    rest: &'a [u8],
}

impl<'a> Cursor<'a> {
    pub(super) fn new(bytes: &'a [u8]) -> Self {
        Self { rest: bytes }
    }

    /// What was not taken yet.
    pub(super) fn rest(&self) -> &'a [u8] {
        self.rest
    }

    /// A 32-bit length and as many bytes.
    pub(super) fn sized(&mut self, what: &'static str) -> Result<&'a [u8], Malformed> {
        let length = self.i32(what)?;
        let length = usize::try_from(length).map_err(|_| Malformed::Length(what, length))?;
        let (bytes, rest) = self.rest.split_at_checked(length).ok_or(Malformed::Truncated(what))?;
        self.rest = rest;
        Ok(bytes)
    }

    /// Text up to a zero byte.
    fn name(&mut self, what: &'static str) -> Result<String, Malformed> {
        let end = self.rest.iter().position(|&b| b == 0).ok_or(Malformed::Truncated(what))?;
        let (name, rest) = self.rest.split_at_checked(end).ok_or(Malformed::Truncated(what))?;
        self.rest = rest.get(1..).unwrap_or_default();
        String::from_utf8(name.to_vec()).map_err(|_| Malformed::NotUtf8(what))
    }

    /// Schema and name; the server sends an empty schema for `pg_catalog`.
    fn qualified(&mut self, what: &'static str) -> Result<QualifiedName, Malformed> {
        let schema = self.name(what)?;
        let schema = if schema.is_empty() { "pg_catalog".to_owned() } else { schema };
        Ok(QualifiedName { schema, name: self.name(what)? })
    }

    /// A byte with no other bits than the known ones.
    fn flags(&mut self, what: &'static str, known: u8) -> Result<u8, Malformed> {
        match self.u8(what)? {
            byte if byte & !known != 0 => Err(Malformed::Unknown { what, byte }),
            flags => Ok(flags),
        }
    }

    fn lsn(&mut self) -> Result<Lsn, Malformed> {
        self.fixed::<8>("an LSN").map(|mut b| Lsn::new(b.get_u64()))
    }

    fn time(&mut self) -> Result<i64, Malformed> {
        let micros = self.fixed::<8>("a time").map(|mut b| b.get_i64())?;
        micros.checked_add(POSTGRES_EPOCH_MICROS).ok_or(Malformed::Time(micros))
    }

    pub(super) fn u8(&mut self, what: &'static str) -> Result<u8, Malformed> {
        self.fixed::<1>(what).map(|mut b| b.get_u8())
    }

    pub(super) fn u16(&mut self, what: &'static str) -> Result<u16, Malformed> {
        self.fixed::<2>(what).map(|mut b| b.get_u16())
    }

    fn u32(&mut self, what: &'static str) -> Result<u32, Malformed> {
        self.fixed::<4>(what).map(|mut b| b.get_u32())
    }

    fn i32(&mut self, what: &'static str) -> Result<i32, Malformed> {
        self.fixed::<4>(what).map(|mut b| b.get_i32())
    }

    /// The next `N` bytes.
    fn fixed<const N: usize>(&mut self, what: &'static str) -> Result<&'a [u8], Malformed> {
        let (bytes, rest) = self.rest.split_at_checked(N).ok_or(Malformed::Truncated(what))?;
        self.rest = rest;
        Ok(bytes)
    }
}
