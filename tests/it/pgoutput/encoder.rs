//! The other direction: messages as PostgreSQL would write them. The decoder refuses what it cannot tell apart, so
//! that what it read is written back byte for byte.

use std::ops::Range;

use bytes::BufMut;
use pgtandem::postgres::pgoutput::{Decoded, Message, OldTuple, Prepared, Tuple, Value};
use pgtandem::postgres::{Lsn, QualifiedName};

/// Microseconds between 1970 and 2000.
const POSTGRES_EPOCH: i64 = 946_684_800_000_000;

/// A message as bytes.
#[derive(Default)]
pub struct Encoded {
    /// All of it.
    pub bytes: Vec<u8>,
    /// Where lengths and counts stand, two or four bytes each.
    pub lengths: Vec<Range<usize>>,
}

/// Writes what was read.
pub fn encode(decoded: &Decoded) -> Encoded {
    let mut out = Encoded::default();
    out.message(decoded);
    out
}

impl Encoded {
    fn message(&mut self, Decoded { xid, message }: &Decoded) {
        self.bytes.put_u8(tag(message));
        if let Some(xid) = xid {
            self.bytes.put_u32(*xid);
        }
        match message {
            Message::Begin { commit_lsn, commit_micros, xid } => {
                self.lsn(*commit_lsn);
                self.time(*commit_micros);
                self.bytes.put_u32(*xid);
            }
            Message::Commit { commit_lsn, end_lsn, commit_micros } => {
                self.bytes.put_u8(0);
                self.positions(*commit_lsn, *end_lsn, *commit_micros);
            }
            Message::Origin { lsn, name } => {
                self.lsn(*lsn);
                self.name(name);
            }
            Message::Relation(relation) => {
                self.bytes.put_u32(relation.oid);
                self.qualified(&relation.name);
                self.bytes.put_u8(relation.identity);
                self.count(relation.columns.len());
                for column in &relation.columns {
                    self.bytes.put_u8(u8::from(column.key));
                    self.name(&column.name);
                    self.bytes.put_u32(column.type_oid);
                    self.bytes.put_i32(column.type_modifier);
                }
            }
            Message::Type { oid, name } => {
                self.bytes.put_u32(*oid);
                self.qualified(name);
            }
            Message::Insert { relation, new } => {
                self.bytes.put_u32(*relation);
                self.tuple(b'N', new);
            }
            Message::Update { relation, old, new } => {
                self.bytes.put_u32(*relation);
                if let Some(old) = old {
                    self.old(old);
                }
                self.tuple(b'N', new);
            }
            Message::Delete { relation, old } => {
                self.bytes.put_u32(*relation);
                self.old(old);
            }
            Message::Truncate { relations, cascade, restart_identity } => {
                self.length(relations.len());
                self.bytes.put_u8(u8::from(*cascade) | u8::from(*restart_identity) << 1);
                relations.iter().for_each(|&relation| self.bytes.put_u32(relation));
            }
            Message::Logical { transactional, lsn, prefix, content } => {
                self.bytes.put_u8(u8::from(*transactional));
                self.lsn(*lsn);
                self.name(prefix);
                self.sized(content);
            }
            Message::StreamStart { xid, first } => {
                self.bytes.put_u32(*xid);
                self.bytes.put_u8(u8::from(*first));
            }
            Message::StreamStop => {}
            Message::StreamCommit { xid, commit_lsn, end_lsn, commit_micros } => {
                self.bytes.put_u32(*xid);
                self.bytes.put_u8(0);
                self.positions(*commit_lsn, *end_lsn, *commit_micros);
            }
            Message::StreamAbort { xid, subxid, aborted } => {
                self.bytes.put_u32(*xid);
                self.bytes.put_u32(*subxid);
                if let Some(aborted) = aborted {
                    self.lsn(aborted.lsn);
                    self.time(aborted.micros);
                }
            }
            Message::BeginPrepare(prepared) => self.prepared(prepared),
            Message::Prepare(prepared) | Message::StreamPrepare(prepared) => {
                self.bytes.put_u8(0);
                self.prepared(prepared);
            }
            Message::CommitPrepared { commit_lsn, end_lsn, commit_micros, xid, gid } => {
                self.bytes.put_u8(0);
                self.positions(*commit_lsn, *end_lsn, *commit_micros);
                self.bytes.put_u32(*xid);
                self.name(gid);
            }
            Message::RollbackPrepared {
                prepare_end_lsn,
                rollback_end_lsn,
                prepare_micros,
                rollback_micros,
                xid,
                gid,
            } => {
                self.bytes.put_u8(0);
                self.positions(*prepare_end_lsn, *rollback_end_lsn, *prepare_micros);
                self.time(*rollback_micros);
                self.bytes.put_u32(*xid);
                self.name(gid);
            }
        }
    }

