//! One PostgreSQL server, seen from outside: how to reach it and what it says.
//!
//! Owns: connection strings, TLS, the two kinds of connection ([`server::Session`] for control SQL, [`wire::Wire`]
//! for the data paths), pgoutput, catalog queries, identifiers and LSNs. Knows nothing about moves, phases or state.

pub mod catalog;
pub mod conninfo;
pub mod copy_text;
pub mod dial;
pub mod failure;
pub mod identifier;
pub mod leftovers;
pub mod lsn;
pub mod passfile;
pub mod pgoutput;
pub mod provider;
pub mod replication;
pub mod server;
pub mod tls;
pub mod wire;

pub use conninfo::{Ambient, ConnInfo};
pub use dial::Stream;
pub use identifier::{QualifiedName, quote_identifier, quote_literal};
pub use lsn::Lsn;
pub use server::{Server, Session, Side};
