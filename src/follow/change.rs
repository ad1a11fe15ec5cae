//! What happened to one row on the source, with where it goes and where it comes from. Nothing here talks to a server.

use std::sync::Arc;

use super::relation::{Finder, Plan};
use crate::error::{Error, Result};
use crate::postgres::pgoutput::{OldTuple, Tuple};
use crate::postgres::{Lsn, QualifiedName};
use crate::telemetry::BatchApplied;

/// What happens to a row.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) enum Operation {
    Insert,
    Update,
    Delete,
    Truncate,
}

impl Operation {
    pub(super) const fn as_str(self) -> &'static str {
        match self {
            Self::Insert => "INSERT",
            Self::Update => "UPDATE",
            Self::Delete => "DELETE",
            Self::Truncate => "TRUNCATE",
        }
    }

    pub(super) const fn count(self, applied: &mut BatchApplied) {
        match self {
            Self::Insert => applied.inserts += 1,
            Self::Update => applied.updates += 1,
            Self::Delete => applied.deletes += 1,
            Self::Truncate => applied.truncates += 1,
        }
    }
}

/// Which source transaction a change belongs to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Position {
    pub commit_lsn: Lsn,
    pub xid: u32,
}

/// A row that an UPDATE or DELETE did not find.
#[derive(Clone, Debug)]
pub(super) struct Missing {
    pub table: QualifiedName,
    pub operation: Operation,
    pub at: Position,
}

/// One change of the stream. The rows lie where they were received.
#[derive(Clone, Debug)]
pub(super) struct Change {
    pub plan: Arc<Plan>,
    pub at: Position,
    pub row: Row,
}

/// The part that differs from operation to operation.
#[derive(Clone, Debug)]
pub(super) enum Row {
    Insert(Tuple),
    Update {
        /// What the row is found by, where that is not in the new row.
        old: Option<Tuple>,
        new: Tuple,
    },
    Delete(Tuple),
    /// One statement for all tables that the source emptied together; the change's plan is that of the first.
    Truncate(Arc<str>),
}

impl Change {
    /// # Errors
    /// Class bug: the row has another width than was announced.
    pub(super) fn insert(plan: Arc<Plan>, at: Position, new: Tuple) -> Result<Self> {
        check_width(&plan, &new)?;
        Ok(Self { plan, at, row: Row::Insert(new) })
    }

    /// # Errors
    /// Class bug: a row has another width than was announced.
    pub(super) fn update(plan: Arc<Plan>, at: Position, old: Option<OldTuple>, new: Tuple) -> Result<Self> {
        check_width(&plan, &new)?;
        let old = old.map(OldTuple::into_tuple);
        if let Some(old) = &old {
            check_width(&plan, old)?;
        }
        // The whole old row holds also what the new one leaves out, and rows found by their look need all of it.
        let new = match (&plan.finder, &old) {
            (Finder::WholeRow, Some(old)) if new.leaves_out() => new.over(old),
            _ => new,
        };
        Ok(Self { plan, at, row: Row::Update { old, new } })
    }

    /// # Errors
    /// Class bug: the row has another width than was announced.
    pub(super) fn delete(plan: Arc<Plan>, at: Position, old: OldTuple) -> Result<Self> {
        let old = old.into_tuple();
        check_width(&plan, &old)?;
        Ok(Self { plan, at, row: Row::Delete(old) })
    }

    pub(super) fn operation(&self) -> Operation {
        match self.row {
            Row::Insert(_) => Operation::Insert,
            Row::Update { .. } => Operation::Update,
            Row::Delete(_) => Operation::Delete,
            Row::Truncate(_) => Operation::Truncate,
        }
    }

    /// Memory that it keeps, in bytes.
    pub(super) fn bytes(&self) -> usize {
        size_of::<Self>()
            + match &self.row {
                Row::Insert(tuple) | Row::Delete(tuple) => tuple.bytes(),
                Row::Update { old, new } => new.bytes() + old.as_ref().map_or(0, Tuple::bytes),
                Row::Truncate(sql) => sql.len(),
            }
    }
}

fn check_width(plan: &Plan, tuple: &Tuple) -> Result<()> {
    if tuple.len() == plan.width() {
        return Ok(());
    }
    Err(Error::bug(format!(
        "a row of table {} has {} values where the stream announced {}",
        plan.name.plain(),
        tuple.len(),
        plan.width()
    )))
}
