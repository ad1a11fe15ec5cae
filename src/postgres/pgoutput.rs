//! The messages of the `pgoutput` plugin, protocol version 1, decoded in place.
//! See <https://www.postgresql.org/docs/current/protocol-logicalrep-message-formats.html>.
//!
//! A message is checked once, whole, when it is decoded: every length, every flag, and that nothing is left over.
//! Row data stays where it was received; a [`Tuple`] hands out slices of it and cannot fail any more. No input makes
//! the decoder panic or allocate more than the message's own size.

use bytes::{Buf, Bytes};

use crate::postgres::{Lsn, QualifiedName};

/// Microseconds between 1970-01-01 and 2000-01-01, where PostgreSQL's timestamps begin.
const POSTGRES_EPOCH_MICROS: i64 = 946_684_800_000_000;

/// One message of the stream.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Message {
    /// A transaction begins; the server sends it once the transaction committed.
    Begin {
        /// Position of the commit record.
        commit_lsn: Lsn,
        /// Microseconds since 1970 of the source's clock.
        commit_micros: i64,
        /// The 32-bit transaction id.
        xid: u32,
    },
    /// The transaction is complete.
    Commit {
        /// Position of the commit record, as in `Begin`.
        commit_lsn: Lsn,
        /// Position after the commit record.
        end_lsn: Lsn,
        /// Microseconds since 1970 of the source's clock.
        commit_micros: i64,
    },
    /// The transaction came from elsewhere before it reached the source.
    Origin {
        /// The origin's name on the source.
        name: String,
    },
    /// What a relation looks like from here on; sent before its first change and after each change of shape.
    Relation(Relation),
    /// Name of a type that is not built in.
    Type {
        /// `pg_type.oid` on the source.
        oid: u32,
        /// Schema (empty for `pg_catalog`) and name.
        name: QualifiedName,
    },
    /// A row was inserted.
    Insert {
        /// [`Relation::oid`]
        relation: u32,
        /// The new row.
        new: Tuple,
    },
    /// A row was updated.
    Update {
        /// [`Relation::oid`]
        relation: u32,
        /// What identifies the row, if that is more than the new row tells.
        old: Option<OldTuple>,
        /// The new row; unchanged TOAST values are left out.
        new: Tuple,
    },
    /// A row was deleted.
    Delete {
        /// [`Relation::oid`]
        relation: u32,
        /// What identifies the row.
        old: OldTuple,
    },
    /// Tables were emptied in one statement.
    Truncate {
        /// [`Relation::oid`] of each.
        relations: Vec<u32>,
        /// TRUNCATE … CASCADE
        cascade: bool,
        /// TRUNCATE … RESTART IDENTITY
        restart_identity: bool,
    },
    /// A logical message, `pg_logical_emit_message`.
    Logical {
        /// Whether it is part of the transaction around it.
        transactional: bool,
        /// Where it stands in the log.
        lsn: Lsn,
        /// Who it is for.
        prefix: String,
        /// Any bytes.
        content: Bytes,
    },
}

/// What identifies the old row.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum OldTuple {
    /// Only the columns of the replica identity hold values; the others are NULL.
    Key(Tuple),
    /// The whole old row, under REPLICA IDENTITY FULL.
    Full(Tuple),
}

impl OldTuple {
    /// The row, whichever kind it is.
    #[must_use]
    pub fn tuple(&self) -> &Tuple {
        match self {
            Self::Key(tuple) | Self::Full(tuple) => tuple,
        }
    }
}

/// The shape of a relation.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Relation {
    /// `pg_class.oid` on the source.
    pub oid: u32,
    /// Schema and name.
    pub name: QualifiedName,
    /// `pg_class.relreplident`: `d`, `n`, `f` or `i`.
    pub identity: u8,
    /// The published columns, in the order in which tuples hold them.
    pub columns: Vec<RelationColumn>,
}

/// One column of a relation.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RelationColumn {
    /// As the catalog holds it.
    pub name: String,
    /// Whether it is part of what identifies a row.
    pub key: bool,
    /// `pg_type.oid` on the source.
    pub type_oid: u32,
    /// `pg_attribute.atttypmod`
    pub type_modifier: i32,
}

