//! Schema changes: captured on the source ([`capture`]), carried in the stream, and run on the target in their place.
//!
//! Owns what happens to a schema change that arrives. Promises that a captured change is either run on the target in the
//! transaction of the rows around it, or ends following with an error that shows the statement; and that a table whose rows
//! the statement may have filled in another way on the target is copied again.
//!
//! # Why the sides stay equal
//!
//! - The statement runs between the changes before and after it, in the same target transaction, as the role that ran it on the
//!   source and in its search path. With it the state learns of tables that came, went or have another name.
//! - A table that is new holds nothing, and every row comes with the stream: it counts as copied under the commit that
//!   made it. A table that a query filled is made empty, and copied.
//! - A statement that writes a table anew gives the same values on both sides only if it is a plain change of type between types
//!   whose text depends on no setting. After any other one the table is copied again. The value that `ADD COLUMN … DEFAULT now()` leaves
//!   in old rows is compared, for the same reason.
//! - Triggers, rules and identities that came with it are held back at once, like those of the first restore.
//! - What the statement did was made on the target by hand before? Then it is said in the log, and left at that: before a row is
//!   applied, the shapes of both sides are compared anyway.

pub mod capture;
mod choice;
mod describing;
mod event;
mod publishing;
mod replay;
mod statement;

use std::collections::{HashMap, HashSet};
use std::sync::{Arc, Mutex, PoisonError};

use crate::postgres::QualifiedName;

/// What the applier remembers of schema changes.
#[derive(Default)]
pub(super) struct SchemaChanges {
    /// The capture's table in the stream.
    relation: Option<u32>,
    /// How many the open transaction has brought.
    ordinal: i32,
    /// Tables that the next statement writes anew, with the reason.
    rewritten: HashMap<QualifiedName, i32>,
    /// The batch holds one, so it ends with its transaction.
    in_batch: bool,
    /// Tables are to be copied once the batch is committed.
    copy_again: bool,
}

impl SchemaChanges {
    pub(super) fn announce(&mut self, relation: u32) {
        self.relation = Some(relation);
    }

    pub(super) fn is_capture(&self, relation: u32) -> bool {
        self.relation == Some(relation)
    }

    /// A transaction of the source begins.
    pub(super) fn begin(&mut self) {
        self.ordinal = 0;
        self.rewritten.clear();
    }

    pub(super) fn end_the_batch(&self) -> bool {
        self.in_batch
    }

    /// The batch was committed; whether tables are to be copied now.
    pub(super) fn committed(&mut self) -> bool {
        self.in_batch = false;
        std::mem::take(&mut self.copy_again)
    }
}

/// The tables of the move, as they are known while following: the watch over the source reads what the applier learns.
#[derive(Clone, Default)]
pub(crate) struct Moved(Arc<Mutex<HashSet<QualifiedName>>>);

impl Moved {
    pub(super) fn new(tables: HashSet<QualifiedName>) -> Self {
        Self(Arc::new(Mutex::new(tables)))
    }

    pub(super) fn snapshot(&self) -> HashSet<QualifiedName> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    fn change(&self, change: impl FnOnce(&mut HashSet<QualifiedName>)) {
        change(&mut self.0.lock().unwrap_or_else(PoisonError::into_inner));
    }
}