    fn prepared(&mut self, prepared: &Prepared) {
        self.positions(prepared.prepare_lsn, prepared.end_lsn, prepared.prepare_micros);
        self.bytes.put_u32(prepared.xid);
        self.name(&prepared.gid);
    }

    fn positions(&mut self, one: Lsn, two: Lsn, micros: i64) {
        self.lsn(one);
        self.lsn(two);
        self.time(micros);
    }

    fn old(&mut self, old: &OldTuple) {
        let kind = match old {
            OldTuple::Key(_) => b'K',
            OldTuple::Full(_) => b'O',
        };
        self.tuple(kind, old.tuple());
    }

    fn tuple(&mut self, kind: u8, tuple: &Tuple) {
        self.bytes.put_u8(kind);
        self.count(tuple.len());
        for value in tuple.values() {
            match value {
                Value::Null => self.bytes.put_u8(b'n'),
                Value::Unchanged => self.bytes.put_u8(b'u'),
                Value::Text(bytes) => {
                    self.bytes.put_u8(b't');
                    self.sized(bytes);
                }
                Value::Binary(bytes) => {
                    self.bytes.put_u8(b'b');
                    self.sized(bytes);
                }
            }
        }
    }

    fn sized(&mut self, bytes: &[u8]) {
        self.length(bytes.len());
        self.bytes.put_slice(bytes);
    }

    fn length(&mut self, length: usize) {
        self.lengths.push(self.bytes.len()..self.bytes.len() + 4);
        self.bytes.put_u32(length as u32);
    }

    fn count(&mut self, count: usize) {
        self.lengths.push(self.bytes.len()..self.bytes.len() + 2);
        self.bytes.put_u16(count as u16);
    }

    fn lsn(&mut self, lsn: Lsn) {
        self.bytes.put_u64(lsn.as_u64());
    }

    fn time(&mut self, micros: i64) {
        self.bytes.put_i64(micros - POSTGRES_EPOCH);
    }

    fn name(&mut self, name: &str) {
        self.bytes.put_slice(name.as_bytes());
        self.bytes.put_u8(0);
    }

    /// The server leaves the schema of `pg_catalog` out.
    fn qualified(&mut self, name: &QualifiedName) {
        self.name(if name.schema == "pg_catalog" { "" } else { &name.schema });
        self.name(&name.name);
    }
}

fn tag(message: &Message) -> u8 {
    match message {
        Message::Begin { .. } => b'B',
        Message::Commit { .. } => b'C',
        Message::Origin { .. } => b'O',
        Message::Relation(_) => b'R',
        Message::Type { .. } => b'Y',
        Message::Insert { .. } => b'I',
        Message::Update { .. } => b'U',
        Message::Delete { .. } => b'D',
        Message::Truncate { .. } => b'T',
        Message::Logical { .. } => b'M',
        Message::StreamStart { .. } => b'S',
        Message::StreamStop => b'E',
        Message::StreamCommit { .. } => b'c',
        Message::StreamAbort { .. } => b'A',
        Message::BeginPrepare(_) => b'b',
        Message::Prepare(_) => b'P',
        Message::CommitPrepared { .. } => b'K',
        Message::RollbackPrepared { .. } => b'r',
        Message::StreamPrepare(_) => b'p',
    }
}