/// One row, or the part of it that was sent.
#[derive(Clone, PartialEq, Eq)]
pub struct Tuple {
    /// From the first column's kind byte to the last column's last byte; checked when decoded.
    data: Bytes,
    columns: u16,
}

impl std::fmt::Debug for Tuple {
    /// Says how much there is, never what: rows stay out of logs.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Tuple({} columns, {} bytes)", self.columns, self.data.len())
    }
}

/// The value of one column.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Value<'a> {
    /// NULL
    Null,
    /// A TOASTed value that the UPDATE did not touch: the target has it already.
    Unchanged,
    /// As the type's output function printed it.
    Text(&'a [u8]),
    /// As the type's send function wrote it.
    Binary(&'a [u8]),
}

impl Tuple {
    /// How many columns were sent.
    #[must_use]
    pub fn len(&self) -> usize {
        usize::from(self.columns)
    }

    /// Whether no column was sent: a row of a table without columns.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.columns == 0
    }

    /// Bytes that the row holds on to.
    #[must_use]
    pub fn bytes(&self) -> usize {
        self.data.len()
    }

    /// The values, in the relation's order.
    pub fn values(&self) -> impl Iterator<Item = Value<'_>> {
        let mut reader = Reader { rest: &self.data };
        // The data was walked once when it was decoded, so the error case is never reached.
        (0..self.columns).map_while(move |_| reader.value().ok())
    }
}

