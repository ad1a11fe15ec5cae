//! What the spool must know of a message of pgoutput, protocol version 1: where transactions begin and end, and which
//! relation is described or needed. The rest of a message is nobody's business before it is decoded to be applied.

use bytes::{Buf, Bytes};

use crate::postgres::Lsn;

/// What a message is to the spool.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Seen {
    /// A transaction begins; its commit record begins here.
    Begin { commit: Lsn },
    /// It ends; its commit record ends here.
    Commit { end: Lsn },
    /// A type is described, for the relation that is described next.
    Type,
    /// A relation is described.
    Relation(u32),
    /// A row of a relation.
    Row(u32),
    /// These relations are emptied.
    Truncate(Vec<u32>),
    /// Nothing of these.
    Other,
}

/// `None` for a message that ends too early.
pub(super) fn peek(message: &[u8]) -> Option<Seen> {
    let mut rest = message;
    Some(match rest.try_get_u8().ok()? {
        b'B' => Seen::Begin { commit: Lsn::new(rest.try_get_u64().ok()?) },
        b'C' => {
            let _flags = rest.try_get_u8().ok()?;
            let _commit = rest.try_get_u64().ok()?;
            Seen::Commit { end: Lsn::new(rest.try_get_u64().ok()?) }
        }
        b'Y' => Seen::Type,
        b'R' => Seen::Relation(rest.try_get_u32().ok()?),
        b'I' | b'U' | b'D' => Seen::Row(rest.try_get_u32().ok()?),
        b'T' => {
            let count = rest.try_get_u32().ok()?;
            let _options = rest.try_get_u8().ok()?;
            // Collected without a look at the count, which may lie.
            Seen::Truncate((0..count).map(|_| rest.try_get_u32().ok()).collect::<Option<_>>()?)
        }
        _ => Seen::Other,
    })
}

/// The descriptions of one relation as they came: those of its types, then its own.
pub(super) type Descriptions = Vec<(Lsn, Bytes)>;

/// Puts the descriptions of types together with that of the relation for which they were sent, which comes right after them.
#[derive(Debug, Default)]
pub(super) struct Gathering {
    types: Descriptions,
}

impl Gathering {
    /// Takes a description; what belongs together, once the relation's own is there. All of it is copied: the original may be
    /// a part of something large.
    pub(super) fn take(&mut self, start: Lsn, message: &[u8], seen: &Seen) -> Option<(u32, Descriptions)> {
        match seen {
            Seen::Type => {
                self.types.push((start, Bytes::copy_from_slice(message)));
                None
            }
            Seen::Relation(oid) => {
                let mut all = std::mem::take(&mut self.types);
                all.push((start, Bytes::copy_from_slice(message)));
                Some((*oid, all))
            }
            _ => {
                self.types.clear();
                None
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn transactions_and_relations_are_told() {
        let mut begin = vec![b'B'];
        begin.extend_from_slice(&[0, 0, 0, 0, 0, 0, 1, 2]);
        assert_eq!(peek(&begin), Some(Seen::Begin { commit: Lsn::new(0x102) }));
        let mut commit = vec![b'C', 0];
        commit.extend_from_slice(&7u64.to_be_bytes());
        commit.extend_from_slice(&9u64.to_be_bytes());
        assert_eq!(peek(&commit), Some(Seen::Commit { end: Lsn::new(9) }));
        assert_eq!(peek(&[b'U', 0, 0, 0, 5, b'N']), Some(Seen::Row(5)));
        assert_eq!(peek(&[b'R', 0, 0, 0, 6]), Some(Seen::Relation(6)));
        let truncate = [b'T', 0, 0, 0, 2, 0, 0, 0, 0, 5, 0, 0, 0, 6];
        assert_eq!(peek(&truncate), Some(Seen::Truncate(vec![5, 6])));
        assert_eq!(peek(b"M"), Some(Seen::Other));
        assert_eq!(peek(b""), None);
        assert_eq!(peek(&commit[..10]), None);
    }

    #[test]
    fn types_go_with_the_relation_that_follows_them() {
        let mut gathering = Gathering::default();
        let mut take = |message: &[u8]| gathering.take(Lsn::ZERO, message, &peek(message).unwrap());
        assert_eq!(take(b"Y1"), None);
        let (oid, all) = take(&[b'R', 0, 0, 0, 6]).unwrap();
        assert_eq!((oid, all.len()), (6, 2));
        assert_eq!(take(b"Y2"), None);
        assert_eq!(take(&[b'I', 0, 0, 0, 6]), None);
        assert_eq!(take(&[b'R', 0, 0, 0, 7]).unwrap().1.len(), 1, "a row came between");
    }

    proptest! {
        #[test]
        fn no_message_brings_us_down(message: Vec<u8>) {
            drop(peek(&message));
        }
    }
}
