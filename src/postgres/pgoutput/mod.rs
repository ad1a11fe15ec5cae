//! The messages of the `pgoutput` plugin, protocol versions 1 to 4, decoded in place.
//! See <https://www.postgresql.org/docs/current/protocol-logicalrep-message-formats.html>.
//!
//! A message is checked once, whole, when it is decoded: every length, every flag, and that nothing is left over.
//! Row data stays where it was received; a [`Tuple`] hands out slices of it and cannot fail any more. No input makes
//! the decoder panic or allocate more than a small multiple of the message's own size.
//!
//! The same bytes mean different things under different versions, and inside a streamed block: a [`Decoder`] knows
//! both. It does no I/O and knows nothing of what transactions mean; that is the business of who applies them.

mod message;
mod reader;
#[cfg(test)]
mod tests;
mod tuple;

use bytes::Bytes;

pub use message::{Aborted, Message, OldTuple, Prepared, Relation, RelationColumn};
pub use tuple::{Tuple, Value};

use reader::Reader;

/// What START_REPLICATION agreed on, as far as it decides how messages are written.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Protocol {
    /// `proto_version '1'`: whole transactions, sent once they committed. PostgreSQL 10 and later.
    V1,
    /// `proto_version '2'`, which can stream transactions before they end. PostgreSQL 14 and later.
    V2,
    /// `proto_version '3'`, which can send prepared transactions. PostgreSQL 15 and later.
    V3,
    /// `proto_version '4'`. PostgreSQL 16 and later.
    V4 {
        /// `streaming 'parallel'`: a streamed abort says where and when it happened.
        parallel: bool,
    },
}

/// One message, and what a streamed block adds to it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Decoded {
    /// Inside a streamed block: the transaction or subtransaction that a change belongs to.
    pub xid: Option<u32>,
    /// The message itself.
    pub message: Message,
}

/// A message inside a streamed block, read only as far as it takes to put it aside.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Unread<'a> {
    /// The first byte of the message.
    pub kind: u8,
    /// The transaction or subtransaction that it belongs to; Origin, which speaks of a whole transaction, names none.
    pub xid: Option<u32>,
    /// What it describes, if it describes something: the oid of a relation or of a type.
    pub described: Option<u32>,
    /// What follows kind and xid. Together with the kind it is the same message outside of a block.
    pub rest: &'a [u8],
}

impl Unread<'_> {
    /// The message as protocol version 1 writes it.
    #[must_use]
    pub fn bare(&self) -> Bytes {
        let mut bytes = Vec::with_capacity(self.rest.len() + 1);
        bytes.push(self.kind);
        bytes.extend_from_slice(self.rest);
        bytes.into()
    }
}

/// Decodes the messages of one stream in their order.
#[derive(Debug, Clone)]
pub struct Decoder {
    protocol: Protocol,
    /// Between Stream Start and Stop every change carries an xid.
    in_block: bool,
}

impl Decoder {
    /// For a stream that begins.
    #[must_use]
    pub const fn new(protocol: Protocol) -> Self {
        Self { protocol, in_block: false }
    }

    /// Decodes the next message: the content of one `XLogData`. After an error the decoder is where it was before.
    ///
    /// # Errors
    /// See [`Malformed`].
    pub fn decode(&mut self, bytes: &Bytes) -> Result<Decoded, Malformed> {
        let mut reader = Reader::new(bytes, self.protocol, self.in_block);
        let decoded = reader.message()?;
        reader.end()?;
        match decoded.message {
            Message::StreamStart { .. } => self.in_block = true,
            Message::StreamStop => self.in_block = false,
            _ => {}
        }
        Ok(decoded)
    }

    /// The next message, if it stands inside a block and is none that ends it. It is checked no further than it is
    /// read: what [`Message::decode`] says of the rest counts.
    ///
    /// # Errors
    /// The message ends before what is read of it.
    pub fn peek<'a>(&self, bytes: &'a Bytes) -> Result<Option<Unread<'a>>, Malformed> {
        if self.in_block { reader::unread(bytes) } else { Ok(None) }
    }
}

impl Message {
    /// Decodes one message of protocol version 1, where each stands for itself.
    ///
    /// # Errors
    /// See [`Malformed`].
    pub fn decode(bytes: &Bytes) -> Result<Self, Malformed> {
        Decoder::new(Protocol::V1).decode(bytes).map(|decoded| decoded.message)
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
    /// A known message that the agreed version of the protocol does not have.
    #[error("the message is {0}, which the agreed version of the protocol does not have")]
    NotInProtocol(&'static str),
    /// Inside a streamed block stands what may not, or a block ends that did not begin.
    #[error("{0} is out of place: streamed blocks hold changes alone, and do not nest")]
    OutOfPlace(&'static str),
    /// A length below zero.
    #[error("{0} has the length {1}")]
    Length(&'static str, i32),
    /// A time beyond what 64 bits of microseconds since 1970 can tell.
    #[error("{0} microseconds after 2000 is no time")]
    Time(i64),
    /// A name is not UTF-8, though the connection asked for UTF-8.
    #[error("{0} is not UTF-8")]
    NotUtf8(&'static str),
    /// More bytes than the message needs.
    #[error("{0} bytes are left over after the message")]
    LeftOver(usize),
}