/// The bytes are not a message of pgoutput: an unknown kind, a lying length, something left over.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Malformed {
    /// The message ended before it should.
    #[error("the message ends in the middle of {0}")]
    Truncated(&'static str),
    /// A byte that is none of those the protocol knows here.
    #[error("{byte:#04x} is no {what}")]
    Unknown {
        /// What was expected.
        what: &'static str,
        /// What was there.
        byte: u8,
    },
    /// A length below zero.
    #[error("{0} has the length {1}")]
    Length(&'static str, i32),
    /// A name is not UTF-8, though the connection asked for UTF-8.
    #[error("{0} is not UTF-8")]
    NotUtf8(&'static str),
    /// More bytes than the message needs.
    #[error("{0} bytes are left over after the message")]
    LeftOver(usize),
}

impl Message {
    /// Decodes one message: the content of one `XLogData`.
    ///
    /// # Errors
    /// See [`Malformed`].
    pub fn decode(bytes: &Bytes) -> Result<Self, Malformed> {
        let mut reader = Reader { rest: bytes };
        let message = reader.message(bytes)?;
        if reader.rest.is_empty() { Ok(message) } else { Err(Malformed::LeftOver(reader.rest.len())) }
    }
}

/// A cursor that never reads past its end.
struct Reader<'a> {
    rest: &'a [u8],
}

impl<'a> Reader<'a> {
    fn message(&mut self, whole: &Bytes) -> Result<Message, Malformed> {
        Ok(match self.u8("the kind of message")? {
            b'B' => Message::Begin { commit_lsn: self.lsn()?, commit_micros: self.timestamp()?, xid: self.u32("xid")? },
            b'C' => {
                self.u8("the flags of a commit")?;
                Message::Commit { commit_lsn: self.lsn()?, end_lsn: self.lsn()?, commit_micros: self.timestamp()? }
            }
            b'O' => {
                self.lsn()?;
                Message::Origin { name: self.name("an origin")? }
            }
            b'R' => Message::Relation(self.relation()?),
            b'Y' => Message::Type { oid: self.u32("a type's oid")?, name: self.qualified("a type's name")? },
            b'I' => {
                let relation = self.u32("a relation's oid")?;
                match self.u8("the kind of tuple")? {
                    b'N' => Message::Insert { relation, new: self.tuple(whole)? },
                    byte => return Err(Malformed::Unknown { what: "new tuple", byte }),
                }
            }
            b'U' => self.update(whole)?,
            b'D' => {
                let relation = self.u32("a relation's oid")?;
                let old = match self.u8("the kind of tuple")? {
                    b'K' => OldTuple::Key(self.tuple(whole)?),
                    b'O' => OldTuple::Full(self.tuple(whole)?),
                    byte => return Err(Malformed::Unknown { what: "old tuple", byte }),
                };
                Message::Delete { relation, old }
            }
            b'T' => self.truncate()?,
            b'M' => {
                let flags = self.u8("the flags of a message")?;
                let lsn = self.lsn()?;
                let prefix = self.name("a message's prefix")?;
                let content = self.sized("a message's content")?;
                Message::Logical { transactional: flags & 1 != 0, lsn, prefix, content: whole.slice_ref(content) }
            }
            byte => return Err(Malformed::Unknown { what: "kind of message", byte }),
        })
    }

    fn relation(&mut self) -> Result<Relation, Malformed> {
        let oid = self.u32("a relation's oid")?;
        let name = self.qualified("a relation's name")?;
        let identity = self.u8("a replica identity")?;
        if !b"dnfi".contains(&identity) {
            return Err(Malformed::Unknown { what: "replica identity", byte: identity });
        }
        let count = self.u16("the number of columns")?;
        // Each column takes at least ten bytes: a lying count ends in `Truncated`, not in a huge allocation.
        let mut columns = Vec::with_capacity(usize::from(count).min(self.rest.len() / 10));
        for _ in 0..count {
            columns.push(RelationColumn {
                key: self.u8("a column's flags")? & 1 != 0,
                name: self.name("a column's name")?,
                type_oid: self.u32("a column's type")?,
                type_modifier: self.i32("a column's type modifier")?,
            });
        }
        Ok(Relation { oid, name, identity, columns })
    }

    fn update(&mut self, whole: &Bytes) -> Result<Message, Malformed> {
        let relation = self.u32("a relation's oid")?;
        let mut kind = self.u8("the kind of tuple")?;
        let old = match kind {
            b'K' => Some(OldTuple::Key(self.tuple(whole)?)),
            b'O' => Some(OldTuple::Full(self.tuple(whole)?)),
            _ => None,
        };
        if old.is_some() {
            kind = self.u8("the kind of tuple")?;
        }
        match kind {
            b'N' => Ok(Message::Update { relation, old, new: self.tuple(whole)? }),
            byte => Err(Malformed::Unknown { what: "new tuple", byte }),
        }
    }

    fn truncate(&mut self) -> Result<Message, Malformed> {
        let count = self.u32("the number of relations")?;
        let options = self.u8("the options of a truncate")?;
        let relations = (0..count).map(|_| self.u32("a relation's oid")).collect::<Result<Vec<_>, _>>()?;
        Ok(Message::Truncate { relations, cascade: options & 1 != 0, restart_identity: options & 2 != 0 })
    }

    fn tuple(&mut self, whole: &Bytes) -> Result<Tuple, Malformed> {
        let columns = self.u16("the number of columns")?;
        let start = self.rest;
        for _ in 0..columns {
            self.value()?;
        }
        let data = start.get(..start.len() - self.rest.len()).unwrap_or_default();
        Ok(Tuple { data: whole.slice_ref(data), columns })
    }

    fn value(&mut self) -> Result<Value<'a>, Malformed> {
        Ok(match self.u8("the kind of a value")? {
            b'n' => Value::Null,
            b'u' => Value::Unchanged,
            b't' => Value::Text(self.sized("a value")?),
            b'b' => Value::Binary(self.sized("a value")?),
            byte => return Err(Malformed::Unknown { what: "kind of value", byte }),
        })
    }

    /// A 32-bit length and as many bytes.
    fn sized(&mut self, what: &'static str) -> Result<&'a [u8], Malformed> {
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

    fn lsn(&mut self) -> Result<Lsn, Malformed> {
        self.fixed::<8>("an LSN").map(|mut b| Lsn::new(b.get_u64()))
    }

    fn timestamp(&mut self) -> Result<i64, Malformed> {
        self.fixed::<8>("a timestamp").map(|mut b| b.get_i64().saturating_add(POSTGRES_EPOCH_MICROS))
    }

    fn u8(&mut self, what: &'static str) -> Result<u8, Malformed> {
        self.fixed::<1>(what).map(|mut b| b.get_u8())
    }

    fn u16(&mut self, what: &'static str) -> Result<u16, Malformed> {
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

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// Builds messages as the server would.
    #[derive(Default)]
    struct Writer(Vec<u8>);

    impl Writer {
        fn byte(mut self, b: u8) -> Self {
            self.0.push(b);
            self
        }
        fn bytes(mut self, b: &[u8]) -> Self {
            self.0.extend_from_slice(b);
            self
        }
        fn name(self, s: &str) -> Self {
            self.bytes(s.as_bytes()).byte(0)
        }
        fn done(self) -> Bytes {
            Bytes::from(self.0)
        }
    }

    fn row(kind: u8) -> Writer {
        Writer::default()
            .byte(kind)
            .bytes(&4u16.to_be_bytes())
            .byte(b'n')
            .byte(b'u')
            .byte(b't')
            .bytes(&3i32.to_be_bytes())
            .bytes(b"abc")
            .byte(b't')
            .bytes(&0i32.to_be_bytes())
    }

    fn update() -> Bytes {
        Writer::default().byte(b'U').bytes(&7u32.to_be_bytes()).bytes(&row(b'K').0).bytes(&row(b'N').0).done()
    }

    #[test]
    fn a_row_hands_out_its_values() {
        let Message::Update { relation, old: Some(OldTuple::Key(_)), new } = Message::decode(&update()).unwrap() else {
            panic!("not an update with a key")
        };
        assert_eq!(relation, 7);
        assert_eq!(
            new.values().collect::<Vec<_>>(),
            [Value::Null, Value::Unchanged, Value::Text(b"abc"), Value::Text(b"")]
        );
    }

    #[test]
    fn a_relation_names_its_key() {
        let bytes = Writer::default()
            .byte(b'R')
            .bytes(&7u32.to_be_bytes())
            .name("")
            .name("t")
            .byte(b'd')
            .bytes(&1u16.to_be_bytes())
            .byte(1)
            .name("id")
            .bytes(&23u32.to_be_bytes())
            .bytes(&(-1i32).to_be_bytes())
            .done();
        let Message::Relation(relation) = Message::decode(&bytes).unwrap() else { panic!("not a relation") };
        assert_eq!(relation.name, QualifiedName::new("pg_catalog", "t"));
        assert!(relation.columns[0].key);
    }

    #[test]
    fn every_prefix_of_a_message_is_an_error() {
        let whole = update();
        for end in 0..whole.len() {
            assert!(Message::decode(&whole.slice(..end)).is_err(), "{end} bytes");
        }
    }

    #[test]
    fn bytes_left_over_are_an_error() {
        let longer = Writer(update().to_vec()).byte(0).done();
        assert_eq!(Message::decode(&longer), Err(Malformed::LeftOver(1)));
    }

    #[test]
    fn a_negative_length_is_an_error() {
        let bytes = Writer::default()
            .byte(b'I')
            .bytes(&7u32.to_be_bytes())
            .byte(b'N')
            .bytes(&1u16.to_be_bytes())
            .byte(b't')
            .bytes(&(-5i32).to_be_bytes())
            .done();
        assert_eq!(Message::decode(&bytes), Err(Malformed::Length("a value", -5)));
    }

    proptest! {
        #[test]
        fn no_bytes_bring_the_decoder_down(bytes: Vec<u8>) {
            drop(Message::decode(&Bytes::from(bytes)));
        }

        #[test]
        fn no_damaged_message_brings_the_decoder_down(at in 0usize..60, to: u8) {
            let mut bytes = update().to_vec();
            let at = at % bytes.len();
            bytes[at] = to;
            if let Ok(Message::Update { new, .. }) = Message::decode(&Bytes::from(bytes)) {
                prop_assert_eq!(new.values().count(), new.len());
            }
        }
    }
}
