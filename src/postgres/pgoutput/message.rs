//! What the messages say. Times are microseconds since 1970 of the source's clock.

use bytes::Bytes;

use super::Tuple;
use crate::postgres::{Lsn, QualifiedName};

/// One message of the stream.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Message {
    /// A transaction begins; the server sends it once the transaction committed.
    Begin {
        /// Position of the commit record.
        commit_lsn: Lsn,
        /// When it committed.
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
        /// When it committed.
        commit_micros: i64,
    },
    /// The transaction came from elsewhere before it reached the source.
    Origin {
        /// Position of the commit there, as far as it was told.
        lsn: Lsn,
        /// The origin's name on the source.
        name: String,
    },
    /// What a relation looks like from here on; sent before its first change and after each change of shape.
    Relation(Relation),
    /// Name of a type that is not built in.
    Type {
        /// `pg_type.oid` on the source.
        oid: u32,
        /// Schema and name.
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
    /// From version 2 on: a block with a part of a transaction that has not ended begins.
    StreamStart {
        /// The transaction, never a subtransaction.
        xid: u32,
        /// Whether this is the transaction's first block.
        first: bool,
    },
    /// From version 2 on: the block ends.
    StreamStop,
    /// From version 2 on: a transaction of which all was streamed committed.
    StreamCommit {
        /// The transaction.
        xid: u32,
        /// Position of the commit record.
        commit_lsn: Lsn,
        /// Position after the commit record.
        end_lsn: Lsn,
        /// When it committed.
        commit_micros: i64,
    },
    /// From version 2 on: a transaction that was streamed, or a subtransaction of it, was rolled back.
    StreamAbort {
        /// The transaction.
        xid: u32,
        /// What was rolled back: the same, or one subtransaction.
        subxid: u32,
        /// Where and when; [`Protocol::V4`](super::Protocol::V4) with `parallel` tells, no other does.
        aborted: Option<Aborted>,
    },
    /// From version 3 on: a transaction begins that is sent once it was prepared.
    BeginPrepare(Prepared),
    /// From version 3 on: the transaction is complete and prepared.
    Prepare(Prepared),
    /// From version 3 on: a prepared transaction committed.
    CommitPrepared {
        /// Position of the commit record.
        commit_lsn: Lsn,
        /// Position after the commit record.
        end_lsn: Lsn,
        /// When it committed.
        commit_micros: i64,
        /// The transaction.
        xid: u32,
        /// Its name in PREPARE TRANSACTION.
        gid: String,
    },
    /// From version 3 on: a prepared transaction was rolled back.
    RollbackPrepared {
        /// Position after the record of the PREPARE.
        prepare_end_lsn: Lsn,
        /// Position after the record of the rollback.
        rollback_end_lsn: Lsn,
        /// When it was prepared.
        prepare_micros: i64,
        /// When it was rolled back.
        rollback_micros: i64,
        /// The transaction.
        xid: u32,
        /// Its name in PREPARE TRANSACTION.
        gid: String,
    },
    /// From version 3 on: a transaction of which all was streamed is prepared.
    StreamPrepare(Prepared),
}

impl Message {
    /// The kind of message, as PostgreSQL's documentation calls it.
    #[must_use]
    pub const fn kind(&self) -> &'static str {
        match self {
            Self::Begin { .. } => "Begin",
            Self::Commit { .. } => "Commit",
            Self::Origin { .. } => "Origin",
            Self::Relation(_) => "Relation",
            Self::Type { .. } => "Type",
            Self::Insert { .. } => "Insert",
            Self::Update { .. } => "Update",
            Self::Delete { .. } => "Delete",
            Self::Truncate { .. } => "Truncate",
            Self::Logical { .. } => "Message",
            Self::StreamStart { .. } => "Stream Start",
            Self::StreamStop => "Stream Stop",
            Self::StreamCommit { .. } => "Stream Commit",
            Self::StreamAbort { .. } => "Stream Abort",
            Self::BeginPrepare(_) => "Begin Prepare",
            Self::Prepare(_) => "Prepare",
            Self::CommitPrepared { .. } => "Commit Prepared",
            Self::RollbackPrepared { .. } => "Rollback Prepared",
            Self::StreamPrepare(_) => "Stream Prepare",
        }
    }
}

/// Where and when a streamed transaction was rolled back.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Aborted {
    /// Position of the abort record.
    pub lsn: Lsn,
    /// When.
    pub micros: i64,
}

/// A transaction that was prepared.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Prepared {
    /// Position of the record of the PREPARE.
    pub prepare_lsn: Lsn,
    /// Position after it.
    pub end_lsn: Lsn,
    /// When it was prepared.
    pub prepare_micros: i64,
    /// The transaction.
    pub xid: u32,
    /// Its name in PREPARE TRANSACTION.
    pub gid: String,
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

    /// The row, whichever kind it is.
    #[must_use]
    pub fn into_tuple(self) -> Tuple {
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
