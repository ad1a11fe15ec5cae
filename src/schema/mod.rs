//! The schema: how it gets from the source to the target, in which steps, and what waits for the cutover.
//!
//! pg_dump and pg_restore know every kind of object, so they do the work; this room finds them ([`programs`]), reads
//! what they say ([`failure`]), and sorts the table of contents of the archive into steps ([`toc`]):
//!
//! 1. *before the data*: everything that rows need, restored whole or not at all;
//! 2. *after the data*: keys, indexes, statistics, policies; a second run builds only what is missing;
//! 3. *foreign keys*, once the target is a state that the source once had;
//! 4. *held back*: triggers and rules of tables, and event triggers, restored and disabled until the cutover.
//!
//! Publications and subscriptions never travel: the first would make the target refuse updates, the second
//! would start to pull. What else is left out is named in [`Archive::left_out`].
//!
//! Promises that every step can be repeated after a death at any moment. Must never drop or change an object that
//! this move did not make, and never print a statement with its literals: a user mapping holds a password.

mod allowed;
mod child;
pub mod data;
mod dump;
mod existing;
pub mod failure;
pub mod foreign_keys;
pub(crate) mod hold_back;
pub mod indexes;
mod left_out;
pub mod programs;
mod restore;
pub mod toc;

pub use allowed::{DefaultPrivileges, OWNS_CATALOG, PROBE_EVENT_TRIGGER, Refusal, TargetRoles};
pub use data::{DataArchive, Listeners, Loading};
pub use dump::{Archive, DumpRequest, dump};
pub use foreign_keys::ForeignKeys;
pub use programs::Programs;
pub use restore::{Restorer, can_set_replica_role};
