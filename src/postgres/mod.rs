//! One PostgreSQL server, seen from outside: how to reach it and what it says.
//!
//! Owns: connection strings, TLS, the two kinds of connection (tokio-postgres for control SQL, [`wire`] for the
//! data paths), pgoutput, catalog queries, identifiers and LSNs. Knows nothing about moves, phases or state.

pub mod failure;
pub mod identifier;
pub mod lsn;

pub use identifier::{QualifiedName, quote_identifier, quote_literal};
pub use lsn::Lsn;
