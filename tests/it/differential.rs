//! Both sides against each other: real content through a move while it changes, and nothing is lost, doubled, bent or
//! refused on the way.
//!
//! A case states a schema, content and a script of changes ([`case`]); it is moved by the real binary under several
//! combinations of versions, copy method, engine and role. One file for each kind of promise; `docs/behaviours.md` says
//! which promise is tested where.

pub mod case;
mod generator;
mod rows;
mod transactions;
mod values;
